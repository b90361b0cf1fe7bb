"""ESACT's prediction by hybrid logarithms, its top-k rows, and the rows it copies, in integers.

References:
  Liu et al., "ESACT", arXiv 2512.02403. Shifts, the measure of similarity, its threshold and the vote are reconstructions.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from codesign.errors import ExportError
from codesign.references.integers import (
    Booleans,
    Integers,
    estimated_operand,
    exact_matmul,
    hybrid_log,
    saturate,
)
from codesign.references.protocol import Layer, LayerTensors, Reference, Shapes, check_no_rounds
from codesign.structure import ModelStructure

WINDOW = 8  # rows that are compared with each other
SHARE_SHIFT = 10  # kept shares are in 1/1024
SIMILARITY_SHIFT = 6  # similarity thresholds are in 1/64
SIMILARITY_OFF = 128  # code of a head that copies no row
SCORE_LIMIT = (1 << 19) - 1  # 20-bit inputs of the top-k unit
_CODE_BITS, _CODE_LIMIT = 8, 127  # of predicted queries and keys


def layer_shapes(structure: ModelStructure) -> Shapes:
    """Returns the shapes of shares and similarity thresholds, and of the votes that a feed-forward branch is copied for."""
    layers = structure.num_layers
    return {"threshold": (layers, structure.num_heads, 2), "vote_cut": (layers,)}


def tensor_shapes(structure: ModelStructure, batch_size: int, num_tokens: int) -> Shapes:
    """Returns the shapes of predictions, what is kept, and the rows whose attention and whose branch a row takes."""
    layers, rows = structure.num_layers, (batch_size, structure.num_heads, num_tokens)
    return {
        "predicted_query": (layers, *rows, structure.head_dim),
        "predicted_key": (layers, *rows, structure.head_dim),
        "scores": (layers, *rows, num_tokens),
        "keep": (layers, 1, *rows, num_tokens),
        "source": (layers, *rows),
        "ffn_source": (layers, batch_size, num_tokens),
    }


def check(structure: ModelStructure, layers: Mapping[str, npt.NDArray[Any]]) -> None:
    """Checks the legal codes; raises `ExportError`."""
    check_no_rounds(structure, layers)
    threshold, cut = np.asarray(layers["threshold"]), np.asarray(layers["vote_cut"])
    if threshold[..., 0].min() < 1:
        raise ExportError("array `layers/threshold` must hold kept shares in [1, 1024] first")
    if threshold[..., 1].max() > SIMILARITY_OFF:
        raise ExportError(
            "array `layers/threshold` must hold similarity thresholds in [0, 128] second"
        )
    if cut.max() > structure.num_heads + 1:
        raise ExportError(
            f"array `layers/vote_cut` must lie in [1, {structure.num_heads + 1}], got {cut.max()}"
        )


def score_shift(head_dim: int) -> int:
    """Returns by how many bits predicted scores are shifted: the largest of heads of that width fill 20 bits."""
    largest = head_dim << 2 * (_CODE_BITS - 1)
    return max(0, (largest - 1).bit_length() - SCORE_LIMIT.bit_length())


def reference_top(scores: Integers, exists: Booleans, share: Integers) -> Booleans:
    """Returns the largest scores of each row, the first of equal ones, `ceil(share n / 1024)` of the n that exist.

    Args:
      scores: Predicted scores, `[B, H, T, S]`.
      exists: Pairs that exist, `[B, 1, T, S]`.
      share: Kept share in 1/1024, `[H]`.

    Returns:
      `[B, H, T, S]`.
    """
    there = np.broadcast_to(exists, scores.shape)
    order = np.argsort(np.where(there, -scores, np.iinfo(np.int64).max), axis=-1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(scores.shape[-1])[None, None, None], axis=-1)
    number = -(-share[None, :, None] * there.sum(axis=-1) >> SHARE_SHIFT)
    kept: Booleans = there & (rank < number[..., None])
    return kept


def reference_sources(
    rows: Integers, similarity: Integers, window: int = WINDOW, off_code: int = SIMILARITY_OFF
) -> Integers:
    """Returns the row whose result each row takes, itself where it is critical.

    Args:
      rows: Kept predicted scores, others 0, `[B, H, T, S]`.
      similarity: Thresholds in 1/64, `[H]`.
      window: Rows of a window.
      off_code: Threshold of a head that copies nothing.

    Returns:
      Rows, `[B, H, T]`.
    """
    batch, heads, num_rows, _ = rows.shape
    sources = np.broadcast_to(np.arange(num_rows), (batch, heads, num_rows)).copy()
    sizes = np.abs(rows).sum(axis=-1)
    reach = similarity[None, :, None] * sizes
    far = np.iinfo(np.int64).max
    for row in range(num_rows):
        first = row - row % window
        nearest = np.full((batch, heads), far)
        for other in range(first, row):
            distance = np.abs(rows[:, :, row] - rows[:, :, other]).sum(axis=-1)
            is_similar = (
                (sources[:, :, other] == other)
                & (distance << SIMILARITY_SHIFT <= reach[:, :, other])
                & (similarity != off_code)
                & (distance < nearest)
            )
            sources[:, :, row] = np.where(is_similar, other, sources[:, :, row])
            nearest = np.where(is_similar, distance, nearest)
    return sources


def reference_votes(sources: Integers, cut: int) -> Integers:
    """Returns the token whose branch each token takes: the one most heads name, the first of equals, if `cut` do.

    Args:
      sources: Rows that the heads name, `[B, H, T]`.
      cut: Heads that must agree.

    Returns:
      Tokens, `[B, T]`.
    """
    batch, _, num_rows = sources.shape
    result = np.broadcast_to(np.arange(num_rows), (batch, num_rows)).copy()
    for row in range(num_rows):
        votes = (sources[:, :, row, None] == np.arange(num_rows)).sum(axis=1)
        most = votes.argmax(axis=-1)
        named = np.take_along_axis(result, most[:, None], axis=1)[:, 0]
        result[:, row] = np.where(votes.max(axis=-1) >= cut, named, row)
    return result


def predict(
    structure: ModelStructure, layer: Layer, inputs: Integers, exists: Booleans, carry: LayerTensors
) -> LayerTensors:
    """Returns all that is decided before Q, K and V exist."""
    del carry
    columns = np.split(hybrid_log(layer["qkv_weight"]), 3, axis=-1)
    coded, bits = hybrid_log(inputs), int(layer["qk_bits"])
    query, key = (
        saturate(
            estimated_operand(layer, exact_matmul(coded, columns[part]), part, structure.num_heads)
            >> (bits - _CODE_BITS),
            _CODE_LIMIT,
        )
        for part in (0, 1)
    )
    sums = exact_matmul(hybrid_log(query), np.swapaxes(hybrid_log(key), -1, -2))
    scores = saturate(sums >> score_shift(structure.head_dim), SCORE_LIMIT)
    keep = reference_top(scores, exists, layer["threshold"][:, 0])
    sources = reference_sources(np.where(keep, scores, 0), layer["threshold"][:, 1])
    return {
        "predicted_query": query,
        "predicted_key": key,
        "scores": scores,
        "keep": keep[None],
        "source": sources,
        "ffn_source": reference_votes(sources, int(layer["vote_cut"])),
    }


def filter_pairs(
    layer: Layer, query: Integers, key: Integers, exists: Booleans, planned: LayerTensors
) -> tuple[Booleans, LayerTensors]:
    """Keeps what was planned."""
    del layer, query, key, exists
    return planned["keep"][0], {}


def copy_rows(layer: Layer, y: Integers, site: str, planned: LayerTensors) -> Integers:
    """Returns what leaves, rows that copy another replaced by it."""
    del layer
    if site == "attention":
        sources = planned["source"]
        heads = y.reshape(*y.shape[:2], sources.shape[1], -1)
        taken = np.take_along_axis(heads, np.swapaxes(sources, 1, 2)[..., None], axis=1)
        return taken.reshape(y.shape)
    if site == "ffn_branch":
        return np.take_along_axis(y, planned["ffn_source"][..., None], axis=1)
    return y


esact = Reference(
    name="esact",
    layer_shapes=layer_shapes,
    tensor_shapes=tensor_shapes,
    decision_tensors=("keep", "source", "ffn_source"),
    ranges={"threshold": (0, 1 << SHARE_SHIFT), "vote_cut": (1, 1 << 16)},
    check=check,
    plan=predict,
    filter=filter_pairs,
    on_output=copy_rows,
)
