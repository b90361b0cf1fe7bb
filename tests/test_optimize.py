import dataclasses
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.errors import CodesignError, NonFiniteError
from codesign.gates import Relaxation
from codesign.optimize import (
    LossAux,
    OptimizeSettings,
    TrainState,
    init_state,
    make_train_step,
    relaxation_at,
)
from codesign.policy import Policy, dense_knobs, deployed_bits, group
from codesign.rounding import hardened
from codesign.watch import DEAD_GRADIENT_STEPS, ThresholdWatch, check_finite

NUM_LAYERS = 2
TRAINED_GROUPS = (
    ("params",),
    ("thresholds",),
    ("bits",),
    ("clips",),
    ("params", "thresholds", "bits", "clips"),
)
# The budget of the toy: the last 20 steps must stay this near to it.
RATIO_TOLERANCE = 0.02


def toy_policy() -> Policy:
    """Widths of 7.5 bit and the thresholds of two layers, two heads and one round."""
    knobs = dense_knobs(
        NUM_LAYERS, linear_bits=7.5, attention_bits=15.5, end_sites=("embed", "head")
    )
    return knobs.replace(layers=knobs.layers | {"threshold": jnp.zeros((NUM_LAYERS, 2, 1))})


def toy_params() -> dict[str, jax.Array]:
    return {"weight": jnp.asarray([1.0, -2.0, 3.0])}


def toy_loss(
    params: Any, policy: Policy, batch: Any, constants: Any, relaxation: Relaxation
) -> tuple[jax.Array, LossAux]:
    """A quadratic in the weights, plus noise of 4^-bits and the loss of what is dropped."""
    kept = jax.nn.sigmoid(-policy.layers["threshold"] / relaxation.temperature)
    fit = jnp.mean(jnp.square(params["weight"] - batch["target"]))
    bits = [v for k, v in policy.layers.items() if k.endswith("n_bits") or k.endswith("t_bits")]
    noise = sum(jnp.mean(constants["noise"] * 4.0**-width) for width in bits)
    clip = sum(jnp.mean(jnp.square(v - 0.1)) for k, v in policy.layers.items() if "clip" in k)
    loss = fit + noise + clip + jnp.mean(jnp.square(1.0 - kept))
    terms = {"fit": fit, "keep_fraction": jnp.mean(kept)}
    return loss, LossAux(terms=terms, workload={"kept": kept, "bits": jnp.stack(bits)})


def toy_cost(workload: Any, constants: Any, smoothness: jax.Array) -> jax.Array:
    """Half for the bits, half for what is kept; dense is 1."""
    bits = jnp.mean(jnp.square(workload["bits"] / 8.0))
    cost = 0.5 * bits + 0.5 * jnp.mean(workload["kept"])
    return jnp.reshape(cost, (1,)) / constants["budget"][None]


def toy_constants(budget: float = 0.3) -> dict[str, jax.Array]:
    return {"budget": jnp.asarray(budget, jnp.float32), "noise": jnp.asarray([20.0, 1.0])}


def toy_batch(step: int) -> dict[str, jax.Array]:
    """Targets drawn round (1, 2, 3) from the step alone."""
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (3,))
    return {"target": jnp.asarray([1.0, 2.0, 3.0]) + 0.1 * noise}


def ratio_of(policy: Policy, settings: OptimizeSettings, *, budget: float) -> float:
    """Cost over budget in the hardened stage."""
    relaxation = relaxation_at(jnp.asarray(settings.hardened_step), settings)
    constants = toy_constants(budget)
    _, aux = toy_loss(toy_params(), policy, toy_batch(0), constants, relaxation)
    return float(toy_cost(aux.workload, constants, relaxation.smoothness)[0])


def train(
    settings: OptimizeSettings, num_steps: int, *, budget: float = 0.3
) -> tuple[TrainState, list[dict[str, np.ndarray]], list[Policy]]:
    step_fn = make_train_step(toy_loss, toy_cost, settings)
    state = init_state(toy_params(), toy_policy(), settings, num_constraints=1)
    history, policies = [], []
    for step in range(num_steps):
        state, metrics = step_fn(state, toy_batch(step), toy_constants(budget))
        history.append(jax.device_get(metrics))
        policies.append(jax.device_get(state.policy))
    return state, history, policies


@pytest.mark.smoke
def test_one_compilation_over_stages_budgets_and_the_first_step() -> None:
    settings = OptimizeSettings(num_steps=6, hardened_fraction=0.5)
    counted_loss = chex.assert_max_traces(toy_loss, n=2)  # the step, and the rounding of widths
    step_fn = make_train_step(counted_loss, toy_cost, settings)
    state = init_state(toy_params(), toy_policy(), settings, num_constraints=1)
    for step in range(8):
        state, metrics = step_fn(state, toy_batch(step), toy_constants(0.3 + 0.1 * step))
    assert int(state.step) == 8
    assert step_fn.compiled._cache_size() == 1  # type: ignore[attr-defined]
    assert step_fn.ratios._cache_size() == 1  # type: ignore[union-attr]
    assert bool(metrics["is_finite"])


@pytest.mark.parametrize("groups", TRAINED_GROUPS, ids="+".join)
def test_only_the_trained_groups_change(groups: tuple[Any, ...]) -> None:
    settings = OptimizeSettings(train=groups, num_steps=10)
    before = jax.device_get((toy_params(), toy_policy()))
    state, history, _ = train(settings, 10)
    params, policy = jax.device_get((state.params, state.policy))
    changed = not np.array_equal(params["weight"], before[0]["weight"])
    assert changed == ("params" in groups)
    for name, value in policy.layers.items():
        # Attention's widths are outside the toy's loss and cost: only rounding moves them.
        is_same = np.array_equal(value, before[1].layers[name])
        assert is_same == (group(name) not in groups), name
    names = {name for name in history[0] if name.startswith("gradient_norm.")}
    assert names == {f"gradient_norm.{name}" for name in groups}


def test_frozen_weights_cost_no_backward_pass() -> None:
    def num_products(groups: tuple[Any, ...]) -> int:
        def loss(params: Any, policy: Policy, *rest: Any) -> tuple[jax.Array, LossAux]:
            clip = policy.layers["qkv.activation_clip"]
            return jnp.sum(clip[None] @ params["weight"]), LossAux(terms={}, workload=None)

        def cost(workload: Any, *rest: Any) -> jax.Array:
            return jnp.zeros((0,))

        settings = OptimizeSettings(train=groups)
        state = init_state({"weight": jnp.ones((NUM_LAYERS, 3))}, toy_policy(), settings, 0)
        jaxpr = jax.make_jaxpr(make_train_step(loss, cost, settings).compiled)(state, {}, {})
        return str(jaxpr).count("dot_general")

    # Forward, and the product for the clips; training the weights adds theirs.
    assert num_products(("clips",)) == 2
    assert num_products(("params", "clips")) == 3


def test_arguments_survive_a_step() -> None:
    params, policy = toy_params(), toy_policy()
    settings = OptimizeSettings(num_steps=4)
    state = init_state(params, policy, settings, num_constraints=1)
    make_train_step(toy_loss, toy_cost, settings)(state, toy_batch(0), toy_constants())
    np.testing.assert_array_equal(params["weight"], toy_params()["weight"])
    chex.assert_trees_all_equal(policy, toy_policy())


@pytest.mark.parametrize(
    ("groups", "method", "budget"),
    [
        (("thresholds",), "lagrangian", 0.5),  # at 7.5 bit the widths alone cost 0.44
        (("params", "thresholds", "bits", "clips"), "lagrangian", 0.3),
        (("params", "thresholds", "bits", "clips"), "pid", 0.3),
    ],
)
def test_budget_is_reached_and_kept_after_hardening(
    groups: tuple[Any, ...], method: Any, budget: float
) -> None:
    settings = OptimizeSettings(train=groups, num_steps=400, method=method)
    _, history, _ = train(settings, 400, budget=budget)
    ratios = np.array([metrics["ratio"][0] for metrics in history])
    assert ratios[0] > 1.2
    assert np.max(np.abs(ratios[-20:] - 1.0)) < RATIO_TOLERANCE


def test_rounding_widths_keeps_the_budget() -> None:
    """With widths alone trained, nothing could win back what rounding to the nearest costs."""
    settings = OptimizeSettings(train=("bits",), num_steps=300)
    _, history, policies = train(settings, 300, budget=0.5)
    fractional = policies[settings.hardened_step - 1]
    before = ratio_of(fractional, settings, budget=0.5)
    after = history[settings.hardened_step]["ratio"][0]
    assert abs(before - 1.0) < RATIO_TOLERANCE
    offsets = np.linspace(-0.499, 0.499, 200)
    costs = [ratio_of(deployed_bits(fractional, offset=o), settings, budget=0.5) for o in offsets]
    assert max(costs) > 1.0  # rounding up would break the budget
    # One offset for all reaches this much; single widths then fill what it leaves.
    assert max(c for c in costs if c <= 1.0) <= after <= 1.0
    rounded = policies[settings.hardened_step]
    for name, value in rounded.layers.items():
        if group(name) != "bits":
            continue
        for index, lack in np.ndenumerate(fractional.layers[name] - value):
            if lack > 0.0:
                more = np.array(value)
                more[index] += 1.0
                tried = rounded.replace(layers=rounded.layers | {name: more})  # type: ignore[attr-defined]
                assert ratio_of(tried, settings, budget=0.5) > 1.0
    np.testing.assert_array_equal([m["ratio"][0] for m in history[-80:]], after)


def test_widths_of_a_filter_stay_the_nearest_whatever_the_budget_leaves() -> None:
    """Thresholds are trained for the planes they see: 2.02 bit are seen as 2, and a third would drop other keys."""
    policy = Policy(
        layers={
            "key_bits": jnp.asarray([[2.02, 3.6, 7.4]]),
            "qk_bits": jnp.asarray([9.4]),
            "qkv.weight_bits": jnp.asarray([4.3]),
        },
        ends={},
    )
    for limit, weights, scores in ((99.0, 5.0, 10.0), (14.0, 4.0, 10.0), (13.0, 4.0, 9.0)):

        def ratio(tried: Policy, limit: float = limit) -> Any:
            return (tried.layers["qk_bits"] + tried.layers["qkv.weight_bits"]) / limit

        whole = hardened(policy, ratio).layers
        np.testing.assert_array_equal(whole["key_bits"], [[2.0, 4.0, 7.0]])
        assert (float(whole["qkv.weight_bits"][0]), float(whole["qk_bits"][0])) == (weights, scores)


def test_widths_meet_the_mean_over_the_batches_they_are_rounded_on() -> None:
    """Two batches whose costs differ threefold, the cheaper one three times as heavy."""

    def loss(
        params: Any, policy: Policy, batch: Any, constants: Any, relaxation: Relaxation
    ) -> tuple[jax.Array, LossAux]:
        loss, aux = toy_loss(params, policy, toy_batch(0), constants, relaxation)
        return loss, LossAux(terms=aux.terms, workload=aux.workload | {"scale": batch["scale"]})

    def cost(workload: Any, constants: Any, smoothness: jax.Array) -> jax.Array:
        return workload["scale"] * toy_cost(workload, constants, smoothness)

    settings = OptimizeSettings(num_steps=10)
    step_fn = make_train_step(loss, cost, settings)
    state = init_state(toy_params(), toy_policy(), settings, num_constraints=1)
    state = state.replace(step=jnp.asarray(settings.hardened_step))  # type: ignore[attr-defined]
    cheap, dear = {"scale": jnp.asarray(0.5)}, {"scale": jnp.asarray(1.5)}
    # At mean scale 0.75, widths between 7 and 8 bit and half the keys: in reach, but not with 8 bit throughout.
    constants = toy_constants(0.75 * (0.5 * (7.5 / 8.0) ** 2 + 0.25))
    hard = step_fn.harden(state, [(cheap, 3.0), (dear, 1.0)], constants)
    widths = hard.policy.layers
    assert all(np.all(v % 1.0 == 0.0) for k, v in widths.items() if group(k) == "bits")
    scales = {"mean": jnp.asarray(0.75), "dear": jnp.asarray(1.5)}
    ratios = {
        name: float(step_fn.ratios(hard, {"scale": scale}, constants, hard.policy)[0])  # type: ignore[misc]
        for name, scale in scales.items()
    }
    assert 0.97 < ratios["mean"] <= 1.0 < ratios["dear"]
    # On the dear batch alone nothing meets the budget: widths would all have been rounded down.
    alone = step_fn.harden(state, [(dear, 1.0)], constants).policy.layers
    lost = [np.sum(widths[name] - alone[name]) for name in widths if group(name) == "bits"]
    assert np.all(np.asarray(lost) >= 0.0) and np.any(np.asarray(lost) > 0.0)
    # Whole widths are not rounded again by the step.
    after, _ = step_fn(jax.tree.map(jnp.copy, hard), dear, constants)
    chex.assert_trees_all_equal(
        *(
            {k: v for k, v in p.layers.items() if group(k) == "bits"}
            for p in (after.policy, hard.policy)
        )
    )


def test_widths_are_whole_and_held_in_the_hardened_stage() -> None:
    settings = OptimizeSettings(num_steps=60, hardened_fraction=0.5)
    state, history, policies = train(settings, 60)
    assert settings.hardened_step == 30
    for name in policies[0].layers:
        values = np.stack([policy.layers[name] for policy in policies])
        if group(name) == "bits":
            assert np.all(values[30:] == np.round(values[30])), name
            assert np.all(np.abs(values[30] - values[29]) < 1.0), name
        else:
            assert not np.array_equal(values[30], values[-1]), name
    assert np.any(policies[29].layers["qkv.weight_bits"] % 1.0 != 0.0)


def test_schedules() -> None:
    settings = OptimizeSettings(num_steps=100, hardened_fraction=0.2)
    assert settings.hardened_step == 80
    at = [relaxation_at(jnp.asarray(step), settings) for step in (0, 40, 80, 99)]
    # Cosine from 0.5 to 0.05: half-way it is their mean; geometric from 8 to 32: half-way 16.
    np.testing.assert_allclose([r.temperature for r in at], [0.5, 0.275, 0.05, 0.05], rtol=1e-5)
    np.testing.assert_allclose([r.smoothness for r in at], [8.0, 16.0, 32.0, 32.0], rtol=1e-5)
    _, history, _ = train(settings, 21)
    scales = [float(history[step]["price_scale"]) for step in (0, 5, 10, 20)]
    np.testing.assert_allclose(scales, [0.0, 0.5, 1.0, 1.0], rtol=1e-6)
    assert history[0]["penalty"] == 0.0 < history[10]["penalty"]


def test_gradients_are_clipped_per_group() -> None:
    """A weight gradient of 1e6 must not shrink the thresholds' step."""

    def steep(params: Any, *rest: Any) -> tuple[jax.Array, LossAux]:
        loss, aux = toy_loss(params, *rest)
        return loss + 1e6 * jnp.sum(params["weight"]), aux

    settings = OptimizeSettings(num_steps=50)
    state = init_state(toy_params(), toy_policy(), settings, num_constraints=1)
    step_fn = make_train_step(steep, toy_cost, settings)
    state, metrics = step_fn(state, toy_batch(0), toy_constants())
    assert metrics["gradient_norm.params"] > 1e5
    # Adam's first step has the size of its rate, whatever the gradient's.
    moved = jnp.abs(state.policy.layers["threshold"])
    np.testing.assert_allclose(moved, settings.threshold_rate, rtol=1e-3)


def test_reserved_term_is_refused() -> None:
    def loss(*arguments: Any) -> tuple[jax.Array, LossAux]:
        value, aux = toy_loss(*arguments)
        return value, aux.replace(terms={"task": value})  # type: ignore[attr-defined]

    settings = OptimizeSettings()
    state = init_state(toy_params(), toy_policy(), settings, num_constraints=1)
    with pytest.raises(ValueError, match="reserved term 'task'"):
        make_train_step(loss, toy_cost, settings)(state, toy_batch(0), toy_constants())


def test_non_finite_loss_names_step_and_term() -> None:
    settings = OptimizeSettings()
    state = init_state(toy_params(), toy_policy(), settings, num_constraints=1)
    batch = {"target": jnp.asarray([1.0, jnp.nan, 3.0])}
    _, metrics = make_train_step(toy_loss, toy_cost, settings)(state, batch, toy_constants())
    with pytest.raises(NonFiniteError, match="`fit` is nan at step 7"):
        check_finite(metrics, 7)


def test_dead_threshold_names_knob_and_layer() -> None:
    watch = ThresholdWatch()
    dead = {"threshold_gradient.threshold": np.array([1e-3, 1e-9]), "task": np.array(0.0)}
    alive = {"threshold_gradient.threshold": np.array([1e-9, 1e-3])}
    for step in range(DEAD_GRADIENT_STEPS - 1):
        watch.observe(dead, step)
    watch.observe(alive, 99)  # one step with a gradient starts the count anew
    for step in range(100, 100 + DEAD_GRADIENT_STEPS - 1):
        watch.observe(dead, step)
    with pytest.raises(CodesignError, match="`threshold` of layer 1 .* step 199"):
        watch.observe(dead, 199)


def test_threshold_gradients_are_logged_by_layer() -> None:
    _, history, _ = train(OptimizeSettings(), 1)
    norms = history[0]["threshold_gradient.threshold"]
    assert norms.shape == (NUM_LAYERS,)
    np.testing.assert_allclose(
        np.linalg.norm(norms), history[0]["gradient_norm.thresholds"], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train", ()),
        ("train", ("weights",)),
        ("train", ("bits", "bits")),
        ("num_steps", 0),
        ("hardened_fraction", 1.0),
        ("price_warmup_fraction", -0.1),
        ("bits_rate", 0.0),
        ("bits_rate", math.nan),
        ("weight_rate", math.inf),
        ("weight_decay", -1.0),
        ("weight_decay", math.inf),
        ("temperature_end", 0.6),
        ("temperature_start", math.inf),
        ("smoothness_end", math.inf),
        ("smoothness_start", 1.0),
        ("method", "doubling"),
    ],
)
def test_settings_outside_their_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{field}`"):
        dataclasses.replace(OptimizeSettings(), **{field: value})


def sized_cost(workload: Any, constants: Any, smoothness: jax.Array) -> jax.Array:
    """The toy's cost on a machine: shorter with lanes up to a point, dearer with bytes."""
    sizes = constants["sizes"]
    factor = 4.0 / sizes["lanes"] + sizes["lanes"] / 16.0 + sizes["bytes"] / 100.0
    return toy_cost(workload, constants, smoothness) * factor


def capped(sizes: Any, workload: Any, constants: Any, smoothness: Any) -> dict[str, jax.Array]:
    assert workload["bits"].shape and "budget" in constants
    return {"lanes": sizes["lanes"], "bytes": jnp.maximum(sizes["bytes"], 10.0)}


def test_sizes_descend_on_the_ratios_and_stay_legal_and_whole_once_hardened() -> None:
    """Least cost at 8 lanes, where 4 / n + n / 16 has its minimum, and at the fewest bytes, whatever the price is."""
    settings = OptimizeSettings(
        train=("params", "thresholds", "bits", "clips", "sizes"), num_steps=120, size_rate=0.1
    )
    step_fn = make_train_step(toy_loss, sized_cost, settings, capped)
    start = {"lanes": jnp.asarray(3.0), "bytes": jnp.asarray(50.0)}
    state = init_state(toy_params(), toy_policy(), settings, 1, start)
    held = None
    for step in range(settings.num_steps):
        if step == settings.hardened_step:
            assert float(state.sizes["lanes"]) == pytest.approx(8.0, rel=0.05)
            assert float(state.sizes["bytes"]) == 10.0
            held = {"lanes": jnp.asarray(7.0, float), "bytes": jnp.asarray(33.3, float)}
            state = state.replace(sizes=jax.tree.map(jnp.copy, held))  # type: ignore[attr-defined]
        state, metrics = step_fn(state, toy_batch(step), toy_constants(2.0))
    assert "gradient_norm.sizes" in metrics
    chex.assert_trees_all_equal(state.sizes, held)
    assert step_fn.compiled._cache_size() == 1  # type: ignore[attr-defined]


def test_the_policy_trains_as_if_the_sizes_were_constants() -> None:
    """A step with trained sizes moves everything else as one with the same sizes held, bit for bit."""
    groups: Any = ("params", "thresholds", "bits", "clips")
    start = {"lanes": jnp.asarray(3.0), "bytes": jnp.asarray(50.0)}
    after = []
    for train_groups in (groups, (*groups, "sizes")):
        settings = OptimizeSettings(train=train_groups, num_steps=10)
        step_fn = make_train_step(toy_loss, sized_cost, settings, capped)
        state = init_state(toy_params(), toy_policy(), settings, 1, start)
        state, _ = step_fn(state, toy_batch(0), toy_constants(2.0))
        after.append(state)
    chex.assert_trees_all_equal(after[0].params, after[1].params)
    chex.assert_trees_all_equal(after[0].policy, after[1].policy)
    chex.assert_trees_all_equal(after[0].sizes, start)
    assert float(after[1].sizes["lanes"]) > 3.0


def test_trained_sizes_need_a_function_that_keeps_them_legal() -> None:
    with pytest.raises(CodesignError, match="give `sizes_fn`"):
        make_train_step(toy_loss, sized_cost, OptimizeSettings(train=("sizes",)))
