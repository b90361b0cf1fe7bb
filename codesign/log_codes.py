"""Codes of prediction without multipliers: an operand is replaced by a power of two near it."""

import jax
import jax.numpy as jnp
import numpy as np

from codesign import gates

LEADING_ONE_GAIN = float(np.log(2.0))
"""Mean of `2^floor(log2 |y|) / |y|` over mantissas spread evenly in [1, 2): what a sum of estimates is short of."""

_SIGN_AND_EXPONENT = {
    jnp.dtype("float32"): (jnp.uint32, 0xFF800000),
    jnp.dtype("float64"): (jnp.uint64, 0xFFF0000000000000),
}


def leading_one(y: jax.Array) -> jax.Array:
    """Returns `sign(y) * 2^floor(log2 |y|)`, 0 for 0: what remains of a number cut behind its leading one.

    Args:
      y: Integers, or normal floating-point numbers, any shape.

    Returns:
      The same shape and dtype; `1/2 < |leading_one(y) / y| <= 1`.

    References:
      Differential leading-zero scheme of SOFA (arXiv 2407.10416): half its `2^(W - LZ)`, so that an estimate never exceeds
      what it estimates.
    """
    if jnp.issubdtype(y.dtype, jnp.integer):
        size = jnp.abs(y)
        last = np.iinfo(y.dtype).bits - 1
        place = last - jax.lax.clz(jnp.maximum(size, 1))
        return jnp.sign(y) * jnp.left_shift(jnp.ones_like(y), place)
    whole, mask = _SIGN_AND_EXPONENT[y.dtype]
    bits = jax.lax.bitcast_convert_type(y, whole)
    return jax.lax.bitcast_convert_type(jnp.bitwise_and(bits, whole(mask)), y.dtype)


def leading_one_operand(y: jax.Array) -> jax.Array:
    """Returns `leading_one(y)`, differentiable: the derivative is `LEADING_ONE_GAIN` (true: 0 almost everywhere)."""
    return gates.straight_through(leading_one(gates.detach(y)), LEADING_ONE_GAIN * y)
