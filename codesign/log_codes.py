"""Codes of prediction without multipliers: an operand is replaced by a number of one or two set bits near it."""

import jax
import jax.numpy as jnp
import numpy as np

from codesign import gates

LEADING_ONE_GAIN = float(np.log(2.0))
"""Mean of `2^floor(log2 |y|) / |y|` over mantissas spread evenly in [1, 2): what a sum of estimates is short of."""

_FORMATS = {
    jnp.dtype("float32"): (jnp.uint32, 23),
    jnp.dtype("float64"): (jnp.uint64, 52),
}
"""Unsigned type of the same width, and mantissa bits, of floating-point types."""
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


def hybrid_log(y: jax.Array) -> jax.Array:
    """Returns a number near y among 0, powers of two and three times powers of two, found from few of its bits.

    With e = floor(log2 |y|) and f = |y| / 2^e - 1: 2^e for f below 1/4, 1.5 times that below 3/4, 2^(e+1) from there on.

    Args:
      y: Integers, or normal floating-point numbers, any shape.

    Returns:
      The same shape and dtype; odd, idempotent, never decreasing; off by at most a fifth (at 5).

    References:
      HybridLog of ESACT (arXiv 2512.02403): the levels are the paper's, the rule of rounding, which needs the leading one
      and two bits behind it, is a reconstruction.
    """
    if jnp.issubdtype(y.dtype, jnp.integer):
        # A quarter of the leading one carries where rounding goes up; two bits of what is left stay.
        size = jnp.abs(y)
        raised = 4 * size + leading_one(size)
        hidden = jnp.maximum(np.iinfo(y.dtype).bits - 2 - jax.lax.clz(jnp.maximum(raised, 1)), 0)
        kept = jnp.left_shift(jnp.right_shift(raised, hidden), hidden)
        return jnp.sign(y) * jnp.right_shift(kept, 2)
    whole, mantissa_bits = _FORMATS[y.dtype]
    bits = jax.lax.bitcast_convert_type(y, whole) + whole(2 ** (mantissa_bits - 2))
    dropped = whole(2 ** (mantissa_bits - 1) - 1)
    return jax.lax.bitcast_convert_type(jnp.bitwise_and(bits, jnp.bitwise_not(dropped)), y.dtype)


def hybrid_log_operand(y: jax.Array) -> jax.Array:
    """Returns `hybrid_log(y)`, differentiable: the derivative is 1 (true: 0 almost everywhere; mean ratio: 0.995)."""
    return gates.straight_through(hybrid_log(gates.detach(y)), y)
