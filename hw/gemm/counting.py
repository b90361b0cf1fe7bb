"""Counting that every dense array shares: rounding up, fetches of what does not stay, passes of wide operands, fill, drain.

The general model (`codesign.hw.gemm.cost`) and the host's closed form (`codesign.hw.host`) are both made of these.
"""

import jax
import jax.numpy as jnp

from codesign import gates


def ceil(x: jax.Array) -> jax.Array:
    """Rounds up; true derivative zero almost everywhere, substituted: 1."""
    return gates.straight_through(jnp.ceil(x), x)


def fetches(extent: jax.Array, resident: jax.Array) -> jax.Array:
    """Returns how often the other operand is fetched: ceil(extent / floor(resident)), at least 1."""
    whole = jnp.maximum(gates.straight_through(jnp.floor(resident), resident), 1.0)
    return ceil(jnp.maximum(extent / whole, 1.0))


def operand_passes(bits_a: jax.Array, bits_b: jax.Array, native_bits: float) -> jax.Array:
    """Returns the passes of operands through multipliers of a width, bit."""
    return ceil(bits_a / native_bits) * ceil(bits_b / native_bits)


def narrowed(
    cycles: jax.Array, passes: jax.Array, bits_a: jax.Array, bits_b: jax.Array, native_bits: float
) -> jax.Array:
    """Returns the cycles of passes where time follows the product of the operands' widths, bit."""
    return cycles * (bits_a * bits_b) / (passes * (native_bits * native_bits))


def systolic_cycles(
    tiles: jax.Array,
    steps: jax.Array,
    passes: jax.Array,
    exchange_cycles: jax.Array | float,
    *,
    prefetches: bool,
) -> jax.Array:
    """Returns the cycles of a systolic array that is filled and drained.

    Args:
      tiles: Tiles that stay in the array, one after the other.
      steps: Steps on each of them.
      passes: Passes of each step.
      exchange_cycles: Cycles to fill and drain the array.
      prefetches: Whether the next tile arrives during the computation, so that this is paid once.
    """
    if prefetches:
        return tiles * steps * passes + exchange_cycles
    return tiles * (exchange_cycles + steps) * passes - 1.0
