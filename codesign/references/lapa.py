"""LAPA's multi-round filter over planes of predicted keys, in integers.

References:
  Wang et al., "LAPA", arXiv 2512.07855. Planes, the threshold and its codes are ours.
"""

from collections.abc import Collection

import numpy as np

from codesign.references.integers import (
    Booleans,
    Integers,
    exact_matmul,
    leading_one,
    saturate,
)
from codesign.references.on_demand import predict_keys
from codesign.references.protocol import (
    Layer,
    LayerTensors,
    Reference,
    Shapes,
    check_rising_rounds,
)
from codesign.structure import ModelStructure

ALPHA_OFF = 256  # code of a round that keeps all keys
_ALPHA_SHIFT = 7  # thresholds have 7 fraction bits
_CODE_BITS, _CODE_LIMIT = 8, 127  # of predicted keys and queries


def layer_shapes(structure: ModelStructure) -> Shapes:
    """Returns the shapes of thresholds and of the bits that each round sees."""
    layers, rounds = structure.num_layers, structure.num_rounds
    return {"threshold": (layers, structure.num_heads, rounds), "key_bits": (layers, rounds)}


def tensor_shapes(structure: ModelStructure, batch_size: int, num_tokens: int) -> Shapes:
    """Returns the shapes of predicted keys, and of scores and decisions of every round, `[L, R, B, H, T, S]`."""
    layers, heads = structure.num_layers, (batch_size, structure.num_heads, num_tokens)
    rounds = (layers, structure.num_rounds, *heads, num_tokens)
    return {
        "predicted_key": (layers, *heads, structure.head_dim),
        "scores": rounds,
        "keep": rounds,
    }


def top_code(values: Integers, bits: int) -> Integers:
    """Returns the top 8 bits of codes of `bits` bits, limited to [-127, 127]."""
    return saturate(values >> (bits - _CODE_BITS), _CODE_LIMIT)


def top_planes(values: Integers, bits: int) -> Integers:
    """Returns 8-bit codes whose magnitude keeps its top `bits` - 1 bits."""
    dropped = np.asarray(_CODE_BITS - bits, np.int64)
    signed: Integers = np.sign(values) * (np.abs(values) >> dropped << dropped)
    return signed


def reference_rounds(
    query: Integers,
    key: Integers,
    exists: Booleans,
    threshold: Integers,
    key_bits: Collection[int],
) -> tuple[Integers, Booleans]:
    """Returns the scores and decisions of every round.

    Args:
      query: 8-bit codes, `[B, H, T, d]`.
      key: Predicted keys, 8-bit codes, `[B, H, S, d]`.
      exists: Pairs of a query and a key that it may see, `[B, 1, T, S]`; a row without any keeps none.
      threshold: Codes of alpha with 7 fraction bits, 256 for a round that keeps all, `[H, R]`.
      key_bits: Top bits of the key, sign included, one entry per round.

    Returns:
      Scores of all pairs `[R, B, H, T, S]`, and which are alive after each round, the same shape.
    """
    powers = leading_one(query)
    alive = np.broadcast_to(exists, (*query.shape[:-1], key.shape[-2]))
    lowest = -(1 << 40)
    all_scores, all_keep = [], []
    for number, bits in enumerate(key_bits):
        scores = exact_matmul(powers, np.swapaxes(top_planes(key, bits), -1, -2))
        count = alive.sum(axis=-1, keepdims=True)
        top = np.where(alive, scores, lowest).max(axis=-1, keepdims=True)
        total = np.where(alive, scores, 0).sum(axis=-1, keepdims=True)
        alpha = threshold[:, number][None, :, None, None]
        left = (scores << _ALPHA_SHIFT) * count
        right = (top << _ALPHA_SHIFT) * count - alpha * (count * top - total)
        alive = alive & ((left >= right) | (alpha == ALPHA_OFF))
        all_scores.append(scores)
        all_keep.append(alive)
    return np.stack(all_scores), np.stack(all_keep)


def filter_pairs(
    layer: Layer, query: Integers, key: Integers, exists: Booleans, planned: LayerTensors
) -> tuple[Booleans, LayerTensors]:
    """Keeps the pairs that are alive after the last round."""
    del key
    bits = int(layer["qk_bits"])
    scores, keep = reference_rounds(
        top_code(query, bits),
        top_code(planned["predicted_key"], bits),
        exists,
        layer["threshold"],
        [int(width) for width in layer["key_bits"]],
    )
    return keep[-1], {"scores": scores, "keep": keep}


lapa = Reference(
    name="lapa",
    layer_shapes=layer_shapes,
    tensor_shapes=tensor_shapes,
    decision_tensors=("keep",),
    ranges={"threshold": (0, ALPHA_OFF), "key_bits": (2, _CODE_BITS)},
    check=check_rising_rounds,
    plan=predict_keys,
    filter=filter_pairs,
)
