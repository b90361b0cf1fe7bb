"""FACT: leading ones and one-hot rows by hand, importance, counts, and the machine."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import existing, fast_cost
from tiny_policies import model_of, policy_of, run_hard

from codesign.experiments.traced import gemm_shapes, trace_of
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.closed_form import ModelShape
from codesign.hw.operating_points import closed_form_workload, published_setting
from codesign.hw.resizing import spec_with_sizes
from codesign.hw.simulator import simulate
from codesign.hw.spec import load_preset
from codesign.log_codes import leading_one
from codesign.mechanisms.fact import (
    OFF_CODE,
    codes,
    from_setting,
    from_strength,
    importance,
    score_shift,
    to_strength,
)
from codesign.references.fact import reference_importance, reference_one_hot

SPEC = load_preset("fact")


def test_products_of_the_worked_leading_ones() -> None:
    """The specification's pairs: 5 x 6, -3 x -4 and 7 x 1 become 16, 8 and 4, together 28 instead of 49."""
    pairs = np.asarray([[5, 6], [-3, -4], [7, 1]])
    products = np.prod(np.asarray(leading_one(jnp.asarray(pairs))), axis=1)
    assert products.tolist() == [16, 8, 4]
    assert pairs.prod(axis=1).sum() == 49
    numbers = jnp.asarray(np.random.default_rng(0).integers(1, 128, (2, 500)))
    ratio = jnp.prod(leading_one(numbers), axis=0) / jnp.prod(numbers, axis=0)
    assert jnp.all((ratio > 0.25) & (ratio <= 1.0))


def test_one_hot_rows_of_the_worked_scores() -> None:
    """Gaps 4 and 2 against 3; of one key alone it is always that one, and without the rule never."""
    scores = np.asarray([[[[9, 5, 1], [9, 7, 1], [9, 9, 1], [3, 3, 3]]]])
    exists = np.ones((1, 1, 4, 3), bool)
    exists[0, 0, 3, 1:] = False
    first, one_hot = reference_one_hot(scores, exists, np.asarray([3]), 0)
    assert one_hot[0, 0].tolist() == [True, False, False, True]
    assert np.flatnonzero(first[0, 0]).tolist() == [0, 3, 6, 9]
    assert not reference_one_hot(scores, exists, np.asarray([OFF_CODE]), 0)[1].any()
    # Scores that were shifted count for more.
    assert reference_one_hot(scores, exists, np.asarray([3]), 1)[1][0, 0].tolist() == [
        True,
        True,
        False,
        True,
    ]


def test_importance_is_against_the_mean_of_what_a_token_sees() -> None:
    kept = np.zeros((1, 2, 3, 3), bool)
    kept[0, :, :, 0] = True
    kept[0, 0, :, 1] = True
    exists = np.ones((1, 1, 3, 3), bool)
    # Kept 6, 3 and 0 times, 3 in the mean.
    assert reference_importance(kept, exists, 256).tolist() == [[True, True, False]]
    assert reference_importance(kept, exists, 257).tolist() == [[True, False, False]]
    assert reference_importance(kept, exists, 0).all()
    # A token of a causal model counts the rows up to itself: 2, 1 and 0, of those the means 2, 1.5 and 1.
    causal = np.tril(exists)
    assert reference_importance(kept & causal, causal, 256).tolist() == [[True, False, False]]
    assert reference_importance(kept & causal, causal, 171).tolist() == [[True, False, False]]
    assert reference_importance(kept & causal, causal, 170).tolist() == [[True, True, False]]


def test_importance_of_the_mechanism_is_the_references() -> None:
    rng = np.random.default_rng(0)
    kept = rng.random((2, 3, 7, 7)) < 0.4
    valid = np.arange(7) < np.asarray([[7], [4]])
    exists = np.broadcast_to(valid[:, None, None, :], (2, 1, 7, 7)) & np.tril(np.ones((7, 7), bool))
    with jax.enable_x64(True):
        arrays = (jnp.asarray(x, float) for x in (exists, valid, kept & exists))
        received, total = (np.asarray(x) for x in importance(*arrays))
    for threshold in (0, 128, 256, 400):
        wanted = reference_importance(kept & exists, exists, threshold)
        np.testing.assert_array_equal((received * 256 >= threshold * total)[valid], wanted[valid])


def test_strengths_settings_and_codes() -> None:
    strength = np.asarray([[[0.1, 0.5, 0.9]]])
    np.testing.assert_allclose(to_strength(from_strength(strength, {}), {}), strength)
    tensors = {"logit": np.asarray([1e-6])}
    knobs = {
        "qk_bits": np.asarray([12.0]),
        "threshold": from_setting((0.25, 3.0, 1.0), (1, 2, 3), {}),
    }
    stored = codes(knobs, tensors)
    # Predicted codes have eight bits: a product of them is worth 256 of twelve bits.
    np.testing.assert_array_equal(stored["threshold"], [[[256, 11719]] * 2])
    assert stored["importance"].tolist() == [256]
    knobs["threshold"] = from_setting((1.0, 16.0, 0.0), (1, 2, 3), {})
    stored = codes(knobs, tensors)
    np.testing.assert_array_equal(stored["threshold"], [[[1024, OFF_CODE]] * 2])
    assert stored["importance"].tolist() == [0]
    assert score_shift(64) == 0 and score_shift(512) == 2


@pytest.mark.parametrize("variant", ["bert", "decoder"])
def test_counts_are_those_of_a_plain_loop(variant: str) -> None:
    model = model_of(variant, "fact")
    deployment, output = run_hard(model, policy_of(model, "fact", seed=5), "fact")
    shape, workload, trace = deployment.structure, output.workload, output.trace
    valid, pairs = existing(model)
    heads, width, depth = shape.num_heads, shape.width, shape.head_dim
    for layer, example in np.ndindex(shape.num_layers, len(valid)):
        tokens, there = int(valid[example].sum()), int(pairs[example].sum())
        for head in range(heads):
            place = (example, layer, head)
            kept = trace["keep"][layer, 0, example, head] & pairs[example]
            rows = ~trace["one_hot"][layer, example, head] & valid[example]
            computed = kept[rows]
            np.testing.assert_array_equal(kept[~rows & valid[example]].sum(axis=-1), 1)
            wanted = kept.any(axis=0).sum()
            expected = {
                "encode.encode": tokens * (width / heads + 2 * depth),
                "predict.shift_add": 2 * tokens * width * depth,
                "filter0.shift_add": there * depth,
                "select.compare": there,
                "threshold.compare": tokens * (1 + 1 / heads),
                "generate.mac": 2 * wanted * width * depth,
                "qk.mac": computed.sum() * depth,
                "softmax.exp": computed.sum(),
                "pv.mac": computed.sum() * depth,
                "output.divide": rows.sum() * depth,
            }
            assert workload.operations.keys() == expected.keys()
            for key, count in expected.items():
                np.testing.assert_allclose(
                    workload.operations[key].count[place], count, err_msg=key
                )
        full = trace["ffn_full"][layer, example] & valid[example]
        # Four bits of eight: half a row.
        rows = full.sum() + 0.5 * (tokens - full.sum())
        np.testing.assert_allclose(workload.block_gemms["up"].rows[example, layer], rows)


# The machine


def test_published_point_has_the_published_area_and_power() -> None:
    shape = ModelShape(
        num_layers=1, num_tokens=512, num_heads=12, head_dim=64, width=768, hidden=3072
    )
    price = fast_cost(
        closed_form_workload(SPEC, shape, published_setting(SPEC)), accelerator_from_spec(SPEC)
    )
    point = SPEC.operating_point
    assert point.core_power is not None
    assert float(price.area_mm2("end_to_end")) == pytest.approx(point.area.value, rel=0.001)
    energy = {name: float(value[0]) for name, value in price.energy_by_unit("end_to_end").items()}
    core = sum(value for name, value in energy.items() if name != "dram")
    nanoseconds = float(price.latency_cycles("end_to_end")[0]) / 0.5
    assert core / nanoseconds == pytest.approx(point.core_power.base * 1e3, rel=0.005)
    # Two predictions of 512 x 768 x 64 and scores of 512 x 512 x 64, twelve heads, 256 a cycle.
    busy = float(price.busy_by_unit("attention")["prediction"][0])
    assert busy == pytest.approx(12 * (2 * 512 * 768 * 64 + 512 * 512 * 64) / 256)


@pytest.mark.parametrize("lanes", [32.0, 64.0])
def test_latency_knows_that_groups_wait_for_the_first_rows_keys(lanes: float) -> None:
    """Two heads on eight groups: the first row's keys are made on two of them, and attention of all rows waits."""
    model = model_of("bert", "fact")
    deployment, output = run_hard(model, policy_of(model, "fact", seed=5), "fact")
    shape, spec = deployment.structure, load_preset("fact")
    # Few enough lanes that no ceil of so small a model is seen.
    sizes = {"execution.lanes": lanes, "prediction.lanes": lanes / 2.0}
    spec = spec_with_sizes(spec, sizes)
    batch: Any = SimpleNamespace(tensors=output.trace, inputs=model.inputs)
    simulation = simulate(
        trace_of(deployment, batch), spec, gemm_shapes(shape), is_causal=shape.is_causal
    )
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), output.workload)
    price = fast_cost(single, accelerator_from_spec(spec))
    real, found = (np.asarray(one.latency_cycles("end_to_end")) for one in (simulation, price))
    # In rows of a few keys every window counts.
    is_long = np.asarray(model.inputs["valid"]).sum(axis=1) >= 5
    assert is_long.sum() >= 3
    assert np.mean(np.abs(found / real - 1.0)[is_long]) < 0.05
