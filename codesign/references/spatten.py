"""SpAtten in integers: importances summed over layers, cascades by stable sorts, rows that read low bits, pruned values.

The mechanism selects by bisection; the definition, sorts that put the first of equals first, is ours.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from codesign.errors import ExportError
from codesign.references.integers import (
    Booleans,
    Integers,
    any_of,
    exact_matmul,
    exp_table,
    exponentials,
)
from codesign.references.protocol import Layer, LayerTensors, Reference, Shapes
from codesign.structure import ModelStructure

SHARE_SHIFT = 10  # shares are in 1/1024
LOW_BITS = 4  # of a score, read on demand
PROBABILITY_SHIFT = 8  # the threshold for them is in 1/256
ALWAYS = (1 << PROBABILITY_SHIFT) + 1
FACTOR_BITS = 10
PROBABILITY_BITS = 16  # in which probabilities of all layers are summed


def layer_shapes(structure: ModelStructure) -> Shapes:
    """Returns the shapes of shares and thresholds, and of the factor on heads' outputs."""
    return {"threshold": (structure.num_layers, 4), "head_factor": (structure.num_layers,)}


def tensor_shapes(structure: ModelStructure, batch_size: int, num_tokens: int) -> Shapes:
    """Returns the shapes of tokens and heads that live, kept and re-read pairs, scores, and pairs whose value is used."""
    layers, heads = structure.num_layers, structure.num_heads
    pairs = (batch_size, heads, num_tokens, num_tokens)
    return {
        "tokens": (layers, batch_size, num_tokens),
        "heads": (layers, batch_size, heads, num_tokens),
        "keep": (layers, 2, *pairs),
        "raw_scores": (layers, *pairs),
        "used": (layers, *pairs),
    }


def check(structure: ModelStructure, layers: Mapping[str, npt.NDArray[Any]]) -> None:
    """Checks the ranges by entry and that cumulative shares never rise; raises `ExportError`."""
    if structure.num_rounds:
        raise ExportError(f"`num_rounds` must be 0 for `spatten`, got {structure.num_rounds}")
    stored = np.asarray(layers["threshold"], np.int64)
    shares = stored[:, :3]
    if np.any((shares < 1) | (shares > 1 << SHARE_SHIFT)):
        raise ExportError(
            "array `layers/threshold` must hold shares of 1 to 1024 in its first three columns"
        )
    if np.any(np.diff(shares[:, :2], axis=0) > 0):
        raise ExportError(
            "shares of tokens and heads in `layers/threshold` must not rise from layer to layer"
        )


def first_largest(scores: Integers, exists: Booleans, share: int) -> Booleans:
    """Returns of the n of a row that exist the `ceil(share n / 1024)` largest, the first of equals first, `[..., S]`."""
    own = np.where(exists, scores, np.iinfo(np.int64).min // 2)
    order = np.argsort(-own, axis=-1, kind="stable")
    rank = np.empty_like(order)
    places = np.broadcast_to(np.arange(own.shape[-1]), order.shape)
    np.put_along_axis(rank, order, places, axis=-1)
    number = -(-share * exists.sum(axis=-1, keepdims=True) >> SHARE_SHIFT)
    kept: Booleans = exists & (rank < number)
    return kept


def start(structure: ModelStructure, batch_size: int, num_tokens: int) -> LayerTensors:
    """Returns importances of keys by query and of heads, and pairs left; no layer has added to them yet."""
    pairs = (batch_size, num_tokens, num_tokens)
    return {
        "token": np.zeros(pairs, np.int64),
        "head": np.zeros((batch_size, num_tokens, structure.num_heads), np.int64),
        "exists": np.zeros(pairs, np.bool_),
        "left": np.zeros(pairs, np.bool_),
        "is_first": np.ones((), np.bool_),
    }


def plan(
    structure: ModelStructure, layer: Layer, inputs: Integers, exists: Booleans, carry: LayerTensors
) -> LayerTensors:
    """Returns tokens that live on, `heads` `[B, H, T]` that queries compute, pairs left, and those left of tokens alone."""
    del inputs
    pairs = exists[:, 0]
    is_first = bool(carry["is_first"])
    at_start = pairs if is_first else carry["exists"]
    before = pairs if is_first else carry["left"]
    rows = any_of(pairs, 1)  # a token that exists sees itself, and some query sees it
    there = rows[:, :, None]
    is_young = (at_start & there).sum(axis=1) < rows.sum(axis=1)[:, None]
    length = pairs.shape[-1]
    stays = (np.eye(length, dtype=np.bool_) & is_young[:, None, :]) | (np.arange(length) == 0)
    largest = first_largest(carry["token"], at_start, int(layer["threshold"][0]))
    left = before & (stays | is_first | largest)
    tokens = any_of(left & there, 1)
    ones = np.ones(carry["head"].shape, np.bool_)
    by_query = first_largest(carry["head"], ones, int(layer["threshold"][1])) | is_first
    rows = np.swapaxes(by_query, 1, 2) & tokens[:, None, :]
    return {
        "tokens": tokens,
        "heads": rows,
        "exists": at_start,
        "left": left[:, None] & np.swapaxes(by_query, 1, 2)[..., None],
        "keys": left,
    }


def filter_pairs(
    layer: Layer, query: Integers, key: Integers, exists: Booleans, planned: LayerTensors
) -> tuple[Booleans, LayerTensors]:
    """Keeps the planned pairs; scores come from high bits, in rows whose largest probability is small from all."""
    kept = exists & planned["left"]
    high = exact_matmul(query >> LOW_BITS, np.swapaxes(key >> LOW_BITS, -1, -2)) << 2 * LOW_BITS
    whole = exact_matmul(query, np.swapaxes(key, -1, -2))
    top = np.where(kept, high, np.iinfo(np.int64).min // 2).max(axis=-1, keepdims=True)
    distance = np.where(kept, top - high, 0)
    masses = np.where(kept, exponentials(distance, layer["exp_mantissa"], layer["exp_shift"]), 0)
    total = masses.sum(axis=-1, keepdims=True)
    code = int(layer["threshold"][3])
    is_small = (int(exp_table()[0]) << PROBABILITY_SHIFT) < code * total
    low = (is_small | (code == ALWAYS)) & (total > 0)
    computed = kept & planned["heads"][..., None]
    return kept, {
        "keep": np.stack([computed, computed & low]),
        "raw_scores": np.where(low, whole, high),
    }


def on_probabilities(
    layer: Layer, probabilities: Integers, kept: Booleans, planned: LayerTensors
) -> tuple[Integers, LayerTensors]:
    """Keeps the largest probabilities of each row."""
    del planned
    used = first_largest(probabilities, kept, int(layer["threshold"][2]))
    return np.where(used, probabilities, 0), {"used": used}


def carry_on(
    layer: Layer, carry: LayerTensors, tensors: LayerTensors, exists: Booleans
) -> LayerTensors:
    """Adds what each query, and those that it can see, attended to, and the sizes of heads' outputs."""
    probabilities = tensors["probabilities"] << (PROBABILITY_BITS - int(layer["qk_bits"]))
    rows = any_of(exists[:, 0], 1)
    known = (exists[:, 0] & rows[:, :, None] & rows[:, None, :]).astype(np.int64)
    size = np.abs(tensors["context"])
    by_head = size.reshape(*size.shape[:2], carry["head"].shape[2], -1).sum(axis=-1)
    return {
        "token": carry["token"] + exact_matmul(known, probabilities.sum(axis=1)),
        "head": carry["head"] + exact_matmul(known, by_head * int(layer["head_factor"])),
        "exists": tensors["exists"],
        "left": tensors["keys"],
        "is_first": np.zeros((), np.bool_),
    }


spatten = Reference(
    name="spatten",
    layer_shapes=layer_shapes,
    tensor_shapes=tensor_shapes,
    decision_tensors=("keep", "used"),
    ranges={"threshold": (0, 1 << SHARE_SHIFT), "head_factor": (1, 1 << FACTOR_BITS)},
    check=check,
    start=start,
    plan=plan,
    filter=filter_pairs,
    on_probabilities=on_probabilities,
    carry=carry_on,
)
