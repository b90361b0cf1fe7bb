"""Exact top-k in integers: a stable sort of the exact scores.

The mechanism finds the same keys by bisection; the definition, a sort that puts the first of equals first, is ours.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from codesign.errors import ExportError
from codesign.references.integers import Booleans, Integers, exact_matmul
from codesign.references.protocol import Layer, LayerTensors, Reference, Shapes
from codesign.structure import ModelStructure

SHARE_SHIFT = 10  # kept shares are in 1/1024


def layer_shapes(structure: ModelStructure) -> Shapes:
    """Returns the shape of the kept shares."""
    return {"threshold": (structure.num_layers, structure.num_heads, 1)}


def tensor_shapes(structure: ModelStructure, batch_size: int, num_tokens: int) -> Shapes:
    """Returns the shape of the keep decisions, `[L, 1, B, H, T, S]`."""
    pairs = (batch_size, structure.num_heads, num_tokens, num_tokens)
    return {"keep": (structure.num_layers, 1, *pairs)}


def check(structure: ModelStructure, layers: Mapping[str, npt.NDArray[Any]]) -> None:
    """Checks that there is one round; raises `ExportError`."""
    del layers
    if structure.num_rounds != 1:
        raise ExportError(f"`num_rounds` must be 1 for `topk`, got {structure.num_rounds}")


def reference_top(scores: Integers, exists: Booleans, share: Integers) -> Booleans:
    """Returns which keys of a row are kept: of n that exist the `ceil(share n / 1024)` largest, the first of equals first.

    Args:
      scores: Whole numbers, `[B, H, T, S]`.
      exists: Pairs of a query and a key that it may see, `[B, 1, T, S]`.
      share: Kept share in 1/1024, `[H]`.
    """
    there = np.broadcast_to(exists, scores.shape)
    own = np.where(there, scores, np.iinfo(np.int64).min // 2)
    order = np.argsort(-own, axis=-1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(own.shape[-1])[None, None, None], axis=-1)
    number = -(-share[None, :, None] * there.sum(axis=-1) >> SHARE_SHIFT)
    kept: Booleans = there & (rank < number[..., None])
    return kept


def filter_pairs(
    layer: Layer, query: Integers, key: Integers, exists: Booleans, planned: LayerTensors
) -> tuple[Booleans, LayerTensors]:
    """Keeps the pairs of the largest scores of each row."""
    del planned
    scores = exact_matmul(query, np.swapaxes(key, -1, -2))
    kept = reference_top(scores, exists, layer["threshold"][:, 0])
    return kept, {"keep": kept[None]}


topk = Reference(
    name="topk",
    layer_shapes=layer_shapes,
    tensor_shapes=tensor_shapes,
    decision_tensors=("keep",),
    ranges={"threshold": (1, 1 << SHARE_SHIFT)},
    check=check,
    filter=filter_pairs,
)
