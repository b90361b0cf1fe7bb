"""AccelTran: how products without a zero lie in tiles, which says how long each lane works."""

import jax
import jax.numpy as jnp

from codesign import gates
from codesign.mechanisms.protocol import Context, Counts
from codesign.policy import bits_range
from codesign.quantize import code_limit, deployed_bits
from codesign.tile_statistics import product_statistics


def hard_on_product(context: Context, left: jax.Array, right: jax.Array, site: str) -> Counts:
    """Counts a product of codes: those that are not 0."""
    return _counted(context, left != 0, right != 0, site)


def soft_on_product(context: Context, left: jax.Array, right: jax.Array, site: str) -> Counts:
    """Counts a product of values as those of their codes; nothing unless the forward path is the deployed one.

    The counts are constants: densities carry the slopes.
    """
    if not context.relaxation.straight_through:
        return Counts()
    # The value of one code: operands of attention and weights come as codes.
    code: jax.Array | float = 1.0
    if site == "pv":
        bits = deployed_bits(gates.detach(context.widths["qk_bits"]), *bits_range("qk_bits"))
        code = 1.0 / code_limit(bits)
    elif site != "qk":
        code = context.scales[site]
    is_left = jnp.abs(gates.detach(left)) > 0.5 * code
    return _counted(context, is_left, jnp.abs(gates.detach(right)) > 0.5, site)


def _counted(context: Context, left: jax.Array, right: jax.Array, site: str) -> Counts:
    """Counts a product whose operands are not zero where `left` and `right` say, of tokens and pairs that exist."""
    dtype = context.valid.dtype
    rows = context.valid[:, None, :, None]
    one, other = left.astype(dtype), right.astype(dtype)
    pairs = context.pairs * rows
    if site == "qk":
        columns = context.valid[:, None, None, :]
        found = product_statistics(one * rows, other * columns, pairs, "result")
    elif site == "pv":
        found = product_statistics(one * pairs, other * rows, pairs, "left")
    else:
        found = product_statistics(one * rows, other, rows)
    return Counts(tiles={site: found})
