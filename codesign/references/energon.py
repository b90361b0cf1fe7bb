"""Energon's multi-round filter in integers.

References:
  Zhou et al., "Energon", IEEE TCAD, arXiv 2110.09310. The integer threshold is ours.
"""

from collections.abc import Collection

import numpy as np

from codesign.references.integers import Booleans, Integers, exact_matmul
from codesign.references.protocol import (
    Layer,
    LayerTensors,
    Reference,
    Shapes,
    check_rising_rounds,
)
from codesign.structure import ModelStructure

THRESHOLD_OFF = -128
"""Code of a round that keeps all keys."""
_THRESHOLD_SHIFT = 7  # thresholds have 7 fraction bits
_FILTER_BITS = (2, 8)


def layer_shapes(structure: ModelStructure) -> Shapes:
    """Returns the shapes of thresholds and filter widths."""
    layers, rounds = structure.num_layers, structure.num_rounds
    return {
        "threshold": (layers, structure.num_heads, rounds),
        "query_bits": (layers,),
        "key_bits": (layers, rounds),
    }


def tensor_shapes(structure: ModelStructure, batch_size: int, num_tokens: int) -> Shapes:
    """Returns the shapes of scores and keep decisions of every round, `[L, R, B, H, T, S]`."""
    shape = (
        *(structure.num_layers, structure.num_rounds, batch_size),
        *(structure.num_heads, num_tokens, num_tokens),
    )
    return {"scores": shape, "keep": shape}


def reference_filter(
    query: Integers,
    key: Integers,
    exists: Booleans,
    threshold: Integers,
    query_bits: int,
    key_bits: Collection[int],
    qk_bits: int,
) -> tuple[Integers, Booleans]:
    """Returns the scores and keep decisions of every round of Energon's filter.

    Args:
      query: Codes of `qk_bits` bits, `[B, H, T, d]`.
      key: Codes of `qk_bits` bits, `[B, H, S, d]`.
      exists: Pairs of a query and a key that it may see, `[B, 1, T, S]`; a row without any keeps none.
      threshold: Codes of alpha with 7 fraction bits, -128 for a round that keeps all, `[H, R]`.
      query_bits: Top bits of the query that enter the filter.
      key_bits: Top bits of the key, one entry per round, R of them.
      qk_bits: Bits of the codes.

    Returns:
      Scores of all pairs `[R, B, H, T, S]`, and which are alive after each round `[R, B, H, T, S]`.
    """
    coarse_query = query >> (qk_bits - query_bits)
    positions = np.arange(key.shape[-2])
    lowest, highest = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    alive = np.broadcast_to(exists, (*query.shape[:-1], key.shape[-2]))
    all_scores, all_keep = [], []
    for number, bits in enumerate(key_bits):
        scores = exact_matmul(coarse_query, np.swapaxes(key >> (qk_bits - bits), -1, -2))
        alive_scores = np.where(alive, scores, lowest)
        count = alive.sum(axis=-1)
        is_empty = count == 0
        count = np.where(is_empty, 1, count)
        maximum = np.where(is_empty, 0, alive_scores.max(axis=-1))
        minimum = np.where(is_empty, 0, np.where(alive, scores, highest).min(axis=-1))
        quotient, rest = np.divmod(np.where(alive, scores, 0).sum(axis=-1), count)
        alpha = threshold[:, number][None, :, None]
        weight = np.abs(alpha)
        mean_weight = (1 << _THRESHOLD_SHIFT) - weight
        extreme = np.where(alpha >= 0, maximum, minimum)
        theta = (
            weight * extreme + mean_weight * quotient + (mean_weight * rest) // count
        ) >> _THRESHOLD_SHIFT
        is_first_maximum = positions == alive_scores.argmax(axis=-1)[..., None]
        is_off = (alpha == THRESHOLD_OFF)[..., None]
        alive = alive & ((scores > theta[..., None]) | is_first_maximum | is_off)
        all_scores.append(scores)
        all_keep.append(alive)
    return np.stack(all_scores), np.stack(all_keep)


def filter_pairs(
    layer: Layer, query: Integers, key: Integers, exists: Booleans, planned: LayerTensors
) -> tuple[Booleans, LayerTensors]:
    """Keeps the pairs that are alive after the last round."""
    del planned
    scores, keep = reference_filter(
        query,
        key,
        exists,
        layer["threshold"],
        int(layer["query_bits"]),
        [int(bits) for bits in layer["key_bits"]],
        int(layer["qk_bits"]),
    )
    return keep[-1], {"scores": scores, "keep": keep}


energon = Reference(
    name="energon",
    layer_shapes=layer_shapes,
    tensor_shapes=tensor_shapes,
    decision_tensors=("keep",),
    ranges={
        "threshold": (THRESHOLD_OFF, 127),
        "query_bits": _FILTER_BITS,
        "key_bits": _FILTER_BITS,
    },
    check=check_rising_rounds,
    filter=filter_pairs,
)
