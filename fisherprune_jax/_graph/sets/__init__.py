"""Sets of positions along one axis, as expressions over the masks.

A ``Set`` says which of the ``size`` positions of an axis can matter, as a function of masks that are not known
yet. Expressions are built once per program and read for any masks, on the host (``evaluate.py``) or under
``jit`` (``circuit.py``). They are monotone: switching a feature off never adds a position.

Words: a *position* is one entry along an axis, a *feature* one entry of a mask. A *leaf* is the set of the live
features of one mask, which is known by a *key*. What an expression is made of are its *parts*, the masks that it
hangs on its *support*.

Equal expressions are one object (hash-consing), so ``is`` compares them and the constructors below can
simplify: what a reshape merged, a later reshape splits again exactly. Expressions are as deep as the network, so
whoever reads all that a set is made of does not recurse, but goes through it in the order in which it was made
(``in_order``), parts first.

Each kind of expression is one class. ``expression.py`` describes the methods that a class may define. The kinds without
parts are in ``basic.py``, unions and intersections in ``junctions.py``. ``picking.py`` holds the kinds that select
positions, ``laying.py`` those that combine axes into a merged one. Conditions, which are sets of one position, are in
``conditions.py``. A new kind is a new class with its constructor beside it; no other code changes.
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
