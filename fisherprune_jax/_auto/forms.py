"""A function of variables, traced: the atoms of its axes."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import jax

from fisherprune_jax._auto.atoms import Atom, block, tie
from fisherprune_jax._auto.axes import OUTPUT, Axes
from fisherprune_jax._auto.data import ARGUMENT, made_of
from fisherprune_jax._errors import is_traced
from fisherprune_jax._graph.boxes import whole_box
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.liveness import Liveness
from fisherprune_jax._graph.program import Program, Value, trace
from fisherprune_jax._graph.rules import spec_of
from fisherprune_jax._graph.traced import replaced_by
from fisherprune_jax._types import Picker, PyTree

EXAMPLES = "it is an axis of examples"


@dataclass(frozen=True, eq=False)
class Form:
  """One function of the variables, at given shapes.

  Attributes:
    program: the traced program.
    out_tree: the structure of its result.
    axes: the atoms of all arrays.
    variables: the values of the variables' leaves.
    examples: the atom of all example axes.
    captured: tracers that the function closes over, as inputs after the arguments.
    state: the positions of variables that are another value at each call.
  """

  program: Program
  out_tree: Any
  axes: Axes
  variables: list[Value]
  examples: Atom
  captured: list[Any]
  state: AbstractSet[int]


def study(
  fn: Callable[..., PyTree],
  variables: PyTree,
  args: Sequence[PyTree],
  example_axes: Sequence[int | None],
  rows: bool = False,
  state: AbstractSet[int] = frozenset(),
  state_from: Picker | None = None,
) -> Form:
  """Trace ``fn(variables, *args)`` and tie its axes.

  Args:
    fn: the function.
    variables: its variables.
    args: its other arguments.
    example_axes: an axis or None for each leaf of ``args``.
    rows: whether rows of tables may be masked.
    state: the positions of variables that are another value at each call, such as caches.
    state_from: picks new values of variables from the output; these variables are state, too.
  """
  program, out_tree = trace(
    fn, variables, *args
  )  # unchanged arguments: their types carry how they vary over devices
  captured = [const for _, const in program.consts if is_traced(const)]
  program.inputs += [value for value, const in program.consts if is_traced(const)]
  program.consts[:] = [(value, const) for value, const in program.consts if not is_traced(const)]
  count = len(jax.tree.leaves(variables))
  live = Liveness(spec_of)
  paths = jax.tree_util.tree_leaves_with_path(variables)
  updates = replaced_by(state_from, out_tree, paths) if state_from else {}
  state = state | {*updates.values()}
  varies = [at >= count or at in state for at in range(len(program.inputs))]
  live.forward(
    program, [Info(whole_box(v.shape), varies=x) for v, x in zip(program.inputs, varies, strict=True)]
  )
  given = program.inputs[:count]
  axes = Axes(live, made_of(program, given, live), rows)
  axes.learned.update((value, (value,)) for at, value in enumerate(given) if at not in state)
  examples = _examples(axes, program.inputs[count:], example_axes)
  axes.walk(program)
  axes.hand_on(examples, program.inputs[count:])
  block(examples, EXAMPLES)
  axes.block_all(program.inputs[count:], ARGUMENT)
  for at, value in enumerate(program.outputs):
    if at not in updates:
      axes.block_all([value], OUTPUT)
    elif value.literal is None:
      for new, old in zip(axes.of(value), axes.of(given[updates[at]]), strict=True):
        tie(new, old)
  return Form(program, jax.tree.structure(out_tree), axes, given, examples, captured, state)


def _examples(axes: Axes, inputs: Sequence[Value], example_axes: Sequence[int | None]) -> Atom:
  found = [axes.of(value)[at] for value, at in zip(inputs, example_axes, strict=False) if at is not None]
  for other in found[1:]:
    tie(found[0], other)
  return found[0] if found else Atom(1)
