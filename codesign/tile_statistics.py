"""How products without a zero lie in tiles of 16 x 16 x 16 pairs, for machines whose lanes take a tile each.

A tile's products at one inner index are the elements of its column times those of its row that are not zero, so sums over
16 rows and 16 columns say everything; no pair of elements is looked at. Everything here is constant for differentiation:
the densities of the two operands carry the slopes.
"""

import jax
import jax.numpy as jnp
from flax import struct

from codesign import gates

TILE = 16
"""Side of a tile (AccelTran's, arXiv 2302.14705)."""


@struct.dataclass
class TileStatistics:
    """Tiles of a product by head (of `qkv`: of Q, K and V; 1 where heads do not matter), `[B, L, H]`, constants.

    Attributes:
      effectual: Fraction of its products in which neither operand is zero.
      largest: Those of the fullest tile over those of the mean one.
      weighted: Those of the tile in which the mean effectual product lies, over the same.
    """

    effectual: jax.Array
    largest: jax.Array
    weighted: jax.Array


def product_statistics(
    left: jax.Array, right: jax.Array, exists: jax.Array, pairs_of: str = "rows"
) -> TileStatistics:
    """Returns one layer's statistics of a product `[n, k]` times `[k, m]`.

    Args:
      left: 1 where the first operand is not zero, `[B, H, n, k]`, 0 for tokens that do not exist; H may be 1.
      right: The same of the second, `[B, H, k, m]`; B and H may be 1.
      exists: 1 for what exists of what `pairs_of` names.
      pairs_of: `rows` `[B, 1, n, 1]`, elements of the `result` `[B, 1, n, m]`, or of the `left` operand `[B, 1, n, k]`.
    """
    rows = _cut(_sums(left, 2), 3)  # [B, H, I, K, t]
    columns = _cut(_sums(right, 3), 2)  # [B, H, K, t, J]
    tiles = jnp.einsum("bhikt,bhktj->bhijk", *_together(rows, columns))
    within = _sums(_sums(exists, 2), 3)[..., None]  # [B, 1, I, 1 or J or K, 1]
    if pairs_of == "left":
        within = jnp.swapaxes(within, 3, 4)
    if pairs_of == "result":
        # A tile with fewer pairs has as much less of them without a zero.
        tiles = tiles * within / _sums(_sums(jnp.ones_like(exists[:1]), 2), 3)[..., None]
    shape = jnp.broadcast_shapes(within.shape, (1, 1, *tiles.shape[2:]))
    number = jnp.sum(jnp.broadcast_to((within > 0.0).astype(tiles.dtype), shape), axis=(2, 3, 4))
    repeats = {
        "rows": left.shape[3] * right.shape[3],
        "result": left.shape[3],
        "left": right.shape[3],
    }
    count = jnp.sum(exists, axis=(2, 3)) * float(repeats[pairs_of])
    axes = (2, 3, 4)
    total = jnp.sum(tiles, axis=axes)
    mean = total / jnp.maximum(number, 1.0)
    divisor = jnp.where(total > 0.0, mean, 1.0)
    weighted = jnp.sum(tiles * tiles, axis=axes) / jnp.where(total > 0.0, total, 1.0) / divisor
    one = jnp.ones_like(total)
    found = TileStatistics(
        effectual=total / jnp.maximum(count, 1.0),
        largest=jnp.where(total > 0.0, jnp.max(tiles, axis=axes) / divisor, one),
        weighted=jnp.where(total > 0.0, weighted, one),
    )
    result: TileStatistics = jax.tree.map(gates.detach, found)
    return result


def _together(left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns both with the same examples and heads."""
    batch, heads = (max(left.shape[axis], right.shape[axis]) for axis in (0, 1))
    return (
        jnp.broadcast_to(left, (batch, heads, *left.shape[2:])),
        jnp.broadcast_to(right, (batch, heads, *right.shape[2:])),
    )


def _cut(values: jax.Array, axis: int) -> jax.Array:
    """Returns the values with an axis cut into stretches of a tile, `[..., K, t, ...]`, filled up with zeros."""
    length = values.shape[axis]
    padding = [(0, 0)] * values.ndim
    padding[axis] = (0, -length % TILE)
    padded = jnp.pad(values, padding)
    return jnp.reshape(padded, (*values.shape[:axis], -1, TILE, *values.shape[axis + 1 :]))


def _sums(values: jax.Array, axis: int) -> jax.Array:
    """Returns sums over stretches of a tile along an axis."""
    return jnp.sum(_cut(values, axis), axis=axis + 1)
