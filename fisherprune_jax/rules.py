"""Rules: teaching the engine a primitive.

A primitive without a rule keeps all its entries, and is not counted; a warning reports it once. A *rule*,
``rule(node, infos) -> Spec``, relates the axes of operands to those of results. From it follow the entries that may be
non-zero, the entries that are needed, the shapes of the compact network, and the cost. Register it with
:func:`fisherprune_jax.register_rule` before a function with the primitive is traced.

A :class:`Spec` names the *factors* of one application, as in ``b m k, b k n -> b m n``. An axis is one factor, or

- ``None``: linked to no other axis, and indivisible (a size-1 axis that broadcasts);
- ``Prod(("h", "w", "c"))``: several factors merged, row-major (a reshape, groups);
- ``Sum(("a", "b"))``: several factors concatenated;
- ``Pick("a", index)``: in a result, some entries of an axis of operand 0 (a slice, a reversal).

**Elementwise primitives** need only :func:`elementwise`. It finds out whether zeros stay zeros by applying the
primitive, which must have an implementation.

>>> import jax, jax.numpy as jnp
>>> from jax.extend.core import Primitive
>>> from jax.interpreters import mlir
>>> import fisherprune_jax as fp
>>> def made(name, function, shaped):
...   primitive = Primitive(name)
...   primitive.def_impl(function)
...   primitive.def_abstract_eval(shaped)
...   mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
...   return primitive
>>> cube_p = made("cube_of_the_manual", lambda x: x * x * x, lambda x: x)
>>> fp.register_rule(cube_p, fp.rules.elementwise)

**Products of matrices** and similar primitives need three facts.

- *Axes and zeros.* Axes that share a factor lose the same entries; a factor of operands alone is summed over. A result
  is zero where all operands are, or where any operand in ``kills`` is. ``alive`` lists factors along which zeros become
  non-zero, as in ``exp``; ``whole``, indivisible factors, as in a sort.
- *Cost.* ``Flops(outer, inner)`` counts ``2 K - 1`` for each of the ``outer`` entries, with ``K`` ``inner`` ones.
- *Slicing.* The traced primitive is applied to smaller arrays. If a parameter holds a size, ``bind`` gets the remaining
  sizes by factor.

>>> def product(x, w, *, columns):
...   return (x @ w).reshape(-1, columns)
>>> def shaped(x, w, *, columns):
...   return jax.core.ShapedArray((x.shape[0], columns), x.dtype)
>>> product_p = made("product_of_the_manual", product, shaped)
>>> def rule(node, infos):
...   x, w = node.ins
...   axes = ("n", "k"), ("k", "m")
...   return fp.rules.Spec(
...     ins=axes,
...     outs=(("n", "m"),),
...     sizes=fp.rules.sized((axes[0], x.shape), (axes[1], w.shape)),
...     kills=frozenset({0, 1}),
...     flops=(fp.rules.Flops(("n", "m"), ("k",)),),
...     bind=lambda node, arrays, sizes: [product_p.bind(*arrays, columns=sizes["m"])],
...   )
>>> fp.register_rule(product_p, rule)

Both in a network with six hidden features, two of them unmasked:

>>> def apply(variables, x):
...   hidden = product_p.bind(x, variables["w"], columns=6) * variables["masks"]
...   return product_p.bind(cube_p.bind(hidden), variables["v"], columns=3)
>>> masks = jnp.array([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
>>> variables = {"w": jnp.ones((4, 6)), "v": jnp.ones((6, 3)), "masks": masks}
>>> x = jnp.ones((5, 4))
>>> small = fp.compact(apply, variables, x, strict=True)
>>> jax.tree.map(jnp.shape, small.variables)
{'v': (2, 3), 'w': (4, 2)}
>>> bool((small(small.variables, x) == apply(variables, x)).all())
True
>>> small.cost  # 2 (2*4 - 1) for the first product, 2 for the cubes, 3 (2*2 - 1) for the second
25.0

Specs are checked for every node. One that does not fit is an error that names its rule:

>>> fp.register_rule(product_p, lambda node, infos: fp.rules.Spec(ins=(("n", "k"),), outs=(), sizes={}))
>>> fp.cost_model(apply, variables, x)  # doctest: +IGNORE_EXCEPTION_DETAIL
Traceback (most recent call last):
ValueError: The rule ... for the primitive `product_of_the_manual` must give `ins` one tuple of axes for each operand
>>> fp.register_rule(product_p, rule)
"""

from fisherprune_jax._graph.facts import Info as Info
from fisherprune_jax._graph.program import Node as Node
from fisherprune_jax._graph.registry import register_rule as register_rule
from fisherprune_jax._graph.registry import rule_for as rule_for
from fisherprune_jax._graph.rules.elementwise import elementwise as elementwise
from fisherprune_jax._graph.rules.naming import sized as sized
from fisherprune_jax._graph.rules.opaque import opaque as opaque
from fisherprune_jax._graph.spec import Flops as Flops
from fisherprune_jax._graph.spec import Pick as Pick
from fisherprune_jax._graph.spec import Prod as Prod
from fisherprune_jax._graph.spec import Spec as Spec
from fisherprune_jax._graph.spec import Sum as Sum
from fisherprune_jax._graph.spec import names_of as names_of
