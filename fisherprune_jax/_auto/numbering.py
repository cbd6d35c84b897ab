"""The rows of per-example masks in each array, so that row n belongs to example n everywhere."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherprune_jax._auto.atoms import Atom
from fisherprune_jax._auto.examples import Examples
from fisherprune_jax._auto.forms import Form
from fisherprune_jax._auto.laying import Spots
from fisherprune_jax._auto.rows import FIRST, Rows
from fisherprune_jax._graph.program import Node, Value

REMEDY = (
  "Permute or mix the data before any variable is involved, or leave the group out: fp.auto_mask(..., select=...). Masks "
  "without an example axis, such as auto.masks, work anywhere."
)


class Numbering:
  """The rows of per-example masks in every array; ``label`` is the atom of examples."""

  def __init__(self, form: Form, axes: Sequence[int | None], count: int) -> None:
    self.label = Atom(count)
    self._examples = Examples(form.axes.live, count)
    args = form.program.inputs[len(form.variables) :]
    self._examples.start(form.variables, args[: len(axes)], axes)
    self._examples.walk(form.program)
    self._rank: np.ndarray | None = None

  def tells(self, value: Value) -> bool:
    """Whether an array's examples are known."""
    rows = self._examples.of(value).rows
    return len(rows) == 1 and rows[0].index is not None

  def settle(self, plan: Mapping[Node, Sequence[Any]], names: Mapping[Atom, str]) -> None:
    """Check that each row of a mask has one example at all its sites, and number examples like the data."""
    bases: dict[str, tuple[frozenset[Any], Node]] = {}
    orders = set()
    for node, sites in plan.items():
      for site in sites:
        rows = self._rows(node.ins[site.tells], node)
        orders.add(rows.order)
        for name in (names[leaf] for leaf in site.leaves):
          base, before = bases.setdefault(name, (rows.base, node))
          if base != rows.base:
            raise ValueError(
              "A row of a mask must belong to one example wherever the mask stands, but the examples are in different orders "
              f"at {before.source} and at {node.source}, which both sum over group {name!r}: {_stirred(base | rows.base)} "
              f"orders them by what the data holds. {REMEDY}"
            )
    if len(orders) == 1 and (order := orders.pop()) is not None:
      self._rank = np.append(np.argsort(order), -1)

  def spots(
    self, value: Value, node: Node, iterations: Mapping[Node, jax.Array], read: Callable[[Value], Any]
  ) -> Spots:
    """The examples of an operand in one iteration of the loops around it; ``read`` gives other arrays."""
    rows = self._rows(value, node)
    index = rows.index if self._rank is None else self._rank[rows.index]
    assert index is not None
    axes = tuple(key for key in rows.keys if isinstance(key, int))
    if rows.via:
      return Spots(self.label, axes, _picked(jnp.asarray(index, jnp.int32), map(read, rows.via)))
    if rows.keys == axes and len(axes) == 1 and np.array_equal(index, np.arange(self.label.size)):
      return Spots(self.label, axes, None)
    around = [at for at, key in enumerate(rows.keys) if isinstance(key, Node)]
    index = np.moveaxis(index, around, range(len(around)))
    array = jnp.asarray(index, jnp.int32)
    return Spots(
      self.label, axes, array[tuple(iterations[rows.keys[at]] for at in around)] if around else array
    )

  def _rows(self, value: Value, node: Node) -> Rows:
    found = self._examples.of(value).rows
    where = f"an array of shape {value.shape} at {node.source}"
    hidden = next((rows for rows in found if rows.index is None), None)
    if hidden is not None:
      what = f"{hidden.why.name} at {hidden.why.source}" if hidden.why else "an index of too many entries"
      raise ValueError(
        f"Masks of one row per example must meet arrays in which each row belongs to a known example, got {where}. "
        f"The examples cannot be followed through {what}, which permutes or mixes them. {REMEDY}"
      )
    if len(found) > 1:
      raise ValueError(
        f"Masks of one row per example must meet arrays with one example in each row, got {where} that pairs examples "
        f"with each other. {REMEDY}"
      )
    if not found:
      raise ValueError(
        f"Masks of one row per example must meet arrays of examples, got {where} that has no example axis. Say where "
        "the arguments have theirs: fp.auto_mask(..., batch_axes=...), auto.wrap(fn, batch_axes=...). (A "
        "primitive without a rule hides them: fp.register_rule.)"
      )
    return found[0]


def _picked(index: jax.Array, orders: Iterable[jax.Array]) -> jax.Array:
  """An index, picked from by positions; negative ones count from the end."""
  for order in orders:
    flat = order.reshape(-1)
    index = jnp.take(index, jnp.where(flat < 0, flat + index.size, flat), mode="clip")
  return index


def _stirred(base: frozenset[Any]) -> str:
  causes = [cause for cause in base - FIRST if isinstance(cause, Node)]
  return f"{causes[0].name} at {causes[0].source}" if causes else "an index"
