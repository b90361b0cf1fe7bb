"""The integer path of each mechanism: hand examples, exact rationals, limits; and the exact arithmetic."""

import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import random_deployment

from codesign.errors import ExportError, UnknownNameError
from codesign.references import (
    REFERENCES,
    TENSORS,
    layer_shapes,
    reference_by_name,
    tensor_names,
    tensor_shapes,
)
from codesign.references.acceltran import PRUNED_SITES, prune
from codesign.references.energon import reference_filter
from codesign.references.integers import requantise, round_shift

# Hand example of two rounds: codes of 4 bits, filter codes of 4 (query), 2 and 4 (key) bits.
HAND_QUERY = [6, -3]
HAND_KEYS = [[7, -8], [4, -4], [1, 2], [-3, 1], [-6, 5], [5, 3]]


def filter_row(
    query: Sequence[int],
    keys: Sequence[Sequence[int]],
    threshold: Sequence[int],
    *,
    query_bits: int = 4,
    key_bits: Sequence[int] = (2, 4),
    qk_bits: int = 4,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and decisions `[R, S]` of one row that sees every key."""
    scores, keep = reference_filter(
        np.asarray([[[query]]]),
        np.asarray([[keys]]),
        np.ones((1, 1, 1, len(keys)), bool),
        np.asarray([threshold]),
        query_bits,
        key_bits,
        qk_bits,
    )
    return scores[:, 0, 0, 0], keep[:, 0, 0, 0]


def filter_scores(scores: Sequence[int], threshold: int) -> set[int]:
    """Indices of the keys that one round keeps of given scores (query 1, keys the scores)."""
    _, keep = filter_row(
        [1], [[score] for score in scores], [threshold], query_bits=16, key_bits=[16], qk_bits=16
    )
    return set(np.flatnonzero(keep[0]).tolist())


def random_codes(seed: int, bits: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query and key codes `[2, 3, 20, 16]`, `[2, 3, 33, 16]`, and pairs that exist `[2, 1, 20, 33]`."""
    rng = np.random.default_rng(seed)
    limit = 2 ** (bits - 1) - 1
    query = np.clip(np.rint(rng.normal(size=(2, 3, 20, 16)) * limit / 3), -limit, limit)
    key = np.clip(np.rint(rng.normal(size=(2, 3, 33, 16)) * limit / 3), -limit, limit)
    exists = rng.random((2, 1, 20, 33)) < 0.8
    exists[..., 5] = True
    return query.astype(np.int64), key.astype(np.int64), exists


def test_slices_are_nested() -> None:
    codes = np.arange(-32767, 32768)
    four, two = codes >> 12, codes >> 14
    low = four - 4 * two
    assert low.min() == 0 and low.max() == 3
    assert four.min() == -8 and four.max() == 7 and two.min() == -2 and two.max() == 1


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("threshold", "kept"),
    # Round 1 over scores 66, 36, 21 (sum 123, mean 41): 128 * 3 * S = 25344, 13824, 8064 against
    # 32 * 3 * 66 + 96 * 123 = 18144; 32 * 3 * 21 + 96 * 123 = 13824 (strict); 40: 13344.
    [(32, {0}), (-32, {0}), (-40, {0, 1})],
)
def test_hand_example(threshold: int, kept: set[int]) -> None:
    scores, keep = filter_row(HAND_QUERY, HAND_KEYS, [0, threshold])
    assert scores[0].tolist() == [12, 9, 0, -6, -15, 6]
    assert scores[1, [0, 1, 5]].tolist() == [66, 36, 21]
    assert np.flatnonzero(keep[0]).tolist() == [0, 1, 5]
    assert set(np.flatnonzero(keep[1]).tolist()) == kept


def test_second_round_reuses_the_first() -> None:
    query, keys = np.asarray(HAND_QUERY), np.asarray(HAND_KEYS)
    scores, _ = filter_row(HAND_QUERY, HAND_KEYS, [-128, -128])
    low = keys - 4 * (keys >> 2)
    np.testing.assert_array_equal(scores[1], 4 * scores[0] + low @ query)


def test_negative_sum() -> None:
    # S = -15, -6, 0, -1 and a = -40: q = -6, rest 2, (-600 - 528 + 44) >> 7 = -9.
    assert filter_scores([-15, -6, 0, -1], -40) == {1, 2, 3}


def test_limits() -> None:
    query, key, exists = random_codes(0)
    _, keep = reference_filter(query, key, exists, np.full((3, 2), -128), 4, [2, 4], 16)
    np.testing.assert_array_equal(keep, np.broadcast_to(exists, keep.shape))
    assert filter_scores([3, 3, 3, 3], 0) == {0}
    assert filter_scores([1, 5, 5, 2], -1) == {1, 2}
    assert filter_scores([0, -40, 100, 7], 127) == {2}
    # (127 * 100 + 1 * 58) >> 7 = 99: a score of 99 is not above it, a theta of 98 lets it stay.
    assert filter_scores([-41, 99, 100, -100], 127) == {2}
    assert filter_scores([-400, 99, 100, -100], 127) == {1, 2}


@pytest.mark.parametrize("seed", range(4))
def test_keep_equals_the_exact_rational_form(seed: int) -> None:
    query, key, exists = random_codes(seed, bits=12)
    rng = np.random.default_rng(100 + seed)
    threshold = rng.integers(-127, 128, size=(3, 2))
    scores, keep = reference_filter(query, key, exists, threshold, 5, [3, 6], 12)
    alive = np.broadcast_to(exists, keep.shape[1:])
    for number in range(2):
        for row in np.ndindex(keep.shape[1:-1]):
            alpha = int(threshold[row[1], number])
            indices = np.flatnonzero(alive[row]).tolist()
            row_scores = {j: int(scores[number][row][j]) for j in indices}
            values = list(row_scores.values())
            extreme = alpha * max(values) if alpha >= 0 else -alpha * min(values)
            right = len(values) * extreme + (128 - abs(alpha)) * sum(values)
            kept = {j for j, value in row_scores.items() if 128 * len(values) * value > right}
            kept.add(next(j for j, value in row_scores.items() if value == max(values)))
            assert set(np.flatnonzero(keep[number][row]).tolist()) == kept
        alive = keep[number]


@pytest.mark.parametrize("seed", range(2))
def test_filter_is_monotone(seed: int) -> None:
    query, key, exists = random_codes(seed)
    before = None
    for alpha in range(-128, 128, 15):
        _, keep = reference_filter(query, key, exists, np.full((3, 1), alpha), 4, [4], 16)
        assert keep.any(axis=-1).all()
        if before is not None:
            assert not np.any(keep & ~before)
        before = keep
    _, keep = reference_filter(query, key, exists, np.zeros((3, 2), int), 4, [2, 4], 16)
    assert not np.any(keep[1] & ~keep[0])
    assert not np.any(keep[0] & ~exists)


@pytest.mark.parametrize("alpha", [-100, -3, 0, 60])
def test_filter_ignores_factor_and_offset(alpha: int) -> None:
    scores = np.random.default_rng(alpha + 200).integers(-300, 300, size=40)
    kept = filter_scores(scores.tolist(), alpha)
    assert filter_scores((scores * 7).tolist(), alpha) == kept
    assert filter_scores((scores - 1234).tolist(), alpha) == kept


def test_kept_fraction_and_recall_of_two_rounds_at_zero() -> None:
    fractions, recalls = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        query, key = rng.normal(size=(256, 64)), rng.normal(size=(512, 64))
        codes = [np.rint(x / np.abs(x).max() * 32767).astype(int)[None, None] for x in (query, key)]
        _, keep = reference_filter(
            codes[0], codes[1], np.ones((1, 1, 1, 512), bool), np.zeros((1, 2), int), 4, [2, 4], 16
        )
        kept = keep[:, 0, 0]
        fractions.append(kept.mean(axis=(1, 2)))
        order = np.argsort(np.argsort(-(query @ key.T), axis=-1), axis=-1)
        top = order < kept[1].sum(axis=-1, keepdims=True)
        recalls.append((top & kept[1]).sum() / kept[1].sum())
    np.testing.assert_allclose(np.mean(fractions, axis=0), [0.500, 0.238], atol=0.01)
    assert np.mean(recalls) == pytest.approx(0.82, abs=0.01)


@pytest.mark.parametrize("alpha", [-128, -40, 0, 50])
def test_a_row_that_sees_no_key_keeps_none(alpha: int) -> None:
    query, key, exists = random_codes(1)
    exists[1, 0, 7] = False
    threshold = np.full((3, 2), alpha)
    _, keep = reference_filter(query, key, exists, threshold, 4, [2, 4], 16)
    assert not keep[:, 1, :, 7].any()
    is_other = np.ones((2, 20), bool)
    is_other[1, 7] = False
    rows = keep.transpose(1, 3, 0, 2, 4)[is_other]
    assert rows.any(axis=-1).all()
    # The other rows do not notice.
    exists[1, 0, 7] = True
    _, full = reference_filter(query, key, exists, threshold, 4, [2, 4], 16)
    np.testing.assert_array_equal(full.transpose(1, 3, 0, 2, 4)[is_other], rows)


def prune_all(x: Sequence[int] | np.ndarray, threshold: int, site: str = "query") -> np.ndarray:
    thresholds = np.full(len(PRUNED_SITES), 10**6)
    thresholds[PRUNED_SITES.index(site)] = threshold
    return prune({"threshold": thresholds}, np.asarray(x), site)


def test_prune_by_hand() -> None:
    # 16 fraction bits: .03, -.05, .05, .2, -.01 against .05: only .2 exceeds it.
    codes = [1966, -3277, 3277, 13107, -655]
    assert np.rint(np.asarray([0.03, -0.05, 0.05, 0.2, -0.01]) * 2**16).tolist() == codes
    assert prune_all(codes, 3277).tolist() == [0, 0, 0, 13107, 0]
    assert prune_all(codes, 3276).tolist() == [0, -3277, 3277, 13107, 0]


@pytest.mark.parametrize("seed", range(3))
def test_a_value_up_to_the_real_threshold_is_pruned(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, tau = rng.normal(size=5000), rng.uniform(0, 1)
    codes, code = np.rint(x * 2**8).astype(int), int(np.rint(tau * 2**8))
    is_pruned = prune_all(codes, code) == 0
    assert is_pruned[np.abs(x) <= tau].all()
    assert not is_pruned[np.abs(x) > tau + 2.0**-8].any()


def test_limits_of_pruning() -> None:
    codes = np.arange(-600, 601)
    np.testing.assert_array_equal(prune_all(codes, 0), codes)
    assert not prune_all(codes, 600).any()
    zeros = []
    for threshold in range(0, 600, 37):
        pruned = prune_all(codes, threshold)
        np.testing.assert_array_equal(prune_all(pruned, threshold), pruned)
        np.testing.assert_array_equal(prune_all(-codes, threshold), -pruned)
        zeros.append(int((pruned == 0).sum()))
    # The codes -t to t are dropped.
    assert zeros == [2 * threshold + 1 for threshold in range(0, 600, 37)]


def test_each_site_has_its_threshold() -> None:
    layer = {"threshold": np.arange(9) * 10}
    codes = np.arange(1, 101)
    for place, site in enumerate(PRUNED_SITES):
        assert (prune(layer, codes, site) == 0).sum() == 10 * place
    for site in ("qkv", "up", "down", "attention"):
        np.testing.assert_array_equal(prune(layer, codes, site), codes)


@pytest.mark.parametrize("mechanism", REFERENCES)
def test_names_and_shapes(mechanism: str) -> None:
    shape = random_deployment.structure("bert", mechanism)
    shapes = tensor_shapes(shape, 3, 7)
    assert tuple(shapes) == tensor_names(shape)
    places = [TENSORS.index(name) for name in shapes]
    assert places == sorted(places)
    own = set(reference_by_name(mechanism).tensor_shapes(shape, 3, 7))
    assert set(shapes) == own | set(shape.tensor_shapes(3, 7))
    assert set(reference_by_name(mechanism).decision_tensors) <= set(shapes)
    assert set(reference_by_name(mechanism).ranges) == set(layer_shapes(shape)) - set(
        shape.layer_shapes()
    )
    wanted = {
        "dense": {},
        "energon": {"scores": (2, 2, 3, 2, 7, 7), "keep": (2, 2, 3, 2, 7, 7)},
        "acceltran": {
            "raw_scores": (2, 3, 2, 7, 7),
            "attention_branch": (2, 3, 7, 16),
            "gelu": (2, 3, 7, 32),
            "ffn_branch": (2, 3, 7, 16),
        },
        "sofa": {
            "predicted_key": (2, 3, 2, 7, 8),
            "scores": (2, 3, 2, 7, 7),
            "keep": (2, 2, 3, 2, 7, 7),
        },
        "lapa": {
            "predicted_key": (2, 3, 2, 7, 8),
            "scores": (2, 3, 3, 2, 7, 7),
            "keep": (2, 3, 3, 2, 7, 7),
        },
        "esact": {
            "predicted_query": (2, 3, 2, 7, 8),
            "predicted_key": (2, 3, 2, 7, 8),
            "scores": (2, 3, 2, 7, 7),
            "keep": (2, 1, 3, 2, 7, 7),
            "source": (2, 3, 2, 7),
            "ffn_source": (2, 3, 7),
        },
        "topk": {"keep": (2, 1, 3, 2, 7, 7)},
        "fact": {
            "predicted_query": (2, 3, 2, 7, 8),
            "predicted_key": (2, 3, 2, 7, 8),
            "scores": (2, 3, 2, 7, 7),
            "keep": (2, 1, 3, 2, 7, 7),
            "one_hot": (2, 3, 2, 7),
            "ffn_full": (2, 3, 7),
        },
        "spatten": {
            "tokens": (2, 3, 7),
            "heads": (2, 3, 2, 7),
            "keep": (2, 2, 3, 2, 7, 7),
            "raw_scores": (2, 3, 2, 7, 7),
            "used": (2, 3, 2, 7, 7),
        },
        "a3": {"scores": (2, 3, 2, 7, 7), "keep": (2, 2, 3, 2, 7, 7)},
        "sanger": {"scores": (2, 3, 2, 7, 7), "keep": (2, 1, 3, 2, 7, 7)},
        "bitserial": {"keep": (2, 12, 3, 2, 7, 7), "raw_scores": (2, 3, 2, 7, 7)},
    }
    assert {name: shapes[name] for name in own} == wanted[mechanism]


def test_unknown_mechanism_is_named() -> None:
    with pytest.raises(
        UnknownNameError, match="`top` has no integer path.*a3, acceltran, bitserial"
    ):
        reference_by_name("top")


def test_round_shift_is_exact() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(-(2**53), 2**53, size=2000)
    shifts = rng.integers(0, 63, size=2000)
    ties = np.asarray([(2 * k + 1) << 9 for k in range(-6, 6)])
    values = np.concatenate([values, ties, [-1, 0, 1, 2**52, -(2**52)]])
    shifts = np.concatenate([shifts, np.full(12, 10), [62, 62, 62, 53, 53]])
    got = round_shift(values, shifts)
    wanted = [round(Fraction(int(v), 2 ** int(s))) for v, s in zip(values, shifts, strict=True)]
    assert got.tolist() == wanted


def test_products_beyond_float64_are_refused() -> None:
    with pytest.raises(ExportError, match=r"2\*\*53"):
        requantise(np.asarray([2**40]), np.asarray([2**14]), 3)
    # The largest value and the largest multiplier do not meet: no product reaches the limit.
    assert requantise(np.asarray([2**40, 1]), np.asarray([1, 2**14]), 0).tolist() == [
        2**40,
        2**14,
    ]


def test_imports_without_jax() -> None:
    code = (
        "import sys; sys.modules['jax'] = None; sys.modules['flax'] = None\n"
        "import codesign.references, codesign.structure\n"
        "assert 'jaxlib' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
