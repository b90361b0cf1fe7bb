"""SOFA's prediction of keys and scores, and its top-k by segment, in integers.

References:
  Wang et al., "SOFA", MICRO 2024, arXiv 2407.10416. Shifts, segments of fixed length and the clipping rule are ours.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from codesign.errors import ExportError
from codesign.references.integers import (
    Booleans,
    Integers,
    exact_matmul,
    leading_one,
    saturate,
)
from codesign.references.on_demand import predict_keys
from codesign.references.protocol import Layer, LayerTensors, Reference, Shapes
from codesign.structure import ModelStructure

SCORE_LIMIT = 32767  # 16-bit inputs of the sorter
SHARE_SHIFT = 10  # kept shares are in 1/1024
MAX_RADIUS = 65535  # clips nothing
MAX_SHIFT = 40  # more than any sum of products of 16-bit codes needs


def layer_shapes(structure: ModelStructure) -> Shapes:
    """Returns the shapes of shares and radii, of the shift of scores, and of the bits of a place in a segment."""
    layers = structure.num_layers
    return {
        "threshold": (layers, structure.num_heads, 2),
        "score_shift": (layers,),
        "tile_bits": (layers,),
    }


def tensor_shapes(structure: ModelStructure, batch_size: int, num_tokens: int) -> Shapes:
    """Returns the shapes of predicted keys, predicted scores, and what segments and radius keep, `[L, 2, B, H, T, S]`."""
    layers, heads = structure.num_layers, (batch_size, structure.num_heads, num_tokens)
    pairs = (*heads, num_tokens)
    return {
        "predicted_key": (layers, *heads, structure.head_dim),
        "scores": (layers, *pairs),
        "keep": (layers, 2, *pairs),
    }


def check(structure: ModelStructure, layers: Mapping[str, npt.NDArray[Any]]) -> None:
    """Checks the two rounds and their legal codes; raises `ExportError`."""
    if structure.num_rounds != 2:
        raise ExportError(
            f"`num_rounds` must be 2 for `sofa` (segments, radius), got {structure.num_rounds}"
        )
    share = np.asarray(layers["threshold"])[..., 0]
    if share.min() < 1 or share.max() > 1 << SHARE_SHIFT:
        raise ExportError("array `layers/threshold` must hold kept shares in [1, 1024] first")


def reference_segments(
    scores: Integers, exists: Booleans, share: Integers, radius: Integers, length: int
) -> tuple[Booleans, Booleans]:
    """Returns which keys are among the largest of their segment, and which of these lie within the radius.

    Args:
      scores: Predicted scores, `[B, H, T, S]`.
      exists: Pairs of a query and a key that it may see, `[B, 1, T, S]`.
      share: Kept share in 1/1024, `[H]`.
      radius: Largest distance from a segment's maximum, `[H]`.
      length: Keys of a segment.

    Returns:
      Both `[B, H, T, S]`.
    """
    largest = np.zeros(scores.shape, np.bool_)
    near = np.zeros(scores.shape, np.bool_)
    lowest = np.iinfo(np.int64).min // 2
    for start in range(0, scores.shape[-1], length):
        part = slice(start, start + length)
        there = np.broadcast_to(exists[..., part], scores[..., part].shape)
        own = np.where(there, scores[..., part], lowest)
        # A stable sort of the negated scores puts the lowest index first among equals.
        order = np.argsort(-own, axis=-1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.arange(own.shape[-1])[None, None, None], axis=-1)
        wanted = share[None, :, None] * there.sum(axis=-1)
        number = -(-wanted >> SHARE_SHIFT)
        largest[..., part] = there & (rank < number[..., None])
        least = own.max(axis=-1, keepdims=True) - radius[None, :, None, None]
        near[..., part] = there & (own >= least)
    return largest, largest & near


def filter_pairs(
    layer: Layer, query: Integers, key: Integers, exists: Booleans, planned: LayerTensors
) -> tuple[Booleans, LayerTensors]:
    """Keeps the pairs that segments and radius leave."""
    del key
    predicted = np.swapaxes(planned["predicted_key"], -1, -2)
    sums = exact_matmul(leading_one(query), predicted)
    scores = saturate(sums >> layer["score_shift"], SCORE_LIMIT)
    largest, kept = reference_segments(
        scores,
        exists,
        layer["threshold"][:, 0],
        layer["threshold"][:, 1],
        1 << int(layer["tile_bits"]),
    )
    return kept, {"scores": scores, "keep": np.stack([largest, kept])}


sofa = Reference(
    name="sofa",
    layer_shapes=layer_shapes,
    tensor_shapes=tensor_shapes,
    decision_tensors=("keep",),
    ranges={
        "threshold": (0, MAX_RADIUS),
        "score_shift": (0, MAX_SHIFT),
        "tile_bits": (2, 8),
    },
    check=check,
    plan=predict_keys,
    filter=filter_pairs,
)
