"""Sets of positions along one axis, as expressions over the masks.

A set tells which positions can matter, for masks that are not known yet. Expressions are built once per program, and
evaluated on the host (evaluate.py) or under jit (circuit.py). They are monotone: masking a feature never adds a
position.

A *position* is one entry along an axis, a *feature* one entry of a mask. A *leaf* is the set of a mask's live features;
a *key* identifies the mask. Expressions are made of *parts*, and depend on the masks in their *support*.

Equal expressions are one object (hash-consing). So ``is`` compares them, and constructors simplify: what a reshape
merged, another splits exactly. Expressions are as deep as the network. So readers must not recurse, but go through
``in_order``, parts first.

Each kind is a class with its constructor beside it, and methods as in expression.py. Those without parts are in
basic.py, unions and intersections in junctions.py, selections in picking.py, merged axes in laying.py. Conditions, sets
of one position, are in conditions.py.
"""

from fisherprune_jax._graph.sets.basic import ALWAYS as ALWAYS
from fisherprune_jax._graph.sets.basic import NEVER as NEVER
from fisherprune_jax._graph.sets.basic import Leaf as Leaf
from fisherprune_jax._graph.sets.basic import everything as everything
from fisherprune_jax._graph.sets.basic import fixed as fixed
from fisherprune_jax._graph.sets.basic import leaf as leaf
from fisherprune_jax._graph.sets.basic import nothing as nothing
from fisherprune_jax._graph.sets.basic import weak as weak
from fisherprune_jax._graph.sets.conditions import apart as apart
from fisherprune_jax._graph.sets.conditions import beyond as beyond
from fisherprune_jax._graph.sets.conditions import either as either
from fisherprune_jax._graph.sets.conditions import every as every
from fisherprune_jax._graph.sets.conditions import free_of as free_of
from fisherprune_jax._graph.sets.conditions import gated as gated
from fisherprune_jax._graph.sets.expression import Bits as Bits
from fisherprune_jax._graph.sets.expression import Set as Set
from fisherprune_jax._graph.sets.expression import in_order as in_order
from fisherprune_jax._graph.sets.expression import keys_of as keys_of
from fisherprune_jax._graph.sets.junctions import conjuncts as conjuncts
from fisherprune_jax._graph.sets.junctions import intersection as intersection
from fisherprune_jax._graph.sets.junctions import union as union
from fisherprune_jax._graph.sets.junctions import unsaid as unsaid
from fisherprune_jax._graph.sets.laying import concat as concat
from fisherprune_jax._graph.sets.laying import outer as outer
from fisherprune_jax._graph.sets.laying import split as split
from fisherprune_jax._graph.sets.picking import any_of as any_of
from fisherprune_jax._graph.sets.picking import any_over as any_over
from fisherprune_jax._graph.sets.picking import nonempty as nonempty
from fisherprune_jax._graph.sets.picking import take as take
