"""Teaching the engine a primitive.

A primitive that no rule knows is kept whole, and not counted; a warning says so once. A *rule*,
``rule(node, infos) -> Spec``, tells how the axes of its operands relate to those of its results; which entries can be
non-zero, which are asked for, what is left of every array, and what it costs follow from that. Register it with
:func:`fisherprune_jax.register_rule` before anything that uses the primitive is traced.

A :class:`Spec` names the *factors* of one application, as in ``b m k, b k n -> b m n``. An axis is one factor, or

- ``None``: linked to no other axis, and whole (a size-1 axis that broadcasts);
- ``Prod(("h", "w", "c"))``: several factors merged, row-major (a reshape, groups);
- ``Sum(("a", "b"))``: several factors end to end (concatenation);
- ``Pick("a", index)``: in a result, some entries of an axis of operand 0 (a slice, a reversal).

**A primitive that works entry by entry** needs nothing more than to be told so. Whether it keeps zeros is not written
down: :func:`elementwise` applies it to zeros and looks, so it must have an implementation.

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

**One like a product of matrices.** Three things have to be right.

- *Axes and zeros.* Axes that share a factor lose the same entries; one that only operands have is summed over. A result
  is taken to be zero where all operands are. In a product one zero is enough: ``kills``. (Where zeros come to life, as
  in ``exp``, say ``alive``; where an axis cannot lose an entry, as that of a sort, ``whole``.)
- *Cost.* ``Flops(outer, inner)`` counts ``2 K - 1`` for each of the ``outer`` entries, ``K`` being the ``inner`` ones.
- *Slicing.* It is applied, as it was traced, to smaller arrays. A parameter that holds a size has to follow: ``bind``
  gets the sizes that are left, by factor.

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

Both in a network of six hidden features, of which the masks leave two:

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

What a rule returns is held against every node that it is asked of; one that does not fit is an error that names it:

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
