"""What the AccelTran study measures with: its sparsity, its fixed point, and the top-k it compares with.

References:
  Tuli, Jha, "AccelTran", IEEE TCAD 42(11), 2023, arXiv 2302.14705; read in its public code, but for the sign bit of
  the fixed point.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from codesign.errors import CodesignError
from codesign.references.acceltran import PRUNED_SITES
from codesign.structure import ModelStructure


def fixed_point(x: ArrayLike, integer_bits: int, fraction_bits: int) -> NDArray[np.int64]:
    """Returns the published machine's codes: rounded half to even, saturated to IL + FL bits, the sign among IL."""
    limit = 2 ** (integer_bits + fraction_bits - 1)
    codes = np.rint(np.asarray(x, np.float64) * 2.0**fraction_bits)
    return np.clip(codes, -limit, limit - 1).astype(np.int64)


def strict_topk(probabilities: jax.Array, k: int) -> jax.Array:
    """Returns the probabilities `[..., S]` that strictly exceed the k-th largest of their row, 0 elsewhere.

    Keeps at most k - 1 entries, none for k = 1: the top-k that the AccelTran study compares with.

    Raises:
      CodesignError: If k is not in [1, S].
    """
    size = probabilities.shape[-1]
    if not 1 <= k <= size:
        raise CodesignError(f"`k` must lie in [1, {size}], the keys of a row, got {k}")
    threshold = jax.lax.top_k(probabilities, k)[0][..., -1:]
    return jnp.where(probabilities > threshold, probabilities, 0.0)


def net_sparsity(
    densities: Mapping[str, Any],
    structure: ModelStructure,
    valid: NDArray[Any],
    *,
    count_padding: bool,
) -> float:
    """Returns the zeros over the elements of all pruned sites of a batch, the study's activation sparsity.

    Args:
      densities: Fraction of non-zero elements by site, `[B, L]`, over tokens and pairs that exist; 1 if missing.
      structure: Sizes of the model.
      valid: 1 for tokens that exist, `[B, T]`.
      count_padding: False: over tokens and pairs that exist. True: as published, over all T tokens and T^2 pairs, where
        a padded key's probabilities are zeros and padded tokens are as dense as others everywhere else.

    Returns:
      Sparsity in [0, 1], dimensionless.
    """
    mask = np.asarray(valid, np.float64)
    lengths = np.sum(mask, axis=1)
    # Keys that each query sees, [B, T].
    seen = np.cumsum(mask, axis=1) if structure.is_causal else lengths[:, None] + 0.0 * mask
    rows, pairs = lengths, np.sum(seen * mask, axis=1)
    nonzero_pairs = pairs
    if count_padding:
        rows = np.full_like(lengths, mask.shape[1])
        pairs, nonzero_pairs = rows**2, np.sum(seen, axis=1)
    attention = structure.attention_width
    sizes = {
        **dict.fromkeys(("query", "key", "value", "out"), attention * rows),
        **dict.fromkeys(("attention_branch", "ffn_branch"), structure.width * rows),
        **dict.fromkeys(("scores", "probabilities"), structure.num_heads * pairs),
        "gelu": structure.hidden * rows,
    }
    dense = sizes | {"probabilities": structure.num_heads * nonzero_pairs}
    shape = (len(mask), structure.num_layers)
    left = {site: np.broadcast_to(densities.get(site, 1.0), shape) for site in PRUNED_SITES}
    nonzero = sum(np.sum(dense[site] * np.sum(left[site], axis=1)) for site in PRUNED_SITES)
    elements = sum(np.sum(sizes[site]) for site in PRUNED_SITES)
    return float(1.0 - nonzero / (elements * structure.num_layers))
