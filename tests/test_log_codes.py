"""Codes of prediction: levels, rounding, products, and what they keep of scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.log_codes import hybrid_log, hybrid_log_operand, leading_one

LEVELS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def codes(values: np.ndarray, dtype: str = "int32") -> np.ndarray:
    return np.asarray(hybrid_log(jnp.asarray(values, dtype)), np.int64)


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_levels_and_rounding_of_hybrid_logs(dtype: str):
    numbers = np.arange(1, 128)
    assert tuple(sorted(set(codes(numbers, dtype)))) == LEVELS
    named = {5: 6, 7: 8, 9: 8, 10: 12, 13: 12, 14: 16, 23: 24, 100: 96, 112: 128, 0: 0}
    for number, level in named.items():
        assert codes(np.asarray([number]), dtype)[0] == level
    exponent = np.floor(np.log2(numbers))
    fraction = numbers / 2.0**exponent - 1.0
    rule = np.where(fraction < 0.25, 1.0, np.where(fraction < 0.75, 1.5, 2.0)) * 2.0**exponent
    np.testing.assert_array_equal(codes(numbers, dtype), rule)
    everything = np.arange(-127, 128)
    np.testing.assert_array_equal(codes(-everything, dtype), -codes(everything, dtype))
    np.testing.assert_array_equal(codes(codes(everything), dtype), codes(everything, dtype))
    assert (np.diff(codes(everything, dtype)) >= 0).all()
    error = np.abs(rule / numbers - 1.0)
    assert error.max() == pytest.approx(0.2) and numbers[error.argmax()] == 5
    assert error.mean() == pytest.approx(0.084, abs=0.0005)


def test_products_of_hybrid_logs():
    for x, y, product in ((5, 7, 48), (-11, 3, -36), (100, 23, 2304)):
        assert np.prod(codes(np.asarray([x, y]))) == product


def test_wide_integers_and_floats_agree():
    numbers = np.concatenate([np.arange(-3000, 3000), [2**20 + 1, 2**22 - 1, -(2**21)]])
    np.testing.assert_array_equal(codes(numbers), codes(numbers, "float32"))


def test_derivative_of_a_hybrid_log_is_one():
    slope = jax.grad(lambda y: jnp.sum(hybrid_log_operand(y)))(jnp.asarray([5.0, -9.0, 0.3]))
    np.testing.assert_array_equal(np.asarray(slope), 1.0)


def to_codes(x: np.ndarray) -> np.ndarray:
    return np.rint(x / np.abs(x).max() * 127).astype(np.int64)


def test_what_codes_keep_of_scores_and_their_order():
    """Correlation with exact scores and recall of the largest 26 of 256, on Gaussian queries and keys."""

    def powers(x: np.ndarray) -> np.ndarray:
        return np.asarray(leading_one(jnp.asarray(x, jnp.int32)), np.int64)

    pairs = {
        "hybrid": (codes, codes),
        "both": (powers, powers),
        "query": (powers, lambda x: x),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    for seed in range(4):
        rng = np.random.default_rng(seed)
        query, key = (to_codes(rng.standard_normal((256, 64))) for _ in range(2))
        exact = query @ key.T
        best = np.argsort(-exact, axis=1, kind="stable")[:, :26]
        for name, (of_query, of_key) in pairs.items():
            scores = of_query(query) @ of_key(key).T
            chosen = np.argsort(-scores, axis=1, kind="stable")[:, :26]
            hits = [len(np.intersect1d(a, b)) / 26 for a, b in zip(best, chosen, strict=True)]
            found[name].append((np.corrcoef(exact.ravel(), scores.ravel())[0, 1], np.mean(hits)))
    means = {name: np.mean(values, axis=0) for name, values in found.items()}
    for name, correlation, recall in (
        ("hybrid", 0.989, 0.894),
        ("both", 0.962, 0.805),
        ("query", 0.981, 0.861),
    ):
        assert means[name][0] == pytest.approx(correlation, abs=0.005)
        assert means[name][1] == pytest.approx(recall, abs=0.02)
