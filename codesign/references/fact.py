"""FACT in integers: prediction by leading ones, top-k rows, one-hot rows, and feed-forward rows of four bits.

References:
  Qin et al., "FACT", ISCA 2023, doi 10.1145/3579371.3589057; what is reconstructed: `codesign.mechanisms.fact`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from codesign.errors import ExportError
from codesign.references.esact import reference_top
from codesign.references.integers import (
    Booleans,
    Integers,
    any_of,
    estimated_operand,
    exact_matmul,
    leading_one,
    limit,
    saturate,
)
from codesign.references.protocol import Layer, LayerTensors, Reference, Shapes, check_no_rounds
from codesign.structure import ModelStructure

GAP_OFF = 2**20  # a head without one-hot rows
IMPORTANCE_SHIFT = 8  # importance thresholds are in 1/256 of the mean
NARROW_BITS = 4
SCORE_LIMIT = (1 << 19) - 1  # 20-bit scores
_CODE_BITS, _CODE_LIMIT = 8, 127  # of predicted queries and keys


def layer_shapes(structure: ModelStructure) -> Shapes:
    """Returns the shapes of shares and gaps, and of importance thresholds."""
    layers = structure.num_layers
    return {"threshold": (layers, structure.num_heads, 2), "importance": (layers,)}


def tensor_shapes(structure: ModelStructure, batch_size: int, num_tokens: int) -> Shapes:
    """Returns the shapes of predictions, what is kept, one-hot rows, and tokens that keep all bits."""
    layers, rows = structure.num_layers, (batch_size, structure.num_heads, num_tokens)
    return {
        "predicted_query": (layers, *rows, structure.head_dim),
        "predicted_key": (layers, *rows, structure.head_dim),
        "scores": (layers, *rows, num_tokens),
        "keep": (layers, 1, *rows, num_tokens),
        "one_hot": (layers, *rows),
        "ffn_full": (layers, batch_size, num_tokens),
    }


def check(structure: ModelStructure, layers: Mapping[str, npt.NDArray[Any]]) -> None:
    """Checks the legal shares; raises `ExportError`."""
    check_no_rounds(structure, layers)
    share = np.asarray(layers["threshold"], np.int64)[..., 0]
    if share.min() < 1 or share.max() > 1024:
        raise ExportError("array `layers/threshold` must hold kept shares in [1, 1024] first")


def score_shift(head_dim: int) -> int:
    """Returns by how many bits predicted scores are shifted: the largest of heads of that width fill 20 bits."""
    largest = head_dim << 2 * (_CODE_BITS - 2)
    return max(0, (largest - 1).bit_length() - SCORE_LIMIT.bit_length())


def reference_one_hot(
    scores: Integers, exists: Booleans, gap: Integers, shift: int
) -> tuple[Booleans, Booleans]:
    """Returns the first largest pair of each row, `[B, H, T, S]`, and the rows whose largest leads by more than a gap.

    Args:
      scores: Predicted scores, `[B, H, T, S]`.
      exists: Pairs that exist, `[B, 1, T, S]`.
      gap: In units of the scores before the shift, `[H]`; 2^20: no row is one-hot.
      shift: By which scores were shifted.
    """
    there = np.broadcast_to(exists, scores.shape)
    own = np.where(there, scores, -(1 << 28))
    first = (np.arange(scores.shape[-1]) == own.argmax(axis=-1)[..., None]) & there
    second = np.where(first, -(1 << 28), own).max(axis=-1)
    best = np.where(first, scores, 0).sum(axis=-1)
    least = np.asarray(gap)[None, :, None]
    return first, ((best - second) << shift > least) & (least != GAP_OFF)


def reference_importance(kept: Booleans, exists: Booleans, threshold: int) -> Booleans:
    """Returns the tokens that keep all bits, `[B, T]`: kept at least as often as a part of the mean of those they see."""
    pairs = exists[:, 0]
    rows = any_of(pairs, 1)
    seen = pairs & rows[:, None, :]
    by_token = np.swapaxes((kept & rows[:, None, :, None]).sum(axis=1), 1, 2)
    received = (seen * by_token).sum(axis=-1)
    total = exact_matmul(seen.astype(np.int64), received[..., None])[..., 0]
    full: Booleans = (received * seen.sum(axis=-1) << IMPORTANCE_SHIFT) >= threshold * total
    return full


def predict(
    structure: ModelStructure, layer: Layer, inputs: Integers, exists: Booleans, carry: LayerTensors
) -> LayerTensors:
    """Returns all that is decided before Q, K and V exist."""
    del carry
    columns = np.split(leading_one(layer["qkv_weight"]), 3, axis=-1)
    coded, bits = leading_one(inputs), int(layer["qk_bits"])
    query, key = (
        saturate(
            estimated_operand(layer, exact_matmul(coded, columns[part]), part, structure.num_heads)
            >> (bits - _CODE_BITS),
            _CODE_LIMIT,
        )
        for part in (0, 1)
    )
    shift = score_shift(structure.head_dim)
    sums = exact_matmul(leading_one(query), np.swapaxes(leading_one(key), -1, -2))
    scores = saturate(sums >> shift, SCORE_LIMIT)
    largest = reference_top(scores, exists, layer["threshold"][:, 0])
    first, one_hot = reference_one_hot(scores, exists, layer["threshold"][:, 1], shift)
    keep = np.where(one_hot[..., None], first, largest)
    return {
        "predicted_query": query,
        "predicted_key": key,
        "scores": scores,
        "keep": keep[None],
        "one_hot": one_hot,
        "ffn_full": reference_importance(keep, exists, int(layer["importance"])),
    }


def filter_pairs(
    layer: Layer, query: Integers, key: Integers, exists: Booleans, planned: LayerTensors
) -> tuple[Booleans, LayerTensors]:
    """Keeps what was planned."""
    del layer, query, key, exists
    return planned["keep"][0], {}


def cut_rows(layer: Layer, x: Integers, site: str, planned: LayerTensors) -> Integers:
    """Rounds what enters the feed-forward network's products to four bits, halves up, but in rows that keep all."""
    dropped = 0
    if site in ("up", "down"):
        dropped = max(int(layer[f"{site}_activation_bits"]) - NARROW_BITS, 0)
    if not dropped:
        return x
    narrow = saturate(x + (1 << dropped - 1) >> dropped, limit(NARROW_BITS)) << dropped
    return np.where(planned["ffn_full"][..., None], x, narrow)


fact = Reference(
    name="fact",
    layer_shapes=layer_shapes,
    tensor_shapes=tensor_shapes,
    decision_tensors=("keep", "one_hot", "ffn_full"),
    ranges={"threshold": (0, GAP_OFF), "importance": (0, 1 << 10)},
    check=check,
    plan=predict,
    filter=filter_pairs,
    on_activation=cut_rows,
)
