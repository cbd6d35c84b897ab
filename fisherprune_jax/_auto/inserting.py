"""Runs a program with masks before the sums over groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fisherprune_jax._auto.atoms import Atom, leaves
from fisherprune_jax._auto.forms import Form
from fisherprune_jax._auto.laying import Laid, along, lay, lay_whole
from fisherprune_jax._auto.matching import Matched
from fisherprune_jax._auto.numbering import Numbering
from fisherprune_jax._graph import compat
from fisherprune_jax._graph.program import Node, Program, Value


class Masks(NamedTuple):
  """The mask of each leaf, and the number of the iteration of each loop around."""

  laid: Mapping[Atom, Laid]
  iterations: Mapping[Node, Any] = MappingProxyType({})


class Site(NamedTuple):
  """An operand of a node that masks of some leaves multiply, along one axis or as a whole.

  Attributes:
    operand: the operand, by position.
    axis: its axis, or None.
    leaves: the leaves of the masks.
    picker: the operand that picks rows of this one, if it is a table.
  """

  operand: int
  axis: int | None
  leaves: tuple[Atom, ...]
  picker: int | None = None

  @property
  def tells(self) -> int:
    """The operand that has the examples."""
    return self.operand if self.picker is None else self.picker


Plan = dict[Node, list[Site]]


def plan_of(form: Form, found: Matched, numbering: Numbering | None) -> Plan:
  """The sites of masks: one operand of every node that sums over their leaves, and the ends of residual branches."""
  plan: Plan = {}
  chosen = found.leaves
  for branch, atom in found.branches:
    plan.setdefault(branch.node, []).append(Site(branch.operand, None, (atom,)))
  for reader in form.axes.readers:
    wanted = [leaf for leaf in dict.fromkeys(leaves(reader.atom)) if leaf in chosen]
    if not wanted:
      continue
    operand, axis = max(reader.places, key=lambda place: _merit(form, numbering, reader.node, place, wanted))
    sites = plan.setdefault(reader.node, [])
    same = next((site for site in sites if (site.operand, site.axis) == (operand, axis)), None)
    if same is not None:
      sites.remove(same)
      wanted = list(dict.fromkeys((*same.leaves, *wanted)))
    sites.append(Site(operand, axis, tuple(wanted), reader.picker))
  return plan


def _merit(
  form: Form, numbering: Numbering | None, node: Node, place: tuple[int, int], wanted: Sequence[Atom]
) -> tuple[bool, bool]:
  """Whether an operand's axis has all the leaves, and whether its examples are known."""
  operand, axis = place
  has = leaves(form.axes.operand(node, operand)[axis])
  tells = numbering is not None and numbering.tells(node.ins[operand])
  return all(leaf in has for leaf in wanted), tells


@dataclass(eq=False)
class Masked:
  """A form, run with masks inserted by a plan."""

  form: Form
  plan: Plan
  numbering: Numbering | None = None
  _inside: dict[Node, bool] = field(default_factory=dict)

  def __call__(self, inputs: Sequence[Any], masks: Masks) -> Any:
    """The result of the function, from flat inputs."""
    program = self.form.program
    return jax.tree.unflatten(self.form.out_tree, self.run(program, [*inputs, *self.form.captured], masks))

  def run(self, program: Program, inputs: Sequence[Any], masks: Masks, depth: int = 0) -> list[Any]:
    """The outputs of a program inside of ``depth`` calls."""
    env: dict[Value, Any] = dict(zip(program.inputs, inputs, strict=True))
    env.update(program.consts)
    made: dict[tuple[Value, tuple[Site, ...]], Any] = {}

    def read(value: Value) -> Any:
      return env[value] if value.literal is None else value.literal

    for node in program.nodes:
      arrays = [read(value) for value in node.ins]
      with compat.located(node.eqn, node.callers[depth:]):
        for operand, value in enumerate(node.ins):
          sites = tuple(
            site._replace(operand=0) for site in self.plan.get(node, ()) if site.operand == operand
          )
          if sites and not self._is_of_rows(sites):
            if (value, sites) not in made:
              atoms = self.form.axes.operand(node, operand)
              spots = self.numbering.spots(value, node, masks.iterations, read) if self.numbering else None
              made[value, sites] = self._mask(arrays[operand], atoms, sites, masks, node, spots)
            arrays[operand] = made[value, sites]
        outs = self._apply(node, arrays, masks)
        for site in self.plan.get(node, ()):
          if self._is_of_rows((site,)):
            outs = [self._mask_rows(node, outs[0], arrays[1], site, masks, read)]
        env.update(zip(node.outs, outs, strict=True))
    return [read(value) for value in program.outputs]

  def _mask(
    self, array: Any, atoms: Sequence[Atom], sites: Sequence[Site], masks: Masks, node: Node, spots: Any
  ) -> Any:
    """An array times masks, in float32 or wider."""
    wide = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    for _, axis, wanted, _ in sites:
      chosen = {leaf: masks.laid[leaf] for leaf in wanted}
      mask, missing = lay(chosen, axis, atoms, spots) if axis is not None else lay_whole(chosen, atoms, spots)
      if missing:
        raise ValueError(
          f"Masks of one row per layer must meet arrays of layers, got an array of shape {array.shape} at "
          f"{node.source} outside of the loop."
        )
      wide = wide * mask.astype(wide.dtype)
    return wide.astype(array.dtype)

  def _is_of_rows(self, sites: Sequence[Site]) -> bool:
    """Whether masks of one row per example meet a table: they multiply what is read from it."""
    return self.numbering is not None and any(site.picker is not None for site in sites)

  def _mask_rows(self, node: Node, out: Any, index: Any, site: Site, masks: Masks, read: Any) -> Any:
    """What is read from a table, times the masks of its rows for each example."""
    assert self.numbering is not None
    assert site.axis is not None
    atom = self.form.axes.operand(node, site.operand)[site.axis]
    mask = along(atom, {leaf: masks.laid[leaf] for leaf in site.leaves})
    assert mask is not None
    if mask.labels != (self.numbering.label,):
      raise ValueError(
        f"Masks of rows must be those of tables outside of loops, got one per iteration at {node.source}. Leave the group "
        "out: fp.auto_mask(..., select=...)."
      )
    spots = self.numbering.spots(node.ins[1], node, masks.iterations, read)
    rows = jnp.clip(index[..., 0], 0, len(mask.array) - 1)
    examples = spots.index if spots.index is not None else jnp.arange(mask.array.shape[1])
    others = [at for at in range(rows.ndim) if at not in spots.axes]
    examples = jnp.broadcast_to(jnp.expand_dims(examples, others), rows.shape)
    factors = jnp.where(examples < 0, 1, mask.array[rows, jnp.maximum(examples, 0)])
    factors = jnp.expand_dims(factors, node.params["dimension_numbers"].offset_dims)
    dtype = jnp.promote_types(out.dtype, jnp.float32)
    return (out.astype(dtype) * factors.astype(dtype)).astype(out.dtype)

  def _apply(self, node: Node, arrays: Sequence[Any], masks: Masks) -> Sequence[Any]:
    """The results of a node; if masks are inside, its sub-programs are run."""
    if not self._masks_inside(node):
      return compat.bind(node.eqn, arrays)
    return INSIDE[node.name](self, node, arrays, masks)

  def _masks_inside(self, node: Node) -> bool:
    if node not in self._inside:
      programs = self.form.axes.live.subs.get(node, []) if node.name in INSIDE else []
      self._inside[node] = any(
        inner in self.plan or self._masks_inside(inner) for program in programs for inner in program.nodes
      )
    return self._inside[node]

  def inner(self, node: Node, inputs: Sequence[Any], masks: Masks, at: int = 0) -> list[Any]:
    return self.run(self.form.axes.live.subs[node][at], inputs, masks, len(node.callers) + 1)


def _scan(masked: Masked, node: Node, arrays: Sequence[Any], masks: Masks) -> Sequence[Any]:
  consts, carry = compat.scan_counts(node.params)
  fixed, start, stacked = arrays[:consts], arrays[consts : consts + carry], arrays[consts + carry :]
  iterations = masked.form.axes.iterations.get(node)
  iterations = iterations and iterations.root()
  rows = {
    leaf: _by_iteration(mask, iterations) for leaf, mask in masks.laid.items() if iterations in mask.labels
  }

  def iteration(
    carried: Sequence[Any], each: tuple[Sequence[Any], dict[int, Any], Any]
  ) -> tuple[list[Any], list[Any]]:
    xs, row, number = each
    mine = {leaf: Laid(row[at], mask.labels) for at, (leaf, mask) in enumerate(rows.items())}
    inner = Masks({**masks.laid, **mine}, {**masks.iterations, node: number})
    outs = masked.inner(node, [*fixed, *carried, *xs], inner)
    return outs[:carry], outs[carry:]

  options = {name: node.params[name] for name in ("length", "reverse", "unroll")}
  numbers = jnp.arange(node.params["length"])
  each = (list(stacked), {at: mask.array for at, mask in enumerate(rows.values())}, numbers)
  carried, written = lax.scan(iteration, list(start), each, **options)
  return [*carried, *written]


def _by_iteration(mask: Laid, iterations: Atom | None) -> Laid:
  """A mask with the axis of iterations first, without its label."""
  assert iterations is not None
  at = mask.labels.index(iterations)
  return Laid(jnp.moveaxis(mask.array, at, 0), (*mask.labels[:at], *mask.labels[at + 1 :]))


def _while(masked: Masked, node: Node, arrays: Sequence[Any], masks: Masks) -> Sequence[Any]:
  first, consts = node.params["cond_nconsts"], node.params["body_nconsts"]
  of_cond, of_body, start = arrays[:first], arrays[first : first + consts], arrays[first + consts :]
  return lax.while_loop(
    lambda carried: masked.inner(node, [*of_cond, *carried], masks, 0)[0],
    lambda carried: masked.inner(node, [*of_body, *carried], masks, 1),
    list(start),
  )


def _cond(masked: Masked, node: Node, arrays: Sequence[Any], masks: Masks) -> Sequence[Any]:
  index, *operands = arrays

  def branch(at: int) -> Any:
    return lambda *xs: masked.inner(node, xs, masks, at)

  branches = [branch(at) for at in range(len(node.params["branches"]))]
  if len(branches) == 2:
    return lax.cond(index.astype(bool), branches[1], branches[0], *operands)
  return lax.switch(index, branches, *operands)


def _checkpoint(masked: Masked, node: Node, arrays: Sequence[Any], masks: Masks) -> Sequence[Any]:
  options = {name: node.params[name] for name in ("policy", "prevent_cse")}
  return jax.checkpoint(lambda *xs: masked.inner(node, xs, masks), **options)(*arrays)


INSIDE = {
  "scan": _scan,
  "while": _while,
  "cond": _cond,
  **dict.fromkeys(("remat", "remat2", "checkpoint"), _checkpoint),
}
"""Primitives whose sub-programs can hold masks; functions with derivative rules are masked at the call."""
