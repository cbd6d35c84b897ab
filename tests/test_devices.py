"""Many devices: the same masks as on one, and no traffic but for the reduction of the scores."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisherprune_jax as fp
from tests import job
from tests.compiling import compiled, nothing_compiled
from tests.processes import run_two

FEATURES = 8 + 16
pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="eight host devices are made in conftest.py")


def mesh(axis_type=AxisType.Auto):
  return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


def replicated(mesh, tree):
  return jax.tree.map(lambda _: NamedSharding(mesh, P()), tree)


def fully_sharded(mesh, tree):
  """Every parameter, and what is like it, over all devices along its first axis that divides; masks whole."""

  def place(path, leaf):
    name = jax.tree_util.keystr(path)
    axes = [i for i, size in enumerate(jnp.shape(leaf)) if size % 8 == 0]
    if not axes or any(field in name for field in fp.FisherPruneState._fields):
      return NamedSharding(mesh, P())
    return NamedSharding(mesh, P(*[None] * axes[0], "data"))

  return jax.tree_util.tree_map_with_path(place, tree)


PLACES = {"data parallel": replicated, "fully sharded": fully_sharded}


def gathered(params, masks, batch):
  """The loss as fully sharded training states it: every device gathers the parameters and has its own rows."""
  whole = jax.tree.map(lambda p: jax.lax.with_sharding_constraint(p, NamedSharding(mesh(), P())), params)
  return job.loss_fn(whole, masks, batch)


def plain_step(params, opt_state, masks, batch):
  return job.plain_step(params, opt_state, masks, batch, gathered)


@pytest.fixture(params=PLACES)
def placed(request):
  """Transformation, parameters, state, and a function that puts a batch on the mesh."""
  devices, tx = mesh(), job.transformation()
  params, opt_state = job.start(tx)
  params, opt_state = (
    jax.device_put(tree, PLACES[request.param](devices, tree)) for tree in (params, opt_state)
  )
  return tx, params, opt_state, lambda n: jax.device_put(job.batch(n), NamedSharding(devices, P("data")))


def test_the_same_masks_at_every_step_under_jit(placed):
  tx, params, opt_state, batch = placed
  step = jax.jit(functools.partial(job.train_step, tx))
  for n, expected in enumerate(job.masks_on_one_device()):
    params, opt_state, _ = step(params, opt_state, batch(n))
    np.testing.assert_array_equal(job.flat_masks(opt_state), expected)
  assert 0 < expected.sum() < FEATURES


def test_shardings_stay_and_nothing_is_compiled_again(placed):
  tx, params, opt_state, batch = placed
  step = jax.jit(functools.partial(job.train_step, tx), donate_argnums=(0, 1))
  places = jax.tree.map(lambda x: x.sharding, (params, opt_state))
  batches = [batch(n) for n in range(4)]
  params, opt_state, _ = step(params, opt_state, batches[0])
  with nothing_compiled():
    for later in batches[1:]:
      params, opt_state, _ = step(params, opt_state, later)
  jax.tree.map(
    lambda x, place: (
      pytest.fail(f"{x.sharding} was {place}") if not x.sharding.is_equivalent_to(place, x.ndim) else None
    ),
    (params, opt_state),
    places,
  )


def test_only_the_scores_cross_devices_beside_the_gradients(placed):
  _, params, opt_state, batch = placed
  tx = job.transformation(method="fisher")
  masks = fp.get_masks(opt_state)
  plain = job.collectives(plain_step, params, opt_state[0], masks, batch(0))
  pruning = job.collectives(
    functools.partial(job.train_step, tx, loss_fn=gathered), params, opt_state, batch(0)
  )
  assert plain["all-reduce"] > 0
  assert pruning - plain == Counter({"all-reduce": FEATURES})
  assert not plain - pruning


def test_ranks_by_both_take_two_numbers_more_for_each_mask():
  """How many examples have gradients. Norms of replicated parameters are there on every device."""
  devices = mesh()
  params, opt_state = jax.device_put(job.start(job.transformation()), NamedSharding(devices, P()))
  batch = jax.device_put(job.batch(0), NamedSharding(devices, P("data")))
  found = [
    job.collectives(
      functools.partial(job.train_step, job.transformation(method=method)), params, opt_state, batch
    )
    for method in ("fisher", "fisher_magnitude")
  ]
  assert found[1] - found[0] == Counter({"all-reduce": 2 * len(jax.tree.leaves(fp.get_masks(opt_state)))})
  assert not found[0] - found[1]


MAPPED = {"accounted": True, "unaccounted": False}


def sharded_step(tx, check_vma, reduce_masks=False):
  """A step under ``shard_map``: every device has its rows of the batch, and its own copy of the rest."""

  def local(params, opt_state, batch):
    loss, (grads, mask_grads) = fp.value_and_mask_grads(job.loss_fn)(params, fp.get_masks(opt_state), batch)
    if check_vma:  # JAX has added up the gradients of what is the same on every device
      grads = jax.tree.map(lambda g: g / jax.lax.axis_size("data"), grads)
    else:
      grads = jax.lax.pmean(grads, "data")
    if reduce_masks:
      mask_grads = jax.lax.pmean(mask_grads, "data")
    updates, opt_state = tx.update(grads, opt_state, params, mask_grads=mask_grads)
    return optax.apply_updates(params, updates), opt_state, jax.lax.pmean(loss, "data")

  out = P(), P(), P()
  return jax.shard_map(local, mesh=mesh(), in_specs=(P(), P(), P("data")), out_specs=out, check_vma=check_vma)


def sharded_plain_step(check_vma):
  def local(params, opt_state, masks, batch):
    loss, grads = jax.value_and_grad(job.loss_fn)(params, masks, batch)
    grads = jax.tree.map(lambda g: g / 8, grads) if check_vma else jax.lax.pmean(grads, "data")
    updates, opt_state = optax.adam(1e-2).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, jax.lax.pmean(loss, "data")

  specs = P(), P(), P(), P("data")
  return jax.shard_map(local, mesh=mesh(), in_specs=specs, out_specs=(P(), P(), P()), check_vma=check_vma)


@pytest.mark.parametrize("check_vma", MAPPED.values(), ids=MAPPED)
def test_the_same_masks_at_every_step_under_shard_map(check_vma):
  tx = job.transformation(axis_name="data")
  params, opt_state = job.start(tx)
  step = jax.jit(sharded_step(tx, check_vma))
  all_expected = job.masks_on_one_device()
  batches = [job.batch(n) for n in range(len(all_expected))]
  for n, expected in enumerate(all_expected):
    with compiled() as events:
      params, opt_state, _ = step(params, opt_state, batches[n])
    assert bool(events) == (n < 2)  # host arrays first, then what the step returns
    np.testing.assert_array_equal(job.flat_masks(opt_state), expected)


@pytest.mark.parametrize("check_vma", MAPPED.values(), ids=MAPPED)
def test_only_the_scores_cross_devices_under_shard_map(check_vma):
  tx = job.transformation(axis_name="data", method="fisher")
  params, opt_state = job.start(tx)
  plain = job.collectives(
    sharded_plain_step(check_vma), params, opt_state[0], fp.get_masks(opt_state), job.batch(0)
  )
  pruning = job.collectives(sharded_step(tx, check_vma), params, opt_state, job.batch(0))
  assert plain["all-reduce"] > 0
  assert pruning - plain == Counter({"all-reduce": FEATURES + 1})  # and the number of examples
  assert not plain - pruning


def test_without_axis_name_shard_map_is_refused():
  tx = job.transformation()
  with pytest.raises(
    ValueError, match=r"differ over, \['data'\], got axis_name=None. Pass .*axis_name='data'"
  ):
    jax.eval_shape(sharded_step(tx, True), *job.start(tx), job.batch(0))


def test_mask_gradients_that_were_reduced_over_devices_are_refused():
  tx = job.transformation(axis_name="data")
  with pytest.raises(ValueError, match="reduced already"):
    jax.eval_shape(sharded_step(tx, True, reduce_masks=True), *job.start(tx), job.batch(0))


def test_mask_gradients_that_were_reduced_over_examples_are_refused():
  tx = job.transformation()
  params, opt_state = job.start(tx)
  reduced = jax.tree.map(lambda m: jnp.ones(m.shape), fp.get_masks(opt_state))
  with pytest.raises(ValueError, match=r"must have shape \('B', 8\), one row per example, got \(8,\)"):
    tx.update(params, opt_state, params, mask_grads=reduced)


def explicitly_placed(spec):
  """The job on a mesh whose shardings are part of the types, as ``jax.make_mesh`` makes it."""
  devices, tx = mesh(AxisType.Explicit), job.transformation()
  params, opt_state = jax.device_put(job.start(tx), NamedSharding(devices, P()))
  state = opt_state[1]._replace(masks=jax.device_put(opt_state[1].masks, NamedSharding(devices, spec)))
  return devices, tx, params, (opt_state[0], state)


def test_the_same_masks_on_an_explicit_mesh():
  devices, tx, params, opt_state = explicitly_placed(P())
  traces = []

  @jax.jit
  def step(*args):
    traces.append(1)
    return job.train_step(tx, *args)

  with jax.set_mesh(devices):
    for n, expected in enumerate(job.masks_on_one_device()):
      rows = jax.device_put(job.batch(n), NamedSharding(devices, P("data")))
      params, opt_state, _ = step(params, opt_state, rows)
      np.testing.assert_array_equal(job.flat_masks(opt_state), expected)
  assert len(traces) == 1


def test_a_mesh_that_splits_masks_is_refused():
  devices, tx, params, opt_state = explicitly_placed(P("data"))
  grads = jax.tree.map(lambda m: jnp.ones((4, *m.shape)), job.variables()["masks"])
  with pytest.raises(ValueError, match=r"must be replicated.*PartitionSpec\(\)"):
    tx.update(params, opt_state, params, mask_grads=grads)
  with jax.set_mesh(devices), pytest.raises(ValueError, match=r"must be replicated.*PartitionSpec\(\)"):
    jax.jit(lambda *args: tx.update(*args, mask_grads=grads))(params, opt_state, params)


def test_where_a_split_cannot_be_seen_it_does_no_harm():
  """An automatic mesh hides its splits from the trace: the masks are the same, they only travel."""
  devices, tx = mesh(), job.transformation()
  params, opt_state = job.start(tx)
  state = jax.device_put(opt_state[1].masks, NamedSharding(devices, P("data")))
  opt_state = (opt_state[0], opt_state[1]._replace(masks=state))
  step = jax.jit(functools.partial(job.train_step, tx))
  for n, expected in enumerate(job.masks_on_one_device()):
    params, opt_state, _ = step(params, opt_state, job.batch(n))
    np.testing.assert_array_equal(job.flat_masks(opt_state), expected)


def test_two_processes_prune_the_same_features(tmp_path):
  """``jax.distributed`` on the loopback interface, two devices in each process."""
  outs = run_two("tests.processes", tmp_path, devices=2)
  first, second = (np.load(out, allow_pickle=True) for out in outs)
  np.testing.assert_array_equal(first["masks"], job.masks_on_one_device())
  np.testing.assert_array_equal(first["masks"], second["masks"])
  np.testing.assert_array_equal(first["bias"], second["bias"])
  assert first["collectives"].item() == {
    "all-reduce": FEATURES + 4
  }  # and how many examples have gradients, by mask
