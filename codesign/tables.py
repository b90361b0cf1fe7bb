"""Exponentials by table, and divisions correctly rounded: what the chip does beyond sums, products and shifts."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

EXP_FRACTION_BITS = 12
"""Fraction bits of the index of the table of exponentials: 4096 entries."""


def quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a / b correctly rounded; `b` is broadcast against `a`.

    XLA turns a division by a broadcast value into a product with its reciprocal, and one by a square root into a product
    with the reciprocal square root: neither is correctly rounded. It cannot know what lies behind a barrier.
    """
    divisor = jnp.broadcast_to(b, a.shape)
    hidden: jax.Array = jax.lax.optimization_barrier(divisor)  # type: ignore[no-untyped-call]
    return a / hidden


def look_up(table: jax.Array, index: jax.Array) -> jax.Array:
    """Returns the entries of a table of codes, int32; every index must lie within it."""
    return table.astype(jnp.int32).at[index].get(mode="promise_in_bounds")


def exp_table() -> NDArray[np.int64]:
    """Returns 2^16 * 2^-((f + 1/2) / 4096) for f = 0..4095, rounded."""
    entries = 2**EXP_FRACTION_BITS
    fractions = (np.arange(entries) + 0.5) / entries
    table: NDArray[np.int64] = np.rint(2.0**16 * 2.0**-fractions).astype(np.int64)
    return table


def table_exponentials(
    distance: jax.Array, mantissa: jax.Array, shift: jax.Array, table: jax.Array
) -> jax.Array:
    """Returns 2^16 times powers of two by table and shift, as the chip finds exponentials; needs 64-bit mode.

    Args:
      distance: How far below the largest score, whole numbers >= 0 whose product with the mantissa is below 2^53.
      mantissa: With `shift`: factor from a distance to 4096ths of an octave, scalar.
      shift: Right shift, scalar.
      table: `exp_table`, `[4096]`.

    Returns:
      int32, shape of `distance`.
    """
    scale = mantissa.astype(jnp.float64) * jnp.ldexp(1.0, -shift.astype(jnp.int32))
    # From 31 octaves on nothing is left: the index is limited to what int32 holds.
    index = jnp.minimum(jnp.floor(distance * scale), 32.0 * 2**EXP_FRACTION_BITS - 1.0)
    index = index.astype(jnp.int32)
    fraction = jnp.bitwise_and(index, 2**EXP_FRACTION_BITS - 1)
    octaves = jnp.right_shift(index, EXP_FRACTION_BITS)
    return jnp.right_shift(look_up(table, fraction), octaves)
