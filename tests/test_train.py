"""From a problem to a start point and to one that meets its budget, before any step is taken."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tiny_experiment import tiny, untrained

from codesign.calibration import Calibration
from codesign.errors import CodesignError, InfeasibleBudgetError
from codesign.experiments import train
from codesign.experiments.configs import Budget
from codesign.experiments.evaluate import Point
from codesign.experiments.moves import FILTER_WIDTHS, narrowed, raised, with_spare
from codesign.experiments.problem import Problem, load_problem, outline
from codesign.experiments.reach import cheapest_ratio, check_reachable
from codesign.experiments.start import (
    CalibrationRun,
    calibration_run,
    start_point,
    start_policy,
    with_threshold,
)
from codesign.experiments.teacher import calibrate, float_path
from codesign.experiments.train import SPARE_BITS, BudgetedTraining
from codesign.mechanisms import MECHANISMS
from codesign.policy import (
    ATTENTION_BITS,
    Policy,
    bits_range,
    deployed_bits,
    group,
    has_whole_bits,
)
from codesign.references.acceltran import PRUNED_SITES

SCALE = MECHANISMS["energon"].thresholds


@pytest.fixture(scope="module")
def start(tiny_problem: Problem) -> Point:
    return start_point(tiny_problem)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return start_policy(outline(tiny()), linear_bits=7.5, attention_bits=15.5)


def widths(policy: Policy) -> dict[str, np.ndarray]:
    knobs = policy.layers | policy.ends
    return {name: np.asarray(value) for name, value in knobs.items() if group(name) == "bits"}


def alpha(policy: Policy) -> np.ndarray:
    return np.tanh(np.asarray(policy.layers["threshold"], np.float64))


def with_alpha(policy: Policy, wanted: np.ndarray) -> Policy:
    """Strength 0 to 1 is alpha -1 to 1."""
    return with_threshold(policy, SCALE.from_strength((wanted + 1.0) / 2.0, {}))


def raised_alpha(policy: Policy, move: float) -> Policy:
    calibration = Calibration(layers={}, ends={})
    return raised(Point(params={}, policy=policy, calibration=calibration), move, SCALE)


def test_alpha_is_stored_and_limited(policy: Policy) -> None:
    shape = policy.layers["threshold"].shape
    wanted = np.linspace(-1.0, 1.0, np.prod(shape)).reshape(shape)
    changed = with_alpha(policy, wanted)
    # f32 variables: a few units in the last place near atanh(0.99) = 2.65.
    np.testing.assert_allclose(alpha(changed), np.clip(wanted, -0.99, 0.99), atol=1e-6)
    assert all(
        changed.layers[name] is value
        for name, value in policy.layers.items()
        if name != "threshold"
    )


def test_narrowing_goes_to_the_lower_limits_attention_first(policy: Policy) -> None:
    before = widths(policy)
    moves = [widths(narrowed(policy, move)) for move in np.linspace(0.0, 1.0, 9)]
    for name, value in before.items():
        path = np.stack([value] + [one[name] for one in moves])
        if name in FILTER_WIDTHS:
            assert np.all(path == value), name
            continue
        assert np.all(np.diff(path, axis=0) <= 0.0), name
        np.testing.assert_array_equal(path[1], value)
        np.testing.assert_allclose(path[-1], bits_range(name)[0], rtol=1e-6)
        # Half-way attention is as narrow as it gets, and the linear layers have not moved.
        half = bits_range(name)[0] if name in ATTENTION_BITS else value
        np.testing.assert_allclose(path[5], half, rtol=1e-6)
    clips = [name for name in policy.layers if group(name) != "bits"]
    moved = narrowed(policy, 0.7)
    assert clips and all(moved.layers[name] is policy.layers[name] for name in clips)


def test_activations_follow_their_weights_as_far_as_told(policy: Policy) -> None:
    before = widths(policy)
    for share in (0.0, 0.5):
        after = widths(narrowed(policy, 0.75, activation_share=share))
        for name, value in before.items():
            low = bits_range(name)[0]
            # Linear layers are half of the way.
            part = 0.5 * (share if name.endswith(".activation_bits") else 1.0)
            if not (name in FILTER_WIDTHS or name in ATTENTION_BITS):
                np.testing.assert_allclose(after[name], value - part * (value - low), rtol=1e-6)


def test_spare_bits_change_nothing_that_is_deployed(policy: Policy) -> None:
    moved = narrowed(policy, 0.7)
    spared = with_spare(moved, SPARE_BITS)
    for name, value in widths(spared).items():
        if name in FILTER_WIDTHS:
            np.testing.assert_array_equal(value, widths(moved)[name])
            continue
        whole = np.floor(widths(moved)[name] + 0.5)
        wanted = np.minimum(whole + SPARE_BITS, bits_range(name)[1])
        np.testing.assert_allclose(value, wanted, rtol=1e-6)
        np.testing.assert_array_equal(widths(deployed_bits(spared))[name], whole)


def test_raising_goes_to_the_largest_alpha(policy: Policy) -> None:
    shape = policy.layers["threshold"].shape
    policy = with_alpha(policy, np.linspace(-0.9, 0.9, np.prod(shape)).reshape(shape))
    before = alpha(policy)
    # A quarter of the way from a to 1 is a + (1 - a) / 4.
    np.testing.assert_allclose(
        alpha(raised_alpha(policy, 0.25)), before + (1 - before) / 4, atol=1e-6
    )
    np.testing.assert_allclose(alpha(raised_alpha(policy, 1.0)), 0.99, atol=1e-6)
    np.testing.assert_allclose(alpha(raised_alpha(policy, 0.0)), before, atol=1e-6)
    # Half of the way from a to -1, which keeps all, is (a - 1) / 2.
    np.testing.assert_allclose(alpha(raised_alpha(policy, -0.5)), (before - 1) / 2, atol=1e-6)
    for name, value in widths(policy).items():
        np.testing.assert_array_equal(widths(raised_alpha(policy, 0.5))[name], value)
    assert raised(Point(params={}, policy=policy, calibration=None), 0.5, None) is policy


def test_what_drops_rows_may_stay_when_the_thresholds_of_pairs_rise(policy: Policy) -> None:
    mechanism = MECHANISMS["esact"]
    scale = mechanism.thresholds
    assert scale is not None
    own = Policy(layers=policy.layers | mechanism.knobs(2, 2), ends=policy.ends)
    point = Point(params={}, policy=own, calibration=Calibration(layers={}, ends={}))

    def strength(of: Policy) -> np.ndarray:
        return scale.to_strength(np.asarray(of.layers["threshold"], np.float64), {})

    before = strength(own)
    every, pairs = (strength(raised(point, 0.5, scale, only_pairs=one)) for one in (False, True))
    halfway = before + (1.0 - before) / 2.0
    np.testing.assert_allclose(every, halfway, atol=1e-6)
    np.testing.assert_allclose(pairs[..., 0], halfway[..., 0], atol=1e-6)
    np.testing.assert_allclose(pairs[..., 1:], before[..., 1:], atol=1e-6)
    # Of a filter in rounds every threshold is one of pairs.
    rounds = Point(params={}, policy=policy, calibration=point.calibration)
    assert SCALE is not None
    for name, value in raised(rounds, 0.5, SCALE, only_pairs=True).layers.items():
        np.testing.assert_array_equal(value, raised(rounds, 0.5, SCALE).layers[name])


def test_unreachable_budget_is_refused_with_the_least_that_is_not() -> None:
    problem = outline(tiny())
    with pytest.raises(InfeasibleBudgetError, match=r"`budget.energy` 0\.01 cannot") as refusal:
        check_reachable(problem, Budget(energy=0.01, latency=0.9))
    least = float(str(refusal.value).rpartition("at least ")[2])
    check_reachable(problem, Budget(energy=least))
    with pytest.raises(InfeasibleBudgetError):
        check_reachable(problem, Budget(energy=least - 0.002))


def test_without_a_filter_the_cheapest_policy_keeps_all_pairs() -> None:
    problem = outline(dataclasses.replace(tiny(), mechanism="dense"))
    all_pairs = cheapest_ratio(problem, "attention")["latency"]
    assert all_pairs > cheapest_ratio(outline(tiny()), "attention")["latency"]
    with pytest.raises(InfeasibleBudgetError):
        check_reachable(problem, Budget(latency=all_pairs - 0.002, scope="attention"))


def test_start_kept_needs_one_entry_per_round() -> None:
    with pytest.raises(CodesignError, match="one entry for each of round 0, round 1 of `energon`"):
        outline(dataclasses.replace(tiny(), start_kept=(0.8, 0.7, 0.6)))


def test_start_point_keeps_what_is_asked_for(tiny_problem: Problem, start: Point) -> None:
    kept = calibration_run(tiny_problem, start).kept
    assert kept.shape == (2, 2, 2)
    # alpha is found to 1/32; where it passes 0 the threshold passes the mean, around which scores lie close.
    np.testing.assert_allclose(kept, np.broadcast_to(SCALE.start_kept, kept.shape), atol=0.05)
    assert start.params is tiny_problem.params
    found = widths(start.policy)
    np.testing.assert_array_equal(found["qk_bits"], 15.5)
    np.testing.assert_array_equal(found["up.weight_bits"], 7.5)


def test_a_threshold_that_never_drops_enough_starts_at_its_own_value(
    tiny_problem: Problem, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SCALE is not None

    def strengths(of: Policy) -> np.ndarray:
        assert SCALE is not None
        return SCALE.to_strength(np.asarray(of.layers["threshold"], np.float64), {})

    def run(problem: Problem, point: Point) -> CalibrationRun:
        kept = 1.0 - strengths(point.policy)
        kept[1, 0, 0] = 1.0  # the scores of this head's first round are all equal
        return CalibrationRun(costs={}, kept=kept, kl_nats=0.0)

    monkeypatch.setattr("codesign.experiments.start.calibration_run", run)
    found = strengths(start_point(tiny_problem).policy)
    wanted = np.broadcast_to(1.0 - np.asarray(SCALE.start_kept), found.shape).copy()
    wanted[1, 0, 0] = strengths(policy)[1, 0, 0]
    assert wanted[1, 0, 0] > 0.0
    # BISECTIONS halvings of [0, 1].
    np.testing.assert_allclose(found, wanted, atol=1 / 64)


def test_calibration_covers_every_image(tiny_problem: Problem) -> None:
    """Ranges are those of all images, however they are divided into calls; a filled-up last call adds nothing."""
    images = tiny_problem.task.part("train").first(300)
    params, config = tiny_problem.params, tiny_problem.config
    whole = calibrate(params, images, config, ())
    parts = [
        calibrate(params, images.take(part), config, ()) for part in (slice(100), slice(100, None))
    ]
    for group_name in ("layers", "ends"):
        ranges = getattr(whole, group_name)
        for name, value in ranges.items():
            largest = np.maximum(*(np.asarray(getattr(part, group_name)[name]) for part in parts))
            np.testing.assert_allclose(value, largest, rtol=1e-6)
    observed = float_path(params, images.first(256).inputs, config, calibrating=True)[1]
    assert observed["layers"].keys() == whole.layers.keys()
    for name, value in observed["layers"].items():
        assert np.all(np.asarray(whole.layers[name]) >= np.asarray(value)), name


@pytest.fixture(scope="module")
def pruning(tiny_problem: Problem, dense_cache: Path) -> Problem:
    """The same dense model with a threshold for each of AccelTran's sites."""
    experiment = dataclasses.replace(
        tiny_problem.experiment,
        mechanism="acceltran",
        preset="acceltran-edge",
        start_kept=(0.7,) * len(PRUNED_SITES),
    )
    before = sorted(dense_cache.iterdir())
    problem = load_problem(experiment, cache=dense_cache, progress=False)
    assert sorted(dense_cache.iterdir()) == before  # a mechanism changes nothing in the dense model
    return problem


def test_sites_start_and_move_together(pruning: Problem) -> None:
    start = start_point(pruning)
    kept = calibration_run(pruning, start).kept
    assert kept.shape == (2, len(PRUNED_SITES))
    # Strength is found to 1/64 of 12 octaves, a tenth of the threshold.
    np.testing.assert_allclose(kept, 0.7, atol=0.06)
    budget = Budget(latency=0.75)
    groups = ("thresholds", "bits")
    optimize = dataclasses.replace(pruning.experiment.optimize, train=groups)
    training = BudgetedTraining(pruning, optimize, ("latency",), budget.scope)
    assert training.excess(start, budget) > 1.0
    fitted = training.fitted(start, budget)
    assert 0.85 < training.excess(fitted, budget) <= 1.0
    before, after = (np.asarray(p.policy.layers["threshold"]) for p in (start, fitted))
    assert np.all(after > before)
    np.testing.assert_array_less(calibration_run(pruning, fitted).kept, kept)


@pytest.mark.parametrize(
    ("divergence", "keys", "sign", "is_moved"),
    [
        (0.95, 6.0, 1, False),
        (0.8, 6.0, 1, True),
        (0.8, 3.9, 1, False),
        pytest.param(0.95, 6.0, -1, False, marks=pytest.mark.slow),
        pytest.param(0.8, 6.0, -1, True, marks=pytest.mark.slow),
    ],
)
def test_thresholds_move_first_only_for_a_clear_gain_that_leaves_keys(
    tiny_problem: Problem,
    start: Point,
    divergence: float,
    keys: float,
    sign: int,
    is_moved: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def has_moved(point: Point) -> np.bool_:
        return np.any(sign * (alpha(point.policy) - alpha(start.policy)) > 1e-6)

    def run(problem: Problem, point: Point) -> CalibrationRun:
        found = calibration_run(problem, point)
        share = keys / problem.config.structure.max_tokens
        kept = np.full_like(found.kept, share) if has_moved(point) else found.kept
        diverged = divergence if has_moved(point) else 1.0
        return dataclasses.replace(found, kl_nats=diverged, kept=kept)

    monkeypatch.setattr(train, "calibration_run", run)
    optimize = dataclasses.replace(tiny_problem.experiment.optimize, train=("thresholds", "bits"))
    budget = Budget(energy=0.5)
    training = BudgetedTraining(tiny_problem, optimize, ("energy",), budget.scope)
    fitted = training.fitted(start, budget)
    assert has_moved(fitted) == is_moved
    others = np.any(-sign * (alpha(fitted.policy) - alpha(start.policy)) > 1e-6)
    assert not others


@pytest.mark.parametrize(
    ("budget", "groups"),
    [
        (Budget(energy=0.5), ("params", "thresholds", "bits")),
        (Budget(energy=0.5), ("bits",)),
        (Budget(latency=0.74, scope="attention"), ("thresholds", "bits")),
        (Budget(energy=0.6, latency=0.88), ("thresholds", "bits")),
    ],
)
def test_fitted_point_just_meets_its_budget(
    tiny_problem: Problem, start: Point, budget: Budget, groups: tuple[str, ...]
) -> None:
    optimize = dataclasses.replace(tiny_problem.experiment.optimize, train=groups)
    training = BudgetedTraining(tiny_problem, optimize, tuple(budget.limits), budget.scope)
    assert training.excess(start, budget) > 1.0
    fitted = training.fitted(start, budget)
    # Widths are whole bits, the same in all layers, as deployed: their steps are coarse.
    assert 0.85 < training.excess(fitted, budget) <= 1.0
    if "thresholds" not in groups:
        np.testing.assert_array_equal(alpha(fitted.policy), alpha(start.policy))
    assert np.all(alpha(fitted.policy) >= alpha(start.policy) - 1e-6)
    for name, value in widths(fitted.policy).items():
        assert np.all(value <= widths(start.policy)[name]), name


def test_budget_that_is_met_moves_nothing(tiny_problem: Problem, start: Point) -> None:
    budget = Budget(energy=2.0)
    training = BudgetedTraining(
        tiny_problem, tiny_problem.experiment.optimize, ("energy",), "end_to_end"
    )
    assert training.fitted(start, budget) is start
    repaired = training.repaired(start, budget)
    np.testing.assert_array_equal(repaired.policy.layers["qk_bits"], 16.0)
    np.testing.assert_array_equal(alpha(repaired.policy), alpha(start.policy))


def test_broken_budget_is_repaired_by_thresholds(tiny_problem: Problem, start: Point) -> None:
    """Widths are held at the end: thresholds alone make up for what rounding cost, if they can."""
    optimize = tiny_problem.experiment.optimize
    training = BudgetedTraining(tiny_problem, optimize, ("latency",), "attention")
    deployed = training.repaired(start, Budget(latency=2.0, scope="attention"))
    reached = training.excess(deployed, Budget(latency=1.0, scope="attention"))
    budget = Budget(latency=0.95 * reached, scope="attention")
    repaired = training.repaired(start, budget)
    assert 0.95 < training.excess(repaired, budget) <= 1.0
    assert np.all(alpha(repaired.policy) > alpha(start.policy))
    for name, value in widths(repaired.policy).items():
        np.testing.assert_array_equal(value, widths(deployed.policy)[name])
    # Energy at a tenth is out of the thresholds' reach: they stay as trained.
    energy = BudgetedTraining(tiny_problem, optimize, ("energy",), "end_to_end")
    kept = energy.repaired(start, Budget(energy=0.1))
    np.testing.assert_array_equal(alpha(kept.policy), alpha(start.policy))


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["energon", "acceltran"])
def test_rounded_widths_meet_the_budget_on_texts_of_all_lengths(mechanism: str) -> None:
    """Short texts cost another part of dense than long ones: widths that suit one batch break the budget on others."""
    preset = {"energon": "energon", "acceltran": "acceltran-edge"}[mechanism]
    # Five short texts and five long ones: one program for each.
    problem = untrained("text", mechanism, preset, num_calibration=10, batch_size=5)
    training = BudgetedTraining(problem, problem.experiment.optimize, ("energy",), "end_to_end")
    budget = Budget(energy=0.5)
    point = training.fitted(start_point(problem), budget)
    tree = training.initial(point, budget)
    ratios = [
        float(
            training.step.ratios(
                tree["state"], training.batch(step), tree["constants"], deployed_bits(point.policy)
            )[0]
        )  # type: ignore[misc]
        for step in range(8)
    ]
    assert max(ratios) - min(ratios) > 0.005
    policy = training.hardened(tree["state"], tree["constants"]).policy
    assert has_whole_bits(policy)
    reached = training.excess(dataclasses.replace(point, policy=policy), budget)
    assert 0.97 < reached <= 1.001
