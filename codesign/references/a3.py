"""A3 in integers: all products of components sorted, taken from both ends, and the guard step by step.

The mechanism walks sorted columns of the keys; the definition, a stable sort of all products of a query, is ours.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from codesign.errors import ExportError
from codesign.references.integers import Booleans, Integers, any_of, exact_matmul
from codesign.references.protocol import Layer, LayerTensors, Reference, Shapes
from codesign.structure import ModelStructure

OFF = 2**40  # a head takes all keys without a search
SEARCH_BITS = (2, 8)


def layer_shapes(structure: ModelStructure) -> Shapes:
    """Returns the shapes of distances and search steps."""
    layers = structure.num_layers
    return {"threshold": (layers, structure.num_heads, 1), "search_bits": (layers,)}


def tensor_shapes(structure: ModelStructure, batch_size: int, num_tokens: int) -> Shapes:
    """Returns the shapes of the search's scores `[L, B, H, T, S]`, and of candidates and kept keys, `[L, 2, ...]`."""
    pairs = (batch_size, structure.num_heads, num_tokens, num_tokens)
    return {"scores": (structure.num_layers, *pairs), "keep": (structure.num_layers, 2, *pairs)}


def check(structure: ModelStructure, layers: Mapping[str, npt.NDArray[Any]]) -> None:
    """Checks that there is one distance; raises `ExportError`."""
    del layers
    if structure.num_rounds != 1:
        raise ExportError(f"`num_rounds` must be 1 for `a3`, got {structure.num_rounds}")


def searched_scores(
    query: Integers,
    key: Integers,
    visible: Booleans,
    steps: int,
    *,
    has_guard: bool = True,
) -> Integers:
    """Returns the scores of a search, `[T, S]`, of one head.

    Args:
      query: Codes, `[T, d]`.
      key: Codes of keys that exist, `[S, d]`.
      visible: Whether a query may attend to a key, `[T, S]`.
      steps: M_s.
      has_guard: Whether the smallest product is left out where the sum over all keys would turn negative.
    """
    num_queries, (num_keys, head_dim) = len(query), key.shape
    products = (query[:, None, :] * key[None]).reshape(num_queries, -1)
    owner = np.repeat(np.arange(num_keys), head_dim)
    seen = np.repeat(visible, head_dim, axis=1)
    number = seen.sum(axis=1)
    far = np.iinfo(np.int64).min // 2  # what is not seen stands behind all others
    largest = np.argsort(np.where(seen, -products, -far), axis=1, kind="stable")
    smallest = np.argsort(np.where(seen, products, -far), axis=1, kind="stable")
    scores = np.zeros((num_queries, num_keys), np.int64)
    total = np.zeros(num_queries, np.int64)
    low = np.zeros(num_queries, np.int64)  # smallest products taken so far
    every = np.arange(num_queries)
    last = products.shape[1] - 1
    for step in range(steps):
        index = largest[every, min(step, last)]
        value = np.where(step < number, products[every, index], 0)
        scores[every, owner[index]] += value
        total += value
        index = smallest[every, np.minimum(low, last)]
        is_taken = low < number
        if has_guard:
            is_taken &= total + products[every, index] >= 0
        value = np.where(is_taken, products[every, index], 0)
        scores[every, owner[index]] += value
        total += value
        low += is_taken
    return scores


def filter_pairs(
    layer: Layer, query: Integers, key: Integers, exists: Booleans, planned: LayerTensors
) -> tuple[Booleans, LayerTensors]:
    """Keeps the candidates whose exact score lies near enough to the largest of them."""
    del planned
    steps = 1 << int(layer["search_bits"])
    shape = (*query.shape[:3], key.shape[2])
    scores = np.zeros(shape, np.int64)
    there = any_of(exists[:, 0], 1)  # keys that some query sees: those that exist
    for example, head in np.ndindex(*shape[:2]):
        own = there[example]
        scores[example, head][:, own] = searched_scores(
            query[example, head], key[example, head][own], exists[example, 0][:, own], steps
        )
    pairs = np.broadcast_to(exists, shape)
    distance = layer["threshold"][:, 0][None, :, None, None]
    positive = pairs & (scores > 0) & (distance != OFF)
    searches = any_of(positive, -1, keepdims=True)
    mask: Booleans = positive | (pairs & ~searches)
    exact = exact_matmul(query, np.swapaxes(key, -1, -2))
    top = np.where(mask, exact, np.iinfo(np.int64).min // 2).max(axis=-1, keepdims=True)
    kept: Booleans = mask & (exact >= top - distance)
    return kept, {"scores": scores, "keep": np.stack([mask, kept])}


a3 = Reference(
    name="a3",
    layer_shapes=layer_shapes,
    tensor_shapes=tensor_shapes,
    decision_tensors=("keep",),
    ranges={"threshold": (0, OFF), "search_bits": SEARCH_BITS},
    check=check,
    filter=filter_pairs,
)
