"""What is known of an array, and what a node makes of it by its spec."""

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fisherprune_jax._graph import compat, presence, sets, together, windows
from fisherprune_jax._graph.boxes import Box, Where, empty_box, hull, join, united, whole_box
from fisherprune_jax._graph.joint import Together
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.sets import Set
from fisherprune_jax._graph.spec import Axes, Factor, Pick, Spec, Sum, compose, factors_of, project
from fisherprune_jax._types import Shape

Factors = dict[Factor, Set]
LARGEST_KNOWN = 65_536
"""The largest arrays of integers and booleans that are tracked by value."""


class Info(NamedTuple):
  """What is known of an array before it is computed.

  Attributes:
    possible: per axis, where it may be non-zero.
    const: its value, if all entries are one known number.
    mask: whether it is one wherever ``possible`` and ``when`` allow non-zeros.
    varies: whether it depends on arguments, not only on variables.
    known: the value of a small integer or boolean array, if no input decides it.
    layers: what is known of each layer of a stack of masks.
    together: where it may be non-zero along joint axes, if less than ``possible``.
    when: the condition that it may be non-zero at all.
  """

  possible: Box
  const: Any = None
  mask: bool = False
  varies: bool = False
  known: np.ndarray | None = None
  layers: "tuple[Info, ...] | None" = None
  together: Together = MappingProxyType({})
  when: Set = sets.ALWAYS

  @property
  def is_zero(self) -> bool:
    return self.const is not None and not self.const

  @property
  def is_masked(self) -> bool:
    """Whether masks decide where it may be non-zero."""
    return any(s.support for s in (*self.possible, self.when))

  @property
  def where(self) -> Where:
    """Where it may be non-zero; for constants, the box."""
    return Where(self.possible, self.together, self.when)

  @property
  def nonzero(self) -> Where:
    """Where it may be non-zero; nowhere for a constant zero."""
    if not self.is_zero:
      return self.where
    return Where(empty_box([s.size for s in self.possible]), when=sets.NEVER)


def info_of(where: Where, varies: bool) -> Info:
  return Info(where.box, varies=varies, together=where.together, when=where.when)


def either(a: Info, b: Info) -> Info:
  """What is known of an array that is one or the other."""
  return info_of(join(a.where, b.where), a.varies or b.varies)


def box_of(axes: Axes, factors: Factors, shape: Shape) -> Box:
  return tuple(compose(axis, factors, n) for axis, n in zip(axes, shape, strict=True))


def constant(value: Any, shape: tuple[Any, ...]) -> Info:
  """What is known of an array written into the program."""
  return Info(whole_box(shape), compat.number(value) if shape == () else None, known=_known(value))


def results(node: Node, spec: Spec, infos: Sequence[Info]) -> list[Info]:
  """The forward pass of one node."""
  factors, sums = _can_be_nonzero(spec, infos)
  varies = any(info.varies for info in infos)
  tied = together.forward(spec, [(info.possible, info.together) for info in infos])
  found = [
    Where(
      *together.laid(spec, tied, axes, box_of(axes, factors, out.shape), factors),
      sets.every(
        *presence.of_operands(spec, infos, at, factors), *([sums] if spec.roles.vanishing[at] else ())
      ),
    )
    for at, (axes, out) in enumerate(zip(spec.outs, node.outs, strict=True))
  ]
  if (taken := _layers_taken(spec, infos)) is not None:
    return [taken]
  known = fold(node, [info.known for info in infos])
  if spec.moves:
    first, ((box, axes, when),) = infos[0], found
    mask = first.mask and _is_exact(spec, factors, first)
    return [Info(box, first.const, mask, varies, known, None, axes, when)]
  mask = all(info.mask for info in infos) if spec.same_as is not None else _are_masks_end_to_end(spec, infos)
  return [Info(box, None, mask, varies, known, None, axes, when) for box, axes, when in found]


def _are_masks_end_to_end(spec: Spec, infos: Sequence[Info]) -> bool:
  """Whether a node lays masks and ones end to end, each one wherever its box allows."""
  parts = [axes[0] for axes in spec.ins if len(axes) == 1 and isinstance(axes[0], str)]
  ends = len(parts) == len(infos) and spec.outs == ((Sum(tuple(parts)),),)
  return ends and all(info.mask or _is_one(info.const) for info in infos)


def _is_one(const: Any) -> bool:
  return const is not None and bool(const == 1)


def stack_of(layers: Sequence[Info]) -> Info:
  """What is known of a stack of layers."""
  box = (*whole_box((len(layers),)), *hull(*(info.possible for info in layers)))
  when = sets.union(*(info.when for info in layers))
  return Info(box, varies=any(info.varies for info in layers), layers=tuple(layers), when=when)


def _layers_taken(spec: Spec, infos: Sequence[Info]) -> Info | None:
  """What is known of some layers of a stack, if a slice takes just these."""
  layers = infos[0].layers if infos else None
  if layers is None or not spec.outs or spec.alive or len(spec.outs[0]) != len(infos[0].possible):
    return None
  first, *rest = spec.outs[0]
  if not isinstance(first, Pick) or any(isinstance(axis, Pick) for axis in rest) or (first.index < 0).any():
    return None
  layer, *others = [layers[at] for at in first.index]
  if others:
    return stack_of([layer, *others])
  return layer._replace(possible=(*whole_box((1,)), *layer.possible), varies=infos[0].varies, layers=None)


def _known(x: Any) -> np.ndarray | None:
  """A small known array of integers (indices) or booleans."""
  if not compat.is_concrete(x) or np.size(x) > LARGEST_KNOWN:
    return None
  return np.asarray(x) if _is_followed(compat.dtype_of(x)) else None


def _is_followed(dtype: Any) -> bool:
  return bool(jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_))


def fold(node: Node, known: Sequence[np.ndarray | None]) -> np.ndarray | None:
  """The value of a node that computes small integers from known ones."""
  if node.acts or len(node.outs) != 1:
    return None
  (out,) = node.outs
  small = all(map(compat.is_static_size, out.shape)) and math.prod(out.shape) <= LARGEST_KNOWN
  if not node.ins and node.name != "iota":
    return None  # such as the value of a symbolic size
  given = [value for value in known if value is not None]
  if not small or not _is_followed(out.aval.dtype) or len(given) < len(known):
    return None
  return compat.evaluate(node.eqn, given)


def _is_exact(spec: Spec, factors: Factors, info: Info) -> bool:
  """Whether a moved array is still non-zero exactly where its box allows."""
  return all(
    compose(axis, factors, s.size) is s or (axis is None and 0 in spec.kills)
    for axis, s in zip(spec.ins[0], info.possible, strict=True)
  )


# Soundness, first half: outside of the boxes found here, arrays are zero for all variables and arguments. By induction,
# as rules promise for factors neither `alive` nor `whole`: results are zero where all operands with the factor are (but
# for `neutral` ones), and where one in `kills` is. A constant zero adds nothing to other operands. Conditions follow
# likewise (`Roles`, presence.py): a result is empty if an operand that decides it is empty along any axis, if a sum has
# no term left, or if all added operands are empty. The whole argument and its limits (derivative rules, signs of zeros,
# NaN and infinity) are in docs/design.md.
def _can_be_nonzero(spec: Spec, infos: Sequence[Info]) -> tuple[Factors, Set]:
  """Per factor, where results (if summed, terms) may be non-zero; and when a sum may."""
  roles = spec.roles
  shown = [
    _of_factors(spec, axes, info.possible) if at not in spec.neutral else {}
    for at, (axes, info) in enumerate(zip(spec.ins, infos, strict=True))
  ]
  sums, when = _added(spec, infos, shown) if roles.adding else ({}, sets.ALWAYS)
  found = {}
  for f, size in spec.sizes.items():
    givers = roles.givers.get(f, ())
    if f in spec.whole:
      found[f] = sets.everything(size)
    elif killing := [shown[i][f] for i in givers if f in roles.summed or i in spec.kills]:
      found[f] = sets.intersection(*killing)
    elif f not in roles.keeping:
      found[f] = sets.everything(size)
    elif f in sums and roles.adding.issuperset(givers):
      found[f] = sums[f]
    else:
      found[f] = sets.union(*(shown[i][f] for i in givers))
  return found | _seen_through(spec, shown), when


def _seen_through(spec: Spec, shown: Sequence[Factors]) -> Factors:
  found = {}
  for window in spec.windows:
    entries = [one[window.entries] for one in shown if window.entries in one]
    if entries and window.places not in spec.alive:
      found[window.places] = window.looking(sets.union(*entries))
  return found


def _of_factors(spec: Spec, axes: Axes, box: Box) -> Factors:
  found: Factors = {}
  for axis, s in zip(axes, box, strict=True):
    for f in factors_of(axis):
      one = project(axis, s, f, spec.sizes)
      found[f] = sets.union(found[f], one) if f in found else one
  return found


def _added(spec: Spec, infos: Sequence[Info], shown: Sequence[Factors]) -> tuple[Factors, Set]:
  """Where and when added operands may be non-zero, without constant zeros."""
  roles, parts = spec.roles, []
  for i in [i for i in sorted(roles.adding) if not infos[i].is_zero] or sorted(roles.adding):
    own = {f: s for f, s in shown[i].items() if f in roles.keeping and f not in roles.summed}
    axes = zip(spec.ins[i], infos[i].possible, strict=True)
    others = [s for axis, s in axes if own.keys().isdisjoint(factors_of(axis))]
    parts.append((sets.every(infos[i].when, *presence.inhabited(others)), own))
  return united(parts)


# Soundness, second half: stored results depend only on the entries of operands found here. A factor of a result is
# needed where the result is stored. A factor that no result has is summed over: terms are zero unless all operands with
# the factor may be non-zero. An entry that is not stored is zero by the first half, or not demanded; so readers may see
# it as zero. A node with nothing stored does not run, and demands nothing. A window works on its full axis, but needs
# no entries that only undemanded places read.
def needed(spec: Spec, infos: Sequence[Info], results: Sequence[Where | None]) -> Factors:
  """The backward pass of one node: the entries of its factors that it works on, if it runs.

  ``results`` has what is stored of each; None if not demanded.
  """
  demanded = [
    (where.when, _of_factors(spec, axes, where.box))
    for axes, where in zip(spec.outs, results, strict=True)
    if where is not None
  ]
  found = demanded[0][1] if len(demanded) == 1 else united(demanded)[0] if demanded else {}
  offered = (
    [_of_factors(spec, axes, info.possible) for axes, info in zip(spec.ins, infos, strict=True)]
    if spec.roles.summed
    else []
  )
  return {f: _needed(f, spec, found, offered) for f in spec.sizes}


def _needed(factor: Factor, spec: Spec, demanded: Factors, offered: Sequence[Factors]) -> Set:
  size = spec.sizes[factor]
  if factor in spec.whole:
    return sets.everything(size)
  if factor not in spec.roles.summed:
    return demanded[factor] if factor in demanded else sets.nothing(size)
  terms = sets.intersection(*(s[factor] for s in offered if factor in s))
  return sets.intersection(sets.weak(size), terms) if factor in spec.weak else terms


def demanded_of_operands(spec: Spec, factors: Factors, results: Sequence[Where | None]) -> Factors:
  """What a node demands of operands, by factor; along windows, only what results depend on."""
  if not spec.windows:
    return factors
  pairs = zip(spec.outs, results, strict=True)
  return windows.demanded(spec.windows, factors, [_of_factors(spec, axes, r.box) for axes, r in pairs if r])
