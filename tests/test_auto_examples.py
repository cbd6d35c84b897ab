"""Masks of one row per example under automatic masks, where the batch is moved, cut, mixed: against masks put in by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fisherprune_jax as fp

B = 8
ALL = np.arange(B)
PERM = np.array([3, 0, 6, 1, 7, 5, 2, 4])
RNG = np.random.default_rng(0)
P = {name: RNG.normal(size=shape) for name, shape in {"a": (3, 4), "b": (4, 5), "o": (5, 2)}.items()}
X = RNG.normal(size=(B, 3))
MIX = RNG.normal(size=(B, B))


def mlp(p, x, one, two, at=ALL):
  """``one`` and ``two`` are the masks; ``at`` says of which example each row is."""
  h = one(jnp.tanh(x @ p["a"]), at)
  return two(jnp.tanh(h @ p["b"]), at) @ p["o"]


def of_data(prepare):
  return lambda p, x, one, two: mlp(p, prepare(x), one, two)


def behind(move, at):
  """What is moved lies between the two layers."""

  def net(p, x, one, two):
    h = move(one(jnp.tanh(x @ p["a"]), ALL))
    return two(jnp.tanh(h @ p["b"]), at) @ p["o"]

  return net


def looped(p, x, one, two, steps=(4,)):
  def turn(carry, each):
    return carry, mlp(p, each[0], one, two, each[1])

  xs = x.reshape(*steps, -1, 3), jnp.asarray(ALL).reshape(*steps, -1)
  for _ in steps[1:]:
    inner = turn
    turn = lambda carry, each, inner=inner: (carry, lax.scan(inner, 0, each)[1])
  return lax.scan(turn, 0, xs, reverse=True)[1]


def mapped(p, x, one, two, **options):
  def each(pair):
    return mlp(p, pair[0], one, two, pair[1])

  return lax.map(each, (x, jnp.asarray(ALL)), **options)


def order(x):
  return jnp.argsort(x[:, 0])


def sorted_out(p, x, one, two, back):
  """An expert that is given rows in an order of the data's, beside a layer that is not."""
  h = one(jnp.tanh(x @ p["a"]), ALL)
  i = order(x)
  y = two(jax.nn.relu(one(jnp.tanh(x @ p["a"]), ALL)[i] @ p["b"]), i)
  return two(h @ p["b"], ALL) @ p["o"] + back(y @ p["o"], i)


def chosen(p, x, one, two):
  h = one(jnp.tanh(x @ p["a"]), ALL)
  _, i = lax.top_k(x[:, 0], 3)
  y = two(jnp.tanh(h[i] @ p["b"]), i) @ p["o"]
  return jnp.zeros((B, 2)).at[i].add(y)


def last_step(p, x, one, two):
  """Time steps of which each example has its last one read."""
  h = one(jnp.tanh(jnp.stack([x, 2 * x, 3 * x], 1) @ p["a"]), ALL[:, None])
  h = h[jnp.arange(B), (x[:, 0] > 0).astype(int)]
  return two(jnp.tanh(h @ p["b"]), ALL) @ p["o"]


def written(p, x, one, two):
  h = one(jnp.tanh(x @ p["a"]), ALL)
  cache = jnp.zeros((B, 2, 4)).at[jnp.arange(B), (x[:, 0] > 0).astype(int)].set(h)
  return two(jnp.tanh(cache @ p["b"]), ALL[:, None]) @ p["o"]


def folded(p, x, one, two):
  """The batch with time steps in one axis, and back."""
  h = one(jnp.tanh(jnp.stack([x, 2 * x, 3 * x], 1).reshape(-1, 3) @ p["a"]), np.repeat(ALL, 3))
  return two(jnp.tanh(h.reshape(B, 3, 4) @ p["b"]), ALL[:, None]) @ p["o"]


def normed(p, x, one, two, groups=1):
  """Batch norm, in micro-batches too: it mixes what examples hold, but rows stay where they are."""
  h = jnp.tanh(x.reshape(groups, -1, 3) @ p["a"])
  h = one(h - h.mean(1, keepdims=True), ALL.reshape(groups, -1))
  return two(jnp.tanh(h @ p["b"]), ALL.reshape(groups, -1)) @ p["o"]


def attended(p, x, one, two):
  h = jnp.tanh(x @ p["a"])
  h = one(h + jax.nn.softmax(x @ x.T) @ h, ALL)
  return two(jnp.tanh(h @ p["b"]), ALL) @ p["o"]


def contrast(p, x, one, two):
  h = mlp(p, x, one, two)
  return jax.nn.log_softmax(h @ h.T)


def branches(p, x, one, two):
  return lax.cond(x[0, 0] > 0, lambda x: mlp(p, x, one, two), lambda x: 2 * mlp(p, -x, one, two), x)


def halves(p, x, one, two):
  return jnp.concatenate([mlp(p, x[4:], one, two, ALL[4:]), mlp(p, x[:4], one, two, ALL[:4])])


def neighbours(p, x, one, two):
  return mlp(p, x[0::2], one, two, ALL[0::2]) - mlp(p, x[1::2], one, two, ALL[1::2])


def padded(p, x, one, two):
  rows = lambda h, i: jnp.concatenate([one(h[:B], i), h[B:]])
  more = lambda h, i: jnp.concatenate([two(h[:B], i), h[B:]])
  return mlp(p, jnp.pad(x, ((0, 3), (0, 0)), constant_values=1.0), rows, more)[: B + 1]


def views(p, x, one, two):
  """Two views of each example, end to end, and told apart again."""
  h = mlp(p, jnp.concatenate([x, 2 * x]), one, two, np.tile(ALL, 2))
  return h[:B] * h[B:]


DATA = {
  "reversed": lambda x: x[::-1],
  "mixed with the reversed": lambda x: 0.7 * x + 0.3 * x[::-1],
  "mixed with the rolled": lambda x: 0.7 * x + 0.3 * jnp.roll(x, 1, 0),
  "known order": lambda x: x[PERM],
  "known order mixed": lambda x: 0.7 * x[PERM] + 0.3 * x[PERM[::-1]],
  "random order": lambda x: jax.random.permutation(jax.random.key(1), x),
  "mixed with a random order": lambda x: 0.7 * x + 0.3 * x[jax.random.permutation(jax.random.key(1), B)],
  "ordered by the data": lambda x: x[order(x)],
  "ordered by the data, under vmap": lambda x: jax.vmap(lambda c: c[order(x)], 1, 1)(x),
  "sorted": lambda x: jnp.sort(x, 0),
  "rolled by the data": lambda x: jnp.roll(x, (10 * x[0, 0]).astype(int), 0),
  "added up": lambda x: jnp.cumsum(x, 0),
  "mixed by a matrix": lambda x: MIX @ x,
  "mixed by a matrix of the data": lambda x: jax.nn.one_hot(order(x), B) @ x,
  "taken along": lambda x: jnp.take_along_axis(x, jnp.argsort(x, 0), 0),
  "one or the other": lambda x: lax.cond(x[0, 0] > 0, lambda x: x[::-1], lambda x: x + x[PERM], x),
  "two inputs mixed alike": lambda x: jnp.stack([x, x[PERM]], 1).sum(1),
}


def anchored(p, x, one, two):
  """Everything beside the first example."""
  h = jnp.tanh(x @ p["a"])
  h = one(h - h[0], ALL)
  return two(jnp.tanh(h @ p["b"]), ALL) @ p["o"]


def one_after_the_other(p, x, one, two):
  return jnp.stack([mlp(p, x[i], one, two, i) for i in range(B)])


NETS = {
  "anchored": anchored,
  "one after the other": one_after_the_other,
  **{f"data {name}": of_data(prepare) for name, prepare in DATA.items()},
  "halves": halves,
  "neighbours": neighbours,
  "padded": padded,
  "views": views,
  "micro-batches": looped,
  "micro-batches in micro-batches": lambda *args: looped(*args, steps=(2, 2)),
  "micro-batches, mixed": lambda p, x, one, two: looped(p, 0.5 * x + x[::-1], one, two),
  "micro-batches under vmap": lambda p, x, one, two: mlp(p, x.reshape(2, 4, 3), one, two, ALL.reshape(2, 4)),
  "one by one": mapped,
  "by threes": lambda *args: mapped(*args, batch_size=3),
  "features reversed": behind(lambda h: h[::-1], ALL[::-1]),
  "features in a known order": behind(lambda h: h[PERM], PERM),
  "features rolled": behind(lambda h: jnp.roll(h, 3, 0), np.roll(ALL, 3)),
  "features repeated": behind(lambda h: jnp.repeat(h, 2, 0), np.repeat(ALL, 2)),
  "features of some": behind(lambda h: h[1::3], ALL[1::3]),
  "order and back": lambda *args: sorted_out(*args, lambda y, i: y[jnp.argsort(i)]),
  "order and written back": lambda *args: sorted_out(*args, lambda y, i: jnp.zeros_like(y).at[i].set(y)),
  "some chosen": chosen,
  "last step": last_step,
  "written": written,
  "folded": folded,
  "batch norm": normed,
  "batch norm of micro-batches": lambda *args: normed(*args, groups=2),
  "attention among examples": attended,
  "contrast": contrast,
  "branches": branches,
}


def as_it_is(h, at):
  return h


def plain(net):
  return lambda p, x: net(p, x, as_it_is, as_it_is)


def auto_masks():
  return fp.auto_mask(plain(mlp), P, X)


def masks_of(auto):
  """Masks of numbers that are all different: a row in a wrong place would be seen."""
  rng = np.random.default_rng(1)
  return {group.name: rng.uniform(0.5, 1.5, (B, group.size)) for group in auto.groups}


@pytest.mark.parametrize("name", NETS)
def test_each_row_of_the_gradient_is_of_its_example(name, x64):
  net, auto = NETS[name], auto_masks()
  masks, run = masks_of(auto), auto.wrap(plain(net))

  def by_hand(m):
    return jnp.sum(net(P, X, lambda h, i: h * m["a"][i], lambda h, i: h * m["b"][i]) ** 2)

  expected = jax.grad(by_hand)(masks)
  found = jax.jit(jax.grad(lambda m: jnp.sum(run({**P, "masks": m}, X) ** 2)))(masks)
  for group in auto.groups:
    np.testing.assert_allclose(found[group.name], expected[group.name], rtol=1e-6, atol=1e-9)


def slices(p, x):
  """Micro-batches that are cut by a number which is only known at each turn."""
  return lax.map(lambda i: mlp(p, lax.dynamic_slice_in_dim(x, 2 * i, 2), as_it_is, as_it_is), jnp.arange(4))


def carried(p, x):
  h = jnp.tanh(x @ p["a"])
  return lax.scan(lambda h, _: (jnp.roll(h, 1, 0), h @ p["b"]), h, None, length=2)[1] @ p["o"]


def pairs(p, x):
  h = jnp.tanh(x @ p["a"])
  return jnp.tanh((h[:, None] - h[None]) @ p["b"]) @ p["o"]


def sorted_data(p, x):
  """The same group under rows in two orders."""
  f = plain(mlp)
  return f(p, x) + f(p, x[order(x)])[jnp.argsort(order(x))]


REFUSED = {
  "two at a time": lambda p, x: jnp.stack([plain(mlp)(p, x[i] + x[i + 1]) for i in range(0, B, 2)]),
  "sorted": plain(behind(lambda h: jnp.sort(h, 0), ALL)),
  "taken along": plain(behind(lambda h: jnp.take_along_axis(h, jnp.argsort(h, 0), 0), ALL)),
  "rolled by the features": plain(behind(lambda h: jnp.roll(h, (10 * h.sum()).astype(int), 0), ALL)),
  "sliced": plain(behind(lambda h: lax.dynamic_slice_in_dim(h, (10 * h.sum()).astype(int), 3), ALL)),
  "added to the reversed": plain(behind(lambda h: h + h[::-1], ALL)),
  "one or the other": plain(behind(lambda h: lax.cond(h.sum() > 0, lambda h: h[::-1], lambda h: h, h), ALL)),
  "multiplied by an order": plain(behind(lambda h: jax.nn.one_hot(jnp.argsort(h.sum(1)), B).T @ h, ALL)),
  "in a random order": plain(behind(lambda h: h + h[jax.random.permutation(jax.random.key(0), B)], ALL)),
  "half of the data mixed": lambda p, x: plain(mlp)(p, x[:4] + x[4:]),
  "slices": slices,
  "carried": carried,
  "pairs": pairs,
  "sorted data": sorted_data,
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_nobody_can_tell_are_refused(name):
  auto = auto_masks()
  run = auto.wrap(REFUSED[name])
  with pytest.raises(ValueError, match=r"one row per example|A row of a mask"):
    run({**P, "masks": masks_of(auto)}, X)
  assert np.isfinite(run({**P, "masks": auto.masks}, X)).all()  # of one row for all it does not matter
