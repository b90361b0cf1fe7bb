"""Threshold forms: shift invariance, worked values, padding, gradients."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from codesign import thresholds

Form = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def radius_form(scores: jax.Array, weights: jax.Array, alpha: jax.Array) -> jax.Array:
    return thresholds.radius_threshold(scores, weights, alpha, radius=5.0)


# form, a parameter inside its legal range, sign of d threshold / d parameter
RELATIVE_FORMS: list[tuple[Form, float, int]] = [
    (thresholds.row_max_threshold, 1.3, -1),
    (thresholds.mean_max_threshold, 0.3, 1),
    (thresholds.mean_max_threshold, -0.3, 1),
    (radius_form, 0.4, -1),
    (thresholds.gaussian_threshold, 0.25, -1),
    (thresholds.quantile_threshold, 0.27, -1),
]
relative = pytest.mark.parametrize(("form", "parameter", "sign"), RELATIVE_FORMS)


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def column(value: float, rows: int) -> jax.Array:
    return jnp.full((rows, 1), value)


@relative
def test_shift_invariance(form: Form, parameter: float, sign: int, getkey) -> None:
    del sign
    scores = jax.random.normal(getkey(), (16, 48))
    weights = jax.random.uniform(getkey(), (16, 48))
    shift = 10.0 * jax.random.normal(getkey(), (16, 1))
    theta = form(scores, weights, column(parameter, 16))
    shifted = form(scores + shift, weights, column(parameter, 16))
    assert theta.shape == (16, 1)
    np.testing.assert_allclose(shifted, theta + shift, rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(scores + shift > shifted, scores > theta)


@relative
def test_padding_never_enters(form: Form, parameter: float, sign: int, getkey) -> None:
    del sign
    scores = jax.random.normal(getkey(), (4, 20))
    weights = jnp.ones((4, 20))
    theta = form(scores, weights, column(parameter, 4))
    for junk in (1e6, -1e6):
        padded = form(
            jnp.pad(scores, ((0, 0), (0, 5)), constant_values=junk),
            jnp.pad(weights, ((0, 0), (0, 5))),
            column(parameter, 4),
        )
        np.testing.assert_allclose(padded, theta, rtol=1e-12)


@relative
def test_gradients(form: Form, parameter: float, sign: int, getkey) -> None:
    scores = jax.random.normal(getkey(), (2, 12))
    weights = jax.random.uniform(getkey(), (2, 12), minval=0.6)
    check_grads(jax.jit(form), (scores, weights, column(parameter, 2)), 1, rtol=1e-4)
    slope = jax.grad(lambda a: jnp.sum(form(scores, weights, a)))(column(parameter, 2))
    assert jnp.all(sign * slope > 0.0)


@relative
def test_rows_without_keys_are_finite(form: Form, parameter: float, sign: int) -> None:
    del sign
    scores = jnp.ones((2, 6))

    def total(s: jax.Array, w: jax.Array, a: jax.Array) -> jax.Array:
        return jnp.sum(form(s, w, a))

    gradient_fn = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    gradients = gradient_fn(scores, 0.0 * scores, column(parameter, 2))
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in gradients)
    equal = gradient_fn(scores, scores, column(parameter, 2))
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in equal)


@pytest.mark.parametrize("gamma", [0.02, 0.3, 0.9])
def test_row_max_form_is_gamma_on_probabilities(gamma: float, getkey) -> None:
    logits = 3.0 * jax.random.normal(getkey(), (32, 40))
    theta = thresholds.row_max_threshold(logits, jnp.ones_like(logits), column(-np.log(gamma), 32))
    probabilities = jax.nn.softmax(logits, axis=-1)
    kept = probabilities / jnp.max(probabilities, axis=-1, keepdims=True) >= gamma
    np.testing.assert_array_equal(logits > theta, kept)


def test_mean_max_form_by_hand() -> None:
    # scores 1, 2, 6: mean 3, max 6, min 1; the last key is dead
    scores, weights = jnp.asarray([[1.0, 2.0, 6.0, 50.0]]), jnp.asarray([[1.0, 1.0, 1.0, 0.0]])
    for alpha, theta in ((0.5, 4.5), (0.0, 3.0), (-0.5, 2.0)):
        got = thresholds.mean_max_threshold(scores, weights, jnp.asarray([[alpha]]))
        np.testing.assert_allclose(got, [[theta]])
    # d theta / d alpha at 0 is max - mean, not 0
    slope = jax.grad(lambda a: thresholds.mean_max_threshold(scores, weights, a)[0, 0])
    np.testing.assert_allclose(slope(jnp.zeros((1, 1))), [[3.0]])
    np.testing.assert_allclose(slope(jnp.full((1, 1), -0.1)), [[2.0]])  # mean - min


@pytest.mark.parametrize(
    ("alpha", "kept"), [(-0.5, 0.933), (-0.1, 0.620), (0.0, 0.5), (0.2, 0.272), (0.5, 0.067)]
)
def test_mean_max_form_kept_fraction_on_gaussian_rows(alpha: float, kept: float, getkey) -> None:
    scores = jax.random.normal(getkey(), (1000, 512))
    theta = thresholds.mean_max_threshold(scores, jnp.ones_like(scores), column(alpha, 1000))
    assert abs(float(jnp.mean(scores > theta)) - kept) < 0.005  # sampling error of both tables


def test_soft_extremes_use_keys_of_at_least_half_weight() -> None:
    scores = jnp.asarray([[1.0, 2.0, 6.0]])
    np.testing.assert_array_equal(
        thresholds.alive_max(scores, jnp.asarray([[0.5, 0.9, 0.4]])), [[2.0]]
    )
    np.testing.assert_array_equal(
        thresholds.alive_min(scores, jnp.asarray([[0.1, 0.9, 0.4]])), [[2.0]]
    )
    # no key reaches one half: all that are left count
    np.testing.assert_array_equal(
        thresholds.alive_max(scores, jnp.asarray([[0.1, 0.2, 0.3]])), [[6.0]]
    )


@pytest.mark.parametrize(
    ("keep", "deviations"), [(0.5, 0.0), (0.25, 0.6745), (0.1, 1.2816), (0.05, 1.6449)]
)
def test_gaussian_form_worked_numbers(keep: float, deviations: float) -> None:
    scores = jnp.asarray([[-1.0, 1.0]])  # mean 0, std 1
    theta = thresholds.gaussian_threshold(scores, jnp.ones_like(scores), jnp.asarray([[keep]]))
    assert round(float(theta[0, 0]), 4) == deviations


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.9])
def test_quantile_form_keeps_the_fraction(keep: float, getkey) -> None:
    scores = jax.random.normal(getkey(), (8, 40))
    weights = jnp.ones_like(scores).at[:, 20:].set(0.0)
    theta = thresholds.quantile_threshold(scores, weights, column(keep, 8))
    kept = jnp.sum((scores > theta) & (weights > 0), axis=-1)
    np.testing.assert_array_equal(kept, np.full(8, keep * 20))


def test_quantile_form_by_hand() -> None:
    # descending 6, 2, 1; k = .4: position .4 * 3 - .5 = .7, theta = 6 + .7 (2 - 6) = 3.2
    scores = jnp.asarray([[1.0, 6.0, 2.0, 9.0]])
    weights = jnp.asarray([[1.0, 1.0, 1.0, 0.0]])

    def theta(keep: jax.Array) -> jax.Array:
        return thresholds.quantile_threshold(scores, weights, keep)[0, 0]

    value, slope = jax.value_and_grad(theta)(jnp.asarray([[0.4]]))
    np.testing.assert_allclose(value, 3.2)
    np.testing.assert_allclose(slope, [[3 * (2.0 - 6.0)]])


def test_absolute_forms() -> None:
    scores = jnp.asarray([[0.1, 0.7]])
    theta = jnp.asarray([[0.25]])
    assert thresholds.absolute_threshold(scores, scores, theta) is theta
    log_theta = jnp.log(theta)
    np.testing.assert_allclose(thresholds.probability_threshold(scores, scores, log_theta), theta)


def test_integer_threshold_is_the_margin_in_code_units() -> None:
    # t = 2, d = 64, scales .05 and .02: 2 * 8 / .001 = 16000
    assert thresholds.integer_threshold(2.0, 64, 0.05, 0.02) == 16_000
    rng = np.random.default_rng(0)
    query, key = rng.integers(-127, 128, (2, 32, 64))
    margin = 1.7
    codes = thresholds.integer_threshold(margin, 64, 0.01, 0.01)
    scores = query @ key.T
    logits = scores * 1e-4 / np.sqrt(64)
    best = scores.max(axis=-1, keepdims=True)
    agree = (scores > best - codes) == (logits > logits.max(axis=-1, keepdims=True) - margin)
    assert np.mean(agree) == 1.0
