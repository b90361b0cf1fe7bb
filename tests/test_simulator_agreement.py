"""Cost model against simulators on a trained model: what `codesign reproduce simulator-agreement` measures."""

import dataclasses
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kendalltau
from tiny_experiment import tiny

from codesign.calibration import Calibration
from codesign.errors import PresetError
from codesign.experiments.evaluate import Point
from codesign.experiments.problem import Problem, outline
from codesign.experiments.reproduce import Machine
from codesign.experiments.simulator_agreement import (
    agreements,
    kendall_tau,
    random_policy,
    random_sizes,
)
from codesign.hw.accelerator import CLOCK
from codesign.hw.resizing import spec_with_sizes
from codesign.hw.simulator import simulate
from codesign.hw.spec import load_preset, preset_names
from codesign.policy import bits_range, group
from codesign.references.acceltran import PRUNED_SITES

MACHINES = get_args(Machine)


def test_kendalls_tau_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=40)
    other = one + rng.normal(size=40)
    assert kendall_tau(one, other) == pytest.approx(kendalltau(one, other).statistic)
    assert kendall_tau(one, one) == 1.0 and kendall_tau(one, -one) == -1.0


def test_the_machines_are_those_that_a_simulator_has_rules_for() -> None:
    def has_rules(name: str) -> bool:
        """A machine without rules is refused before anything is looked at."""
        with pytest.raises(Exception) as refusal:
            simulate(None, load_preset(name), {})
        return not isinstance(refusal.value, PresetError)

    assert {name for name in preset_names() if has_rules(name)} == set(MACHINES)


@pytest.mark.parametrize("machine", MACHINES)
def test_every_machine_takes_random_sizes_and_policies(machine: str) -> None:
    problem = outline(
        dataclasses.replace(tiny(), mechanism=load_preset(machine).mechanism, preset=machine)
    )
    rng = np.random.default_rng(0)
    sizes = random_sizes(problem, rng)
    spec_with_sizes(problem.spec, sizes)
    ranges = {site: jnp.ones((2,)) for site in PRUNED_SITES}
    start = Point(params={}, policy=None, calibration=Calibration(layers=ranges, ends={}))
    drawn, other = (random_policy(problem, start, rng) for _ in range(2))
    own = problem.mechanism.knobs(2, 2)
    assert own.keys() <= drawn.layers.keys()
    for name in own:
        assert np.any(np.asarray(drawn.layers[name]) != np.asarray(other.layers[name])), name
        if group(name) == "bits":
            low, high = bits_range(name)
            assert np.all((drawn.layers[name] >= low) & (drawn.layers[name] <= high)), name


def test_sizes_are_whole_but_for_the_bandwidth(tiny_problem: Problem) -> None:
    sizes = random_sizes(tiny_problem, np.random.default_rng(0))
    # The simulator's cycles are the machine's own.
    assert sizes.keys() == tiny_problem.accelerator.sizes.keys() - {CLOCK}
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
