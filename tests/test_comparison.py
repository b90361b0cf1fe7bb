"""Statistics of curves: bootstrap intervals, cost at equal divergence, mixtures at equal cost."""

import numpy as np
import pytest

from codesign.experiments.comparison import BOOTSTRAP_SEED, bootstrap, cost_at_equal_kl, mixture_at


def test_bootstrap_by_hand() -> None:
    values = np.asarray([1.0, 2.0, 6.0])
    found = bootstrap(values, num_resamples=4)
    chosen = np.random.default_rng(BOOTSTRAP_SEED).integers(0, 3, size=(4, 3))
    means = sorted(sum(values[i] for i in row) / 3 for row in chosen)
    assert found.mean == pytest.approx(3.0)
    # Percentiles lie on a line between sorted means: 2.5 % of 3 gaps is 0.075 of the first gap.
    assert found.low == pytest.approx(means[0] + 0.075 * (means[1] - means[0]))
    assert found.high == pytest.approx(means[3] - 0.075 * (means[3] - means[2]))


def test_bootstrap_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    found = bootstrap(values, num_resamples=4000)
    # Normal theory: 1.96 standard errors on each side; resampling noise is a few per cent.
    half = 1.96 * values.std() / 20.0
    assert found.high - found.mean == pytest.approx(half, rel=0.1)
    assert found.mean - found.low == pytest.approx(half, rel=0.1)
    assert bootstrap(values > 5.0, num_resamples=10).mean == pytest.approx(np.mean(values > 5.0))


def test_bootstrap_of_a_constant_has_no_width() -> None:
    found = bootstrap(np.full(7, 0.25), num_resamples=20)
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)


COSTS = np.asarray([1.0, 2.0, 4.0, 8.0])
DIVERGENCES = COSTS**-2.0


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
def test_a_curve_at_a_factor_of_the_cost(factor: float) -> None:
    """Lines in logarithms: the ratio is the factor at every divergence."""
    ratio = cost_at_equal_kl((factor * COSTS, DIVERGENCES), (COSTS, DIVERGENCES))
    assert ratio == pytest.approx(factor)


def test_only_divergences_that_both_reach_count() -> None:
    # The reference stops at a divergence of 1/4; there and at 1 it costs 3 times as much.
    reference = (3.0 * COSTS[:2], DIVERGENCES[:2])
    candidate = (np.asarray([1.0, 2.0, 100.0]), np.asarray([1.0, 0.25, 1e-6]))
    assert cost_at_equal_kl(reference, candidate) == pytest.approx(3.0)


def test_worse_and_dearer_points_do_not_count_and_order_does_not_matter() -> None:
    costs = np.asarray([8.0, 3.0, 1.0, 4.0, 2.0])
    divergences = np.asarray([1 / 64, 0.9, 1.0, 1 / 16, 1 / 4])  # 3.0 is worse than 2.0
    assert cost_at_equal_kl((costs, divergences), (COSTS, DIVERGENCES)) == pytest.approx(1.0)


def test_without_overlap_there_is_no_ratio() -> None:
    good = (COSTS, 1e-3 * DIVERGENCES)
    bad = (COSTS, DIVERGENCES)
    assert cost_at_equal_kl(good, bad) is None and cost_at_equal_kl(bad, good) is None
    single = (COSTS[:1], DIVERGENCES[:1])
    assert cost_at_equal_kl(single, bad) is None


def test_a_divergence_of_zero_is_finite() -> None:
    exact = (COSTS, np.asarray([1.0, 0.25, 0.0625, 0.0]))
    ratio = cost_at_equal_kl(exact, exact)
    assert ratio == pytest.approx(1.0)


def test_mixture_lies_on_the_line_between_its_neighbours() -> None:
    costs, values = (
        [3.0, 1.0, 2.0],
        [np.array([9.0, 3.0]), np.array([1.0, 1.0]), np.array([5.0, 1.0])],
    )
    np.testing.assert_allclose(mixture_at(costs, values, 2.25), [6.0, 1.5])
    np.testing.assert_allclose(mixture_at(costs, values, 1.5), [3.0, 1.0])
    for cost, value in zip(costs, values, strict=True):
        np.testing.assert_allclose(mixture_at(costs, values, cost), value)
    assert mixture_at(costs, values, 0.99) is None and mixture_at(costs, values, 3.01) is None
    np.testing.assert_allclose(mixture_at([1.0, 1.0], values[:2], 1.0), values[0])
