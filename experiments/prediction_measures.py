"""How well scores predicted without multipliers stand in for exact ones, on integer codes of queries and keys. NumPy alone.

Everything is measured on one layer of one example at a time, its padded tokens cut off: row t has the keys that it may see,
all of them or, of a decoder, those up to its own.

References:
  Liu et al., "ESACT", arXiv 2512.02403: rows of a predicted attention matrix resemble their neighbours, and hybrid
  logarithms keep that better than powers of two. Wang et al., "SOFA", arXiv 2407.10416: one operand in leading-one form
  ranks keys better than two; top-k by segment; order of keys; order of fetches. All measures are ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from codesign.references.fetch_order import cold_loads, in_order_loads, reuse_aware_loads
from codesign.references.integers import (
    Booleans,
    Integers,
    exact_matmul,
    hybrid_log,
    leading_one,
    round_shift,
    saturate,
)
from codesign.references.sorted_attention import ORDERS, Counts, new_references, products

Floats: TypeAlias = npt.NDArray[np.float64]

MIN_KEYS = 16
"""Rows with fewer keys are left out: a tenth of them is one key."""
SHARES = (0.25, 0.10)
"""Kept shares of the recall of the largest."""
SEGMENTS = (1, 2, 4, 8, 16, 32)
"""Segments of a row; a row must have four keys for each."""
MIN_SEGMENT = 4
SEGMENT_SHARE = 0.25
"""Kept share of the top-k by segment, of its operations and of its fetches (arXiv 2407.10416: 25 %)."""
NUM_SEGMENTS = 4
"""Segments of the row where operations and fetches are counted (arXiv 2407.10416: 4)."""
FLASH_TILE = 16
"""Kept keys of a tile of FlashAttention, where it does not take segments for tiles."""
BLOCKS = (128, 8)
"""Queries that share what they read: those that run in parallel (arXiv 2407.10416, Table III), and few (ours)."""
BUFFERS = (8, 32)
"""Vectors that the buffer of keys and values holds."""
SIMILARITY_SHARE = 0.15
"""Keys of a row whose scores are compared with those of its neighbour (spec of ESACT, start value: a reconstruction)."""
WINDOW = 8
"""Rows that are compared with each other (the same)."""
THRESHOLDS = (0.125, 0.25, 0.5, 1.0)
"""Distances, as a part of the earlier row's sum, up to which a row is similar; training starts at 0.25."""
_LOWEST = -(1 << 44)  # below any score, and left of it in int64 there is room for segments

CODES: Mapping[str, Callable[[Integers], Integers]] = {
    "leading_one": leading_one,
    "hybrid_log": hybrid_log,
}
PREDICTIONS = (
    *("one_leading_one", "two_leading_ones", "one_hybrid_log", "two_hybrid_logs"),
    "chain",
)
"""Of the query or of both operands; `chain` predicts the keys from tokens and leading ones of the weights too."""
MATRICES = ("exact", *CODES)


@dataclass(frozen=True, kw_only=True)
class LayerSample:
    """What was measured in one layer of one example.

    Attributes:
      distances: `adjacent` and `window`, each by matrix (`MATRICES`): distance of a row from an earlier one over the sum of
        the earlier one's scores, `[H, P]`; of windows, P runs over the 28 pairs of one after the other.
      sums: By name, a sum over rows `[H]` and the number of rows.
      operations: By order of `ORDERS`, and `flash_tiles` and `products`: operations of all rows by kind.
      loads: Vectors read, by block of queries and order of fetching.
    """

    distances: Mapping[str, Mapping[str, Floats]]
    sums: Mapping[str, tuple[Floats, int]]
    operations: Mapping[str, Mapping[str, int]]
    loads: Mapping[str, int]


def ranks(scores: Integers, exists: Booleans) -> Integers:
    """Returns the place of every key in its row in falling order, equal ones by index, those that do not exist last.

    Args:
      scores: `[..., T, S]`.
      exists: `[T, S]`.
    """
    return _places(np.where(exists, -scores, -_LOWEST))


def segment_ranks(
    scores: Integers, exists: Booleans, num_segments: int, *, dealt: bool = False
) -> tuple[Integers, Integers]:
    """Returns the place of every key in its segment, as `ranks`, and the segments: of n keys, key j is in floor(j G / n).

    Args:
      scores: `[..., T, S]`.
      exists: `[T, S]`.
      num_segments: G.
      dealt: Key j is in segment j modulo G instead: neighbours are in different ones.

    Returns:
      `[..., T, S]`, and `[T, S]`; keys that do not exist are in segment G.
    """
    number = exists.sum(axis=-1, keepdims=True)
    place = np.cumsum(exists, axis=-1) - 1
    owner = place % num_segments if dealt else place * num_segments // np.maximum(number, 1)
    segment = np.where(exists, owner, num_segments)
    sizes = np.stack([(segment == g).sum(axis=-1) for g in range(num_segments + 1)], axis=-1)
    starts = np.cumsum(sizes, axis=-1) - sizes
    order: Integers = _places(segment * -_LOWEST * 2 - np.where(exists, scores, 0))
    before: Integers = np.take_along_axis(starts, segment, axis=-1)
    return order - before, segment


def _places(keys: npt.NDArray[np.signedinteger]) -> Integers:
    """Returns the place of every element in the rising order of its row, equal ones by index."""
    order = np.argsort(keys, axis=-1, kind="stable")
    place: Integers = np.empty_like(order)
    np.put_along_axis(place, order, np.broadcast_to(np.arange(keys.shape[-1]), keys.shape), axis=-1)
    return place


def number_of(share: float, exists: Booleans) -> Integers:
    """Returns how many keys a share of each row's is, rounded up, `[T]`."""
    # A share such as 0.1 of 30 keys is 3, not the 4 that its last bit would make of it.
    number: Integers = np.ceil(share * exists.sum(axis=-1) - 1e-9).astype(np.int64)
    return number


def segment_winners(
    scores: Integers, exists: Booleans, num_segments: int, *, dealt: bool = False
) -> tuple[Booleans, Integers, Integers]:
    """Returns the largest of each segment: of each as many, `SEGMENT_SHARE` of the row over the segments, rounded up.

    Returns:
      Which keys are kept `[..., T, S]`; the places in, and the segments of `segment_ranks`.
    """
    place, segment = segment_ranks(scores, exists, num_segments, dealt=dealt)
    of_each = -(-number_of(SEGMENT_SHARE, exists) // num_segments)
    return exists & (place < of_each[:, None]), place, segment


def found_share(kept: Booleans, wanted_rank: Integers) -> Floats:
    """Returns the share of kept keys that are among as many of the largest, `[..., T]`.

    Args:
      kept: `[..., T, S]`, at least one of each row.
      wanted_rank: `ranks` of the scores that count.
    """
    number = kept.sum(axis=-1)
    share: Floats = np.sum(kept & (wanted_rank < number[..., None]), axis=-1) / number
    return share


def row_distances(scores: Integers, exists: Booleans, later: Integers, earlier: Integers) -> Floats:
    """Returns `D / N` of pairs of rows: L1 distance of their largest scores over the sum of the earlier one's magnitudes.

    Scores that are not among the largest `SIMILARITY_SHARE` of their row are 0.

    Args:
      scores: `[H, T, S]`.
      exists: `[T, S]`.
      later: Rows, `[P]`.
      earlier: The rows that they are compared with, `[P]`.

    Returns:
      `[H, P]`.
    """
    number = number_of(SIMILARITY_SHARE, exists)
    kept = np.where(exists & (ranks(scores, exists) < number[:, None]), scores, 0)
    apart = np.abs(kept[:, later] - kept[:, earlier]).sum(axis=-1)
    distances: Floats = apart / np.maximum(np.abs(kept).sum(axis=-1)[:, earlier], 1)
    return distances


def window_pairs() -> tuple[Integers, Integers]:
    """Returns the places in a window of the later and the earlier row of each of its 28 pairs, both `[28]`."""
    later, earlier = np.tril_indices(WINDOW, -1)
    return later, earlier


def critical_rows(distances: Floats, threshold: float) -> Booleans:
    """Returns which rows of windows are critical: similar to no critical row before them.

    Args:
      distances: Of the 28 pairs of each window, `[..., 28]`.
      threshold: Largest `D / N` of similar rows.

    Returns:
      `[..., 8]`; the first of a window is always critical.
    """
    later, _ = window_pairs()
    critical = np.ones((*distances.shape[:-1], WINDOW), np.bool_)
    for row in range(1, WINDOW):
        similar = critical[..., :row] & (distances[..., later == row] <= threshold)
        critical[..., row] = ~similar.any(axis=-1)
    return critical


def low_codes(codes: Integers) -> Integers:
    """Returns the 8-bit codes nearest to 16-bit codes."""
    return saturate(round_shift(codes, 8), 127)


def measure_layer(
    query: Integers, key: Integers, chain: Integers, *, is_causal: bool
) -> LayerSample | None:
    """Measures one layer of one example; None if it has fewer than `MIN_KEYS + WINDOW` tokens.

    Args:
      query: 16-bit codes of the tokens that exist, `[H, T, d]`.
      key: The same, `[H, T, d]`.
      chain: Scores that SOFA predicts from tokens and queries, `[H, T, T]`.
      is_causal: Whether a token sees only those before it.
    """
    tokens = query.shape[1]
    if tokens < MIN_KEYS + WINDOW:
        return None
    every = np.ones((tokens, tokens), np.bool_)
    exists = np.tril(every) if is_causal else every
    exact = _scores(query, key)
    first = MIN_KEYS - 1 if is_causal else 0
    rows = slice(first, None)
    seen = exists[rows]
    exact_rank = ranks(exact[:, rows], seen)
    sums = _recalls(query, key, chain, rows, seen, exact_rank)
    sums |= _segment_errors(exact[:, rows], chain[:, rows], seen, exact_rank)
    return LayerSample(
        distances=_distances(low_codes(query), low_codes(key), exists, first),
        sums=sums,
        operations=_operations(exact[:, rows], chain[:, rows], seen, query.shape[-1]),
        loads=_loads(segment_winners(chain, exists, NUM_SEGMENTS)[0]),
    )


def _scores(query: Integers, key: Integers) -> Integers:
    """Returns products `[H, T, S]` of `[H, T, d]` and `[H, S, d]`."""
    return exact_matmul(query, np.swapaxes(key, -1, -2))


def _recalls(
    query: Integers,
    key: Integers,
    chain: Integers,
    rows: slice,
    exists: Booleans,
    exact_rank: Integers,
) -> dict[str, tuple[Floats, int]]:
    """Returns the sums over rows of how many of the exact largest each prediction finds."""
    predicted = {
        "one_leading_one": _scores(leading_one(query[:, rows]), key),
        "two_leading_ones": _scores(leading_one(query[:, rows]), leading_one(key)),
        "one_hybrid_log": _scores(hybrid_log(query[:, rows]), key),
        "two_hybrid_logs": _scores(hybrid_log(query[:, rows]), hybrid_log(key)),
        "chain": chain[:, rows],
    }
    found = {}
    for name in PREDICTIONS:
        rank = ranks(predicted[name], exists)
        for share in SHARES:
            kept = exists & (rank < number_of(share, exists)[:, None])
            found[f"recall.{share:g}.{name}"] = _summed(found_share(kept, exact_rank))
    return found


def _segment_errors(
    exact: Integers, predicted: Integers, exists: Booleans, exact_rank: Integers
) -> dict[str, tuple[Floats, int]]:
    """Returns the sums over rows of the share of kept keys that are not among as many of the largest of the whole row.

    `exact`: segments of exact scores; `dealt`: the same, neighbours in different segments; `random`: of random rows of as
    many keys; `predicted`: of predicted scores, against the whole row of the same; `total`: of predicted ones, against the
    exact whole row. Only rows with `MIN_SEGMENT` keys for each segment.
    """
    # Only the order counts, so that any continuous distribution gives the same.
    random = np.random.default_rng(0).integers(1 << 30, size=exact.shape)
    random_rank = ranks(random, exists)
    predicted_rank = ranks(predicted, exists)
    found: dict[str, tuple[Floats, int]] = {}
    for number in SEGMENTS:
        long = exists.sum(axis=-1) >= number * MIN_SEGMENT
        if not long.any():
            continue
        there = exists[long]
        on_exact, on_predicted = (
            segment_winners(scores[:, long], there, number)[0] for scores in (exact, predicted)
        )
        dealt = segment_winners(exact[:, long], there, number, dealt=True)[0]
        on_random = segment_winners(random[:, long], there, number)[0]
        errors = {
            "exact": found_share(on_exact, exact_rank[:, long]),
            "dealt": found_share(dealt, exact_rank[:, long]),
            "random": found_share(on_random, random_rank[:, long]),
            "predicted": found_share(on_predicted, predicted_rank[:, long]),
            "total": found_share(on_predicted, exact_rank[:, long]),
        }
        for name, share in errors.items():
            found[f"segments.{name}.{number}"] = _summed(1.0 - share)
        keys = np.broadcast_to(there.sum(axis=-1), on_exact.shape[:-1])
        found[f"segments.keys.{number}"] = _summed(keys)
        found[f"segments.kept.{number}"] = _summed(on_exact.sum(axis=-1) / keys)
    return found


def _summed(rows: npt.NDArray[np.number]) -> tuple[Floats, int]:
    """Returns the sum over rows of values `[H, T]`, and the number of rows."""
    return np.sum(rows, axis=-1, dtype=np.float64), rows.shape[-1]


def _distances(
    query: Integers, key: Integers, exists: Booleans, first: int
) -> dict[str, dict[str, Floats]]:
    """Returns the distances of rows from `first` on, by pairs and matrix, from 8-bit codes."""
    tokens = len(exists)
    later_place, earlier_place = window_pairs()
    starts = np.arange(-(-first // WINDOW) * WINDOW, tokens - WINDOW + 1, WINDOW)
    later = {
        "adjacent": np.arange(first + 1, tokens),
        "window": np.ravel(starts[:, None] + later_place),
    }
    earlier = {
        "adjacent": later["adjacent"] - 1,
        "window": np.ravel(starts[:, None] + earlier_place),
    }
    matrices = {"exact": _scores(query, key)}
    matrices |= {name: _scores(code(query), code(key)) for name, code in CODES.items()}
    return {
        pairs: {
            name: row_distances(scores, exists, later[pairs], earlier[pairs])
            for name, scores in matrices.items()
        }
        for pairs in later
    }


def _operations(
    exact: Integers, predicted: Integers, exists: Booleans, head_dim: int
) -> dict[str, dict[str, int]]:
    """Returns the operations of attention over the winners of predicted segments, by order of the keys."""
    kept, place, segment = segment_winners(predicted, exists, NUM_SEGMENTS)
    inside = [kept & (segment == number) for number in range(NUM_SEGMENTS)]
    num_keys = np.stack([one.sum(axis=-1) for one in inside], axis=-1)
    best = np.stack([np.where(one, exact, _LOWEST).max(axis=-1) for one in inside], axis=-1)
    # Issued first is what was predicted to be the largest.
    leaders = [one & (place == 0) for one in inside]
    first = np.stack([np.where(one, exact, _LOWEST).max(axis=-1) for one in leaders], axis=-1)
    rises = {
        "flash_on_demand": new_references(best, num_keys),
        "descending_in_sequence": new_references(first, num_keys),
    }
    counted = {
        name: _total(count(num_keys, rises.get(name, num_keys > 0), head_dim))
        for name, count in ORDERS.items()
    }
    keys = num_keys.sum(axis=-1)
    full = np.arange(-(-int(keys.max()) // FLASH_TILE)) * FLASH_TILE
    tiles = np.clip(keys[..., None] - full, 0, FLASH_TILE)
    counted["flash_tiles"] = _total(ORDERS["flash"](tiles, tiles > 0, head_dim))
    counted["products"] = _total(products(num_keys, head_dim))
    counted["order"] = {"first_is_largest": int((first == best).sum()), "segments": first.size}
    return counted


def _total(counts: Counts) -> dict[str, int]:
    """Returns the operations of all rows."""
    return {kind: int(np.sum(values)) for kind, values in counts.items()}


def _loads(kept: Booleans) -> dict[str, int]:
    """Returns the vectors read for masks `[H, T, S]`, by block and order of fetching, over heads and blocks of queries.

    `stream` reads every key up to the last one wanted once for each block.
    """
    found: dict[str, int] = {}
    for size in BLOCKS:
        blocks = [
            head[start : start + size] for head in kept for start in range(0, len(head), size)
        ]
        loads = {
            "reuse_aware": [reuse_aware_loads(block) for block in blocks],
            "cold": [cold_loads(block) for block in blocks],
            "stream": [int(np.flatnonzero(block.any(axis=0))[-1]) + 1 for block in blocks],
        }
        for vectors in BUFFERS:
            loads[f"in_order_{vectors}"] = [in_order_loads(block, vectors) for block in blocks]
        found |= {f"{size}.{name}": sum(numbers) for name, numbers in loads.items()}
    return found
