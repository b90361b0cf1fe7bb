"""Exact top-k: bisection against a sort, counts, and the machine; whole models are in test_baselines."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import existing, fast_cost
from tiny_policies import policy_of, run_hard

from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.closed_form import ModelShape, Setting
from codesign.hw.operating_points import closed_form_workload
from codesign.hw.spec import load_preset
from codesign.mechanisms.topk import codes, from_setting, from_strength, score_bits, to_strength
from codesign.references.topk import reference_top
from codesign.segments import SHARE_ONE, exact_top, soft_exact_top, soft_top

SPEC = load_preset("topk")


# Selection


def kept_of_row(scores: list[int], share: int, dtype: Any = jnp.float32) -> set[int]:
    row = jnp.asarray(scores, dtype)[None, None, None]
    kept = exact_top(row, jnp.ones_like(row), jnp.asarray([share]), 6)
    return {int(place) for place in np.flatnonzero(kept)}


def test_keys_of_the_worked_row() -> None:
    """The specification's row: four of eight without a tie at the threshold, six with one."""
    row = [9, 8, 7, 1, 2, 3, 1, 0]
    assert kept_of_row(row, SHARE_ONE * 4 // 8) == {0, 1, 2, 5}
    assert kept_of_row(row, SHARE_ONE * 6 // 8) == {0, 1, 2, 3, 4, 5}
    assert kept_of_row(row, SHARE_ONE) == set(range(8))
    assert kept_of_row(row, 1) == {0}


@pytest.mark.parametrize("bits", [3, 10, 38])
@pytest.mark.parametrize("keys", [1, 7, 64])
def test_bisection_equals_a_stable_sort(bits: int, keys: int) -> None:
    rng = np.random.default_rng(keys + bits)
    most = 2 ** (bits - 1) - 1
    scores = rng.integers(-most - 1, most + 1, (3, 4, 9, keys))
    # A few values many times: rows of ties at any width.
    scores[1] = rng.choice([-most - 1, -1, 0, most], scores[1].shape)
    exists = rng.random((3, 1, 9, keys)) < 0.8
    share = rng.integers(1, SHARE_ONE + 1, 4)
    with jax.enable_x64(True):
        kept = exact_top(jnp.asarray(scores, float), jnp.asarray(exists, float), share, bits)
    np.testing.assert_array_equal(kept, reference_top(scores, exists, share))


def test_bisection_in_single_precision_sorts_what_it_holds() -> None:
    """Codes of 16 bits give scores of 38, of which a float32 holds the first 24: those are compared exactly."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 2, 8, 33)) * 2.0 ** rng.integers(0, 37, (2, 2, 8, 33))
    held = np.rint(scores).astype(np.float32)
    share = np.asarray([200, 700])
    exists = np.ones((2, 1, 8, 33), bool)
    kept = exact_top(jnp.asarray(held), jnp.asarray(exists, jnp.float32), share, 38)
    np.testing.assert_array_equal(kept, reference_top(held.astype(np.int64), exists, share))


def test_soft_keys_tend_to_the_largest_at_any_width() -> None:
    rng = np.random.default_rng(1)
    scores = jnp.asarray(rng.normal(size=(2, 2, 5, 19)) * 2.0**36, jnp.float32)
    pairs = jnp.asarray(rng.random((2, 1, 5, 19)) < 0.9, jnp.float32)
    share = np.asarray([300, 800])
    hard = exact_top(scores, pairs, share, 38)
    cold = tiny_model.relaxation(temperature=1e-5, straight_through=False)
    soft = soft_exact_top(scores, pairs, jnp.asarray(share / SHARE_ONE), 38, cold)
    np.testing.assert_allclose(soft, hard, atol=1e-3)


def test_soft_keys_are_those_of_short_scores_equal_ones_included() -> None:
    """Values and derivatives of `soft_top`, whose scores carry their places; a row without a spread has no steeper gate."""
    rng = np.random.default_rng(2)
    scores = jnp.asarray(rng.integers(-200, 200, (1, 2, 6, 9)), jnp.float32)
    scores = scores.at[0, :, 0].set(0.0).at[0, :, 1].set(64.0).at[0, :, 2, ::2].set(17.0)
    pairs, slope = jnp.ones((1, 1, 6, 9)), rng.normal(size=scores.shape)
    share, warm = jnp.asarray([0.3, 0.8]), tiny_model.relaxation(straight_through=False)

    def weights(top: Callable[..., jax.Array]) -> tuple[jax.Array, Any]:
        def total(scores: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
            kept = top(scores, pairs, share, 16, warm)
            return jnp.sum(slope * kept), kept

        slopes, kept = jax.grad(total, argnums=(0, 1), has_aux=True)(scores, share)
        return kept, slopes

    for wide, short in zip(
        jax.tree.leaves(weights(soft_exact_top)), jax.tree.leaves(weights(soft_top)), strict=True
    ):
        np.testing.assert_allclose(wide, short, rtol=1e-4, atol=1e-5)
        assert np.any(np.asarray(wide) != 0.0)


@pytest.mark.parametrize("unit", [2.0**-30, 0.37, 2.0**20])
def test_deployed_decisions_are_those_of_any_unit(unit: float) -> None:
    """Importances are sums of probabilities, mostly below 1."""
    scores = np.random.default_rng(3).uniform(size=(1, 2, 5, 19)).astype(np.float32)
    share, pairs = np.asarray([300, 800]), jnp.ones((1, 1, 5, 19))
    kept = soft_exact_top(
        jnp.asarray(scores * np.float32(unit)),
        pairs,
        jnp.asarray(share / SHARE_ONE),
        40,
        tiny_model.relaxation(),
    )
    order = np.argsort(np.argsort(-scores, axis=-1), axis=-1)
    wanted = np.ceil(share * 19 / SHARE_ONE)[None, :, None, None]
    np.testing.assert_array_equal(kept, order < wanted)


def test_strengths_settings_and_codes() -> None:
    strength = np.asarray([[[0.1], [0.9]]])
    np.testing.assert_allclose(to_strength(from_strength(strength, {}), {}), strength)
    stored = codes({"threshold": from_setting((0.25,), (1, 2, 1), {})}, {})["threshold"]
    np.testing.assert_array_equal(stored, 256)
    for kept, share in ((1.0, SHARE_ONE), (0.0, 1)):
        assert codes({"threshold": from_setting((kept,), (1, 1, 1), {})}, {})["threshold"] == share
    assert score_bits(16.0, 64) == 38.0


# Whole models


@pytest.mark.parametrize("variant", ["patches", "bert", "decoder"])
def test_counts_are_those_of_a_plain_loop(variant: str) -> None:
    model = tiny_model.random_model(variant)
    deployment, output = run_hard(model, policy_of(model, "topk", seed=5), "topk")
    shape = deployment.structure
    valid, pairs = existing(model)
    keep = (output.trace["keep"] & pairs[None, None, :, None])[:, 0]
    workload = output.workload
    width = 2 * 12 + int(np.ceil(np.log2(shape.head_dim)))
    for layer in range(shape.num_layers):
        for example in range(len(valid)):
            tokens, there = int(valid[example].sum()), int(pairs[example].sum())
            for head in range(shape.num_heads):
                kept = keep[layer, example, head]
                expected = {
                    "qk.mac": there * shape.head_dim,
                    "select.compare": there * (width + 1),
                    "softmax.exp": kept.sum(),
                    "softmax.reciprocal": tokens,
                    "pv.mac": kept.sum() * shape.head_dim,
                    "output.multiply": tokens * shape.head_dim,
                }
                assert workload.operations.keys() == expected.keys()
                for key, count in expected.items():
                    assert workload.operations[key].count[example, layer, head] == count, key
                place = (example, layer, head)
                assert workload.rows["all"].segments[place][0] == there
                assert workload.rows["attention"].segments[place][0] == kept.sum()
                # One query at a time every pair is a key fetched, and every kept pair a value.
                assert workload.streams["key0"].vectors[place][0] == there
                assert workload.streams["value"].vectors[place][0] == kept.sum()
                assert workload.streams["value"].vectors[place][-1] == kept.any(axis=0).sum()
    np.testing.assert_array_equal(workload.streams["key_rest"].bits, 0.0)


# The machine


def test_area_is_that_of_its_parts() -> None:
    """640 multipliers, 256 comparators, 144 KB and 8 softmax lanes, mm2."""
    accelerator = accelerator_from_spec(SPEC)
    shape = ModelShape(num_layers=1, num_tokens=8, num_heads=1, head_dim=64, width=64, hidden=64)
    area = fast_cost(closed_form_workload(SPEC, shape, Setting()), accelerator).area_mm2(
        "attention"
    )
    own = 640 * 0.00171 + 256 * 8.6e-5 + 144 * 0.00157 + 8 * 0.00417
    assert float(area) == pytest.approx(own, rel=1e-6) == pytest.approx(1.376, abs=1e-3)


def test_rows_of_the_worked_check_take_the_selectors_time() -> None:
    """512 keys of 64 elements, a quarter kept: 64 cycles of scores, 78 of bisection, 64 of values a row."""
    shape = ModelShape(num_layers=1, num_tokens=512, num_heads=1, head_dim=64, width=64, hidden=256)
    workload = closed_form_workload(SPEC, shape, Setting(kept=(0.25,), union=1.0))
    price = fast_cost(workload, accelerator_from_spec(SPEC))
    busy = {name: float(cycles[0, 0]) / 512 for name, cycles in price.unit_busy_cycles.items()}
    assert busy["qk"] == 64.0 and busy["bisection"] == 78.0
    assert busy["pv"] == 64.0 and busy["softmax"] == 16.0
    # Keys and values once, queries and outputs beside them: less than the rows take.
    assert busy["dram"] < 78.0
    fill = 64 + 78 + 64 + 32
    assert float(price.attention_cycles[0, 0]) == pytest.approx(512 * 78 + fill, rel=1e-6)
