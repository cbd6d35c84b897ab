"""Primitives kept whole: random numbers, and those without a rule."""

from collections.abc import Sequence

from fisherprune_jax._graph.checking import ask
from fisherprune_jax._graph.facts import Info
from fisherprune_jax._graph.program import Node
from fisherprune_jax._graph.registry import built_in, rule_named
from fisherprune_jax._graph.rules.naming import apart, sizes_in
from fisherprune_jax._graph.spec import Flops, Spec

# Random bits depend on the whole shape; each number costs one operation.
RANDOM = """
  iota_2x32_shape philox2x32 philox4x32 random_bits random_clone random_fold_in random_gamma random_seed
  random_split random_unwrap random_wrap rng_bit_generator rng_uniform threefry2x32 threefry4x32
""".split()


# Not part of models, and not reported.
SILENT = """
  axis_index debug_callback debug_print dim_as_value empty empty2 platform_index shape_assertion
""".split()


def opaque(node: Node, reason: str, flops: tuple[Flops, ...] = (), counted: bool = True) -> Spec:
  """Keeps a primitive whole: all operands are needed, and all results may be non-zero.

  It counts as sign-sensitive, too.

  Args:
    node: the application.
    reason: why, for the report; may be empty.
    flops: what it costs. Result i has the factors ``oi.0 oi.1 ..``, operand i ``ii.0 ..``.
    counted: False if the cost is unknown.

  Returns:
    Its ``Spec``.
  """
  ins, outs = apart("i", node.ins), apart("o", node.outs)
  sizes = sizes_in(node, ins, outs)
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


def random(node: Node, infos: Sequence[Info]) -> Spec:
  """Drawn whole, then sliced: the numbers stay those of the masked network."""
  return opaque(node, "", tuple(map(Flops, apart("o", node.outs))))


def spec_of(node: Node, infos: Sequence[Info]) -> Spec:
  """The spec by a node's rule; without one, it is kept whole, at the cost that a kernel states."""
  rule = rule_named(node.name)
  spec = ask(rule, node, infos) if rule else None
  if spec is not None:
    return spec
  stated = _stated_flops(node)
  counts = () if stated is None else (Flops((), scale=stated),)
  return opaque(node, unknown(node.name), counts, counted=stated is not None)


def _stated_flops(node: Node) -> int | None:
  """What the ``cost_estimate`` of a Pallas kernel says, or None."""
  estimate = node.params.get("cost_estimate")
  return None if estimate is None else int(estimate.flops) + int(estimate.transcendentals)


def unknown(name: str) -> str:
  return f"no rule for {name}"


def silent(node: Node, infos: Sequence[Info]) -> Spec:
  """Kept whole, without a reason."""
  return opaque(node, "")


for name in SILENT:
  built_in(name, silent)
for name in RANDOM:
  built_in(name, random)
