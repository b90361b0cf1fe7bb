"""Sanger in integers: 4-bit directions, norms, predicted probabilities against a threshold; and its packed rows.

Directions take one square root and one division per element in float64, both correctly rounded, as a normalisation does.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from codesign.errors import ExportError
from codesign.references.integers import (
    Booleans,
    IntegerLike,
    Integers,
    exact_matmul,
    exact_product,
    exponentials,
)
from codesign.references.protocol import Layer, LayerTensors, Reference, Shapes
from codesign.structure import ModelStructure

LOW_LIMIT, LOW_BITS = 7, 4
RANGE_SHIFT = 15  # fraction bits of the ranges of directions
NORM_BITS = 8  # of a norm, below the place of the largest code
PROBABILITY_SHIFT = 16  # fraction bits of the threshold
PIECE, ELEMENTS = 64, 16  # keys of a piece of a row, processing elements that share one
ROWS = 64  # rows of processing elements


def layer_shapes(structure: ModelStructure) -> Shapes:
    """Returns the shapes of thresholds, ranges and the multiplier of predicted scores."""
    layers = structure.num_layers
    scalars = ("query_range", "key_range", "mask_mantissa", "mask_shift")
    return {"threshold": (layers, structure.num_heads, 1)} | dict.fromkeys(scalars, (layers,))


def tensor_shapes(structure: ModelStructure, batch_size: int, num_tokens: int) -> Shapes:
    """Returns the shapes of predicted scores `[L, B, H, T, S]` and keep decisions `[L, 1, B, H, T, S]`."""
    pairs = (batch_size, structure.num_heads, num_tokens, num_tokens)
    return {"scores": (structure.num_layers, *pairs), "keep": (structure.num_layers, 1, *pairs)}


def check(structure: ModelStructure, layers: Mapping[str, npt.NDArray[Any]]) -> None:
    """Checks that there is one round; raises `ExportError`."""
    del layers
    if structure.num_rounds != 1:
        raise ExportError(f"`num_rounds` must be 1 for `sanger`, got {structure.num_rounds}")


def direction(codes: Integers, range_: IntegerLike, bits: IntegerLike) -> tuple[Integers, Integers]:
    """Returns 4-bit codes of rows over their norms, `[..., d]`, and the norms in units of 2^(b - 8), `[..., 1]`.

    Args:
      codes: Rows, `[..., d]`.
      range_: What the largest code 7 stands for, in 1/32768.
      bits: Width of the codes.
    """
    squares = np.maximum((codes * codes).sum(axis=-1, keepdims=True), 1)
    norm = np.sqrt(squares.astype(np.float64))
    numerator = codes.astype(np.float64) * float(LOW_LIMIT << RANGE_SHIFT)
    whole = np.rint(numerator / (norm * float(range_)))
    low: Integers = np.clip(whole, -LOW_LIMIT, LOW_LIMIT).astype(np.int64)
    return low, np.rint(norm * 2.0 ** (NORM_BITS - int(bits))).astype(np.int64)


def reference_mask(
    scores: Integers,
    exists: Booleans,
    threshold: Integers,
    mantissa: IntegerLike,
    shift: IntegerLike,
) -> Booleans:
    """Returns the pairs whose probability exceeds a threshold, and the first largest of each row, `[B, H, T, S]`.

    Args:
      scores: Predicted scores, `[B, H, T, S]`.
      exists: Pairs that exist, `[B, 1, T, S]`.
      threshold: In 1/65536, `[H]`; 0 keeps all.
      mantissa: With `shift`: factor from a distance of scores to 4096ths of an octave.
      shift: Right shift.
    """
    there = np.broadcast_to(exists, scores.shape)
    own = np.where(there, scores, np.iinfo(np.int64).min // 2)
    distance = np.where(there, own.max(axis=-1, keepdims=True) - scores, 0)
    masses = np.where(there, exponentials(distance, mantissa, shift), 0)
    tau = threshold[None, :, None, None]
    above = (masses << PROBABILITY_SHIFT) > tau * masses.sum(axis=-1, keepdims=True)
    is_first = np.arange(scores.shape[-1]) == own.argmax(axis=-1)[..., None]
    mask: Booleans = there & (above | (tau == 0) | is_first)
    return mask


def filter_pairs(
    layer: Layer, query: Integers, key: Integers, exists: Booleans, planned: LayerTensors
) -> tuple[Booleans, LayerTensors]:
    """Keeps the pairs of the mask."""
    del planned
    low_query, query_norm = direction(query, layer["query_range"], layer["qk_bits"])
    low_key, key_norm = direction(key, layer["key_range"], layer["qk_bits"])
    products = exact_matmul(low_query, np.swapaxes(low_key, -1, -2))
    scores = products * exact_product(query_norm * np.swapaxes(key_norm, -1, -2), 1)
    kept = reference_mask(
        scores, exists, layer["threshold"][:, 0], layer["mask_mantissa"], layer["mask_shift"]
    )
    return kept, {"scores": scores, "keep": kept[None]}


def _piece_pairs(mask: Booleans, piece: int) -> Integers:
    """Returns the kept pairs of pieces of rows, `[..., T, S / piece]`, of masks `[..., T, S]`."""
    missing = -mask.shape[-1] % piece
    padded = np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, missing)])
    number: Integers = padded.reshape(*mask.shape[:-1], -1, piece).sum(axis=-1)
    return number


def packed_slots(mask: Booleans, piece: int = PIECE, elements: int = ELEMENTS) -> Integers:
    """Returns the places of processing elements that packed and split rows take, `[...]`: `P sum(ceil(nnz / P))`.

    Empty pieces are dropped, the others split into as many segments as they need, and segments packed onto the array.

    Args:
      mask: Kept pairs, `[..., T, S]`.
      piece: Keys of a piece of a row; S: rows are not cut.
      elements: P, processing elements that share a piece.
    """
    segments = -(-_piece_pairs(mask, piece) // elements)
    slots: Integers = elements * segments.sum(axis=(-2, -1))
    return slots


def lockstep_slots(
    mask: Booleans, piece: int = PIECE, elements: int = ELEMENTS, rows: int = ROWS
) -> Integers:
    """Returns the places of processing elements that rows take without packing and splitting, `[...]`.

    Reconstruction: each of the array's rows of elements has one row of the mask. All work on the same keys and go on to
    the next piece when the row with most kept pairs there is done. Pieces that no row wants are left out; rows of the array
    that have no row of the mask do not count.

    Args:
      mask: Kept pairs, `[..., T, S]`.
      piece: Keys of a piece of a row.
      elements: Processing elements of a row of the array.
      rows: Rows of the array.
    """
    steps = -(-_piece_pairs(mask, piece) // elements)
    queries = steps.shape[-2]
    starts = np.arange(0, queries, rows)
    longest = np.maximum.reduceat(steps, starts, axis=-2).sum(axis=-1)
    slots: Integers = elements * (longest * np.minimum(rows, queries - starts)).sum(axis=-1)
    return slots


def packed_utilisation(mask: Booleans, piece: int = PIECE, elements: int = ELEMENTS) -> float:
    """Returns the share of processing elements that work, `sum(nnz / P) / sum(ceil(nnz / P))` over pieces of rows.

    Args:
      mask: Kept pairs, `[..., T, S]`.
      piece: Keys of a piece of a row; S: rows are not cut.
      elements: P, processing elements that share a piece.
    """
    return float(mask.sum() / max(packed_slots(mask, piece, elements).sum(), 1))


sanger = Reference(
    name="sanger",
    layer_shapes=layer_shapes,
    tensor_shapes=tensor_shapes,
    decision_tensors=("keep",),
    ranges={
        "threshold": (0, 1 << PROBABILITY_SHIFT),
        "query_range": (1, 1 << RANGE_SHIFT),
        "key_range": (1, 1 << RANGE_SHIFT),
        "mask_mantissa": (0, 1 << 15),
        "mask_shift": (0, 62),
    },
    check=check,
    filter=filter_pairs,
)
