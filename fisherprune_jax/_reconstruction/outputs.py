"""The importance of features by what their removal does to the outputs: no labels."""

import jax
import jax.numpy as jnp

from fisherprune_jax._graph import compat
from fisherprune_jax._reconstruction.flat import Env, Flat


def gradients(flat: Flat, uses, env: Env, key) -> list[jax.Array]:
  """Gradients of random projections of the outputs by products' results."""
  values = [flat.nodes[use.at].outs[0] for use in uses]
  outputs = [v for v in flat.program.outputs if jnp.issubdtype(v.aval.dtype, jnp.floating)]
  positions, _ = flat.before(outputs, env)

  def project(noise):
    found = dict(env)
    for at in positions:
      node = flat.nodes[at]
      arrays = [found[v] if v.literal is None else v.literal for v in node.ins]
      outs = compat.bind(node.eqn, arrays)
      for v, out in zip(node.outs, outs, strict=True):
        found[v] = out + noise[values.index(v)] if v in values else out
    total = 0.0
    for n, v in enumerate(outputs):
      out = found[v].astype(jnp.float32)
      total += jnp.sum(out * jax.random.rademacher(jax.random.fold_in(key, n), out.shape, jnp.float32))
    return total

  return jax.grad(project)([jnp.zeros(v.shape, v.aval.dtype) for v in values])
