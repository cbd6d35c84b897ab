"""Primitives that are kept whole: random numbers, and everything that no rule knows."""

from collections.abc import Sequence

from fisherprune_jax._graph.checking import ask
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.registry import built_in, rule_for
from fisherprune_jax._graph.spec import Axes, Flops, Spec
from fisherprune_jax._types import Size

# Random bits depend on the whole shape; drawing them costs one operation per number.
RANDOM = """
  iota_2x32_shape philox2x32 philox4x32 random_bits random_clone random_fold_in random_gamma random_seed
  random_split random_unwrap random_wrap rng_bit_generator rng_uniform threefry2x32 threefry4x32
""".split()


# Not part of anybody's model, so nothing to speak of.
SILENT = """
  axis_index debug_callback debug_print dim_as_value empty empty2 platform_index shape_assertion
""".split()


def opaque(node: Node, reason: str, flops: tuple[Flops, ...] = (), counted: bool = True) -> Spec:
  """Every entry of every operand is needed, to the sign of its zeros, and every entry of the results is alive."""
  ins = _axes("i", [value.shape for value in node.ins])
  outs = _axes("o", [value.shape for value in node.outs])
  named = zip([f for axes in (*ins, *outs) for f in axes], _sizes(node), strict=True)
  sizes = {str(f): n for f, n in named}
  return Spec(
    ins,
    outs,
    sizes,
    whole=frozenset(sizes),
    flops=flops,
    counted=counted,
    opaque=reason,
    sees=frozenset(range(len(ins))),
  )


def _axes(side: str, shapes: Sequence[Sequence[Size]]) -> tuple[Axes, ...]:
  return tuple(tuple(f"{side}{i}.{k}" for k in range(len(shape))) for i, shape in enumerate(shapes))


def _sizes(node: Node) -> list[Size]:
  return [n for value in (*node.ins, *node.outs) for n in value.shape]


def random(node: Node, infos: Sequence[Info]) -> Spec:
  """Drawn whole and then selected from, so that the numbers stay those of the masked network."""
  draws = tuple(Flops(tuple(map(str, axes))) for axes in opaque(node, "").outs)
  return opaque(node, "", draws)


def spec_of(node: Node, infos: Sequence[Info]) -> Spec:
  """The ``Spec`` of a node by the rule for its primitive; one that no rule knows is kept whole."""
  rule = rule_for(node.name)
  spec = ask(rule, node, infos) if rule else None
  return opaque(node, unknown(node.name), counted=False) if spec is None else spec


def unknown(name: str) -> str:
  """The reason given for a primitive without a rule."""
  return f"no rule for {name}"


def silent(node: Node, infos: Sequence[Info]) -> Spec:
  """Kept whole without a word."""
  return opaque(node, "")


for name in SILENT:
  built_in(name, silent)
for name in RANDOM:
  built_in(name, random)
