"""Cost model against simulators on a trained model: what `codesign reproduce simulator-agreement` measures."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from codesign.experiments.problem import Problem
from codesign.experiments.simulator_agreement import agreements, kendall_tau, random_sizes


def test_kendalls_tau_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=40)
    other = one + rng.normal(size=40)
    assert kendall_tau(one, other) == pytest.approx(kendalltau(one, other).statistic)
    assert kendall_tau(one, one) == 1.0 and kendall_tau(one, -one) == -1.0


def test_sizes_are_whole_but_for_the_bandwidth(tiny_problem: Problem) -> None:
    sizes = random_sizes(tiny_problem, np.random.default_rng(0))
    assert sizes.keys() == tiny_problem.accelerator.sizes.keys()
    for name, size in sizes.items():
        own = float(tiny_problem.accelerator.sizes[name])
        assert 0.25 * own - 0.5 <= size <= max(2.0 * own + 0.5, 1.0)
        assert name == "dram.bytes_per_cycle" or size == round(size) >= 1


def test_policies_are_simulated_at_every_size(tiny_problem: Problem) -> None:
    found = agreements(tiny_problem, num_sizes=2, num_policies=3, num_examples=2)
    assert [(one.scope, one.metric) for one in found] == [
        (scope, metric) for scope in ("attention", "end_to_end") for metric in ("latency", "energy")
    ]
    for one in found:
        assert one.counts_equal and one.num_points == 6
        assert one.mean_error <= one.largest_error and one.least_tau <= 1.0
        assert one.mean_error < (1e-9 if one.metric == "energy" else 0.15)
