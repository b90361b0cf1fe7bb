"""A3: the worked search, the search against a sort of all products, limits, counts, and the machine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import existing, fast_cost
from tiny_policies import model_of, policy_of, run_hard

from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.closed_form import ModelShape
from codesign.hw.operating_points import closed_form_workload, published_setting
from codesign.hw.spec import load_preset
from codesign.mechanisms.a3 import (
    OFF_CODE,
    candidates,
    codes,
    from_setting,
    from_strength,
    search,
    searched_scores,
    to_strength,
)
from codesign.references.a3 import filter_pairs, searched_scores as reference_scores

SPEC = load_preset("a3")
HAND_QUERY = np.asarray([[1, -2]])
HAND_KEYS = np.asarray([[4, 1], [-3, 2], [2, -3], [0, 5]])
SEEN = np.ones((1, 4), bool)


def test_search_of_the_worked_keys() -> None:
    """The specification's four keys and two steps, with the guard and without it."""
    free = reference_scores(HAND_QUERY, HAND_KEYS, SEEN, 2, has_guard=False)
    assert free.tolist() == [[4, -4, 6, -10]]
    guarded = reference_scores(HAND_QUERY, HAND_KEYS, SEEN, 2)
    assert guarded.tolist() == [[4, 0, 6, -10]]
    for scores in (free, guarded):
        mask = candidates(
            jnp.asarray(scores[None, None]), jnp.asarray(SEEN[None, None]), jnp.zeros(1, bool)
        )
        assert np.flatnonzero(mask).tolist() == [0, 2]


def test_all_steps_without_the_guard_are_twice_the_scores() -> None:
    scores = reference_scores(HAND_QUERY, HAND_KEYS, SEEN, 8, has_guard=False)
    assert scores.tolist() == [[4, -14, 16, -20]] == (2 * HAND_QUERY @ HAND_KEYS.T).tolist()


def test_kept_key_of_the_worked_query() -> None:
    """Exact scores 2 and 8, T_pct = 5: only the second lies within ln 20 of the largest."""
    distance = int(
        np.floor(np.log(20) * 1.0)
    )  # scores are whole, so 8 - 2.9957 keeps what 8 - 2 does
    layer = {"search_bits": np.asarray(1), "threshold": np.asarray([[distance]])}
    shaped = (HAND_QUERY[None, None], HAND_KEYS[None, None], SEEN[None, None])
    kept, tensors = filter_pairs(layer, *shaped, {})
    assert np.flatnonzero(kept).tolist() == [2]
    assert np.flatnonzero(tensors["keep"][0]).tolist() == [0, 2]
    off = layer | {"threshold": np.asarray([[OFF_CODE]])}
    assert filter_pairs(off, *shaped, {})[0].all()


@functools.partial(jax.jit, static_argnames=("has_guard", "most", "steps"))
def run_search(query, key, valid, visible, *, steps, has_guard, most):
    found = search(query, key, valid, visible, jnp.asarray(steps), has_guard=has_guard, most=most)
    return [searched_scores(found, jnp.asarray(n), key.shape[2]) for n in (steps, steps // 2)]


@pytest.mark.parametrize("has_guard", [True, False])
@pytest.mark.parametrize(("steps", "most"), [(1, 4), (8, 16), (64, 64), (256, 256)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_search_is_that_of_sorted_products(
    steps: int, most: int, has_guard: bool, is_causal: bool
) -> None:
    """Few values, so that ties abound; 256 steps take more products than the shorter example has."""
    rng = np.random.default_rng(steps)
    query, key = rng.integers(-3, 4, (2, 2, 9, 6)), rng.integers(-4, 5, (2, 2, 9, 6))
    valid = np.arange(9) < np.asarray([[9], [5]])
    visible = np.broadcast_to(valid[:, None, None, :], (2, 1, 9, 9))
    if is_causal:
        visible = visible & np.tril(np.ones((9, 9), bool))
    with jax.enable_x64(True):
        arrays = (jnp.asarray(query, jnp.int32), jnp.asarray(key, jnp.int32))
        found = run_search(
            *arrays,
            jnp.asarray(valid, float),
            jnp.asarray(visible) if is_causal else None,
            steps=steps,
            has_guard=has_guard,
            most=most,
        )
    for number, got in zip((steps, steps // 2), found, strict=True):
        for example, head in np.ndindex(2, 2):
            own = valid[example]
            wanted = reference_scores(
                query[example, head],
                key[example, head][own],
                visible[example, 0][:, own],
                number,
                has_guard=has_guard,
            )
            np.testing.assert_array_equal(got[example, head][:, own], wanted)
            assert not np.any(np.asarray(got)[example, head][:, ~own])


def test_strengths_settings_and_codes() -> None:
    strength = np.asarray([[[0.1], [0.9]]])
    np.testing.assert_allclose(to_strength(from_strength(strength, {}), {}), strength)
    tensors = {"logit": np.asarray([1e-6])}
    stored = codes({"threshold": from_setting((np.log(20.0),), (1, 2, 1), {})}, tensors)[
        "threshold"
    ]
    assert np.ravel(stored).tolist() == [2996094] * 2  # 767 of 256ths
    assert np.all(
        codes({"threshold": from_setting((16.0,), (1, 2, 1), {})}, tensors)["threshold"] == OFF_CODE
    )


@pytest.mark.parametrize("variant", ["patches", "decoder"])
def test_counts_are_those_of_a_plain_loop(variant: str) -> None:
    model = model_of(variant, "a3")
    policy = policy_of(model, "a3", seed=5, search_bits=4.0)
    # One head takes all keys without a search.
    threshold = policy.layers["threshold"].at[1, 0].set(20.0)
    policy = policy.replace(layers=policy.layers | {"threshold": threshold})
    deployment, output = run_hard(model, policy, "a3")
    shape, workload = deployment.structure, output.workload
    valid, pairs = existing(model)
    keep = output.trace["keep"] & pairs[None, None, :, None]
    for layer, example, head in np.ndindex(shape.num_layers, len(valid), shape.num_heads):
        place, (scored, kept) = (example, layer, head), keep[layer, :, example, head]
        tokens = int(valid[example].sum())
        is_on = (layer, head) != (1, 0)
        expected = {
            "predict.multiply": 32 * tokens * is_on,
            "predict.compare": 32 * 3 * tokens * is_on,
            "threshold.compare": scored.sum() * is_on,
            "qk.mac": scored.sum() * shape.head_dim,
            "softmax.exp": kept.sum(),
            "softmax.reciprocal": tokens,
            "pv.mac": kept.sum() * shape.head_dim,
            "output.multiply": tokens * shape.head_dim,
        }
        assert workload.operations.keys() == expected.keys()
        for key, count in expected.items():
            assert workload.operations[key].count[place] == count, key
        assert workload.rows["searched"].segments[place][0] == 16 * tokens * is_on
        assert workload.rows["scored"].segments[place][0] == scored.sum()
        for stream in ("key_rest", "value"):
            assert workload.streams[stream].vectors[place][-1] == tokens
        if not is_on:
            np.testing.assert_array_equal(kept, pairs[example])


# The machine


def test_published_point_has_the_published_area_and_power() -> None:
    shape = ModelShape(num_layers=1, num_tokens=320, num_heads=1, head_dim=64, width=64, hidden=64)
    price = fast_cost(
        closed_form_workload(SPEC, shape, published_setting(SPEC)), accelerator_from_spec(SPEC)
    )
    point = SPEC.operating_point
    assert point.core_power is not None
    assert float(price.area_mm2("attention")) == pytest.approx(point.area.value, rel=0.001)
    energy = {name: float(value[0]) for name, value in price.energy_by_unit("attention").items()}
    core = sum(value for name, value in energy.items() if name != "dram")
    milliwatts = core / float(price.latency_cycles("attention")[0])
    assert milliwatts == pytest.approx(point.core_power.base * 1e3, rel=0.005)
    # A query takes the longest of M_s, its candidates and its kept keys.
    busy = {name: float(cycles[0, 0]) / 320 for name, cycles in price.unit_busy_cycles.items()}
    assert busy["search"] == pytest.approx(2.0**7.32, rel=1e-3)
    assert busy["qk"] == pytest.approx(128.0) and busy["pv"] == pytest.approx(32.0)
