"""SpAtten: importances and cascades by hand, schedules, the error of high bits alone, counts, and the machine."""

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
from codesign.mechanisms.spatten import (
    ALWAYS_CODE,
    LOW_BITS,
    codes,
    from_setting,
    from_strength,
    ramp,
    to_strength,
)
from codesign.references.spatten import carry_on, first_largest, plan, start
from codesign.structure import ModelStructure

SPEC = load_preset("spatten")
PROBABILITIES = [
    [[0.5, 0.3, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1]],
    [[0.1, 0.6, 0.2, 0.1], [0.2, 0.5, 0.2, 0.1]],
]
"""The specification's two heads of two queries and four keys."""


def hand_layers() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Plans of the second and third layer after a first one of the worked probabilities, in 1/100."""
    structure = ModelStructure(
        **(vars(model_of("bert", "dense").structure) | {"num_heads": 2, "num_layers": 3})
    )
    exists = np.ones((1, 1, 4, 4), bool)
    carry = start(structure, 1, 4)
    layer = {name: np.asarray(value) for name, value in (("qk_bits", 16), ("head_factor", 1))}
    layer["threshold"] = np.asarray([1024, 1024, 1024, 0])
    inputs = np.zeros((1, 4, 2), np.int64)
    first = plan(structure, layer, inputs, exists, carry)
    assert first["tokens"].all() and first["heads"].all()
    # Queries 2 and 3 attend to nothing here: the worked example has two.
    probabilities = np.zeros((1, 2, 4, 4), np.int64)
    probabilities[0, :, :2] = np.rint(np.asarray(PROBABILITIES) * 100)
    context = np.zeros((1, 4, 4), np.int64)
    context[0, :, 2:] = 3
    tensors = first | {"probabilities": probabilities, "context": context}
    carry = carry_on(layer, carry, tensors, exists)
    assert carry["token"][0, 0].tolist() == [120, 180, 60, 40]
    assert carry["head"][0, 0].tolist() == [0, 24]
    layer["threshold"] = np.asarray([512, 512, 1024, 0])
    second = plan(structure, layer, inputs, exists, carry)
    left = exists & second["tokens"][:, None, None, :]
    carry = carry_on(
        layer, carry, second | {"probabilities": 0 * probabilities, "context": context}, left
    )
    layer["threshold"] = np.asarray([500, 512, 1024, 0])
    return second, plan(structure, layer, inputs, left, carry)


def test_cascade_of_the_worked_probabilities() -> None:
    """Importances 1.2, 1.8, .6, .4: half of the tokens are 0 and 1, and later layers never see 2 and 3."""
    second, third = hand_layers()
    assert second["tokens"].tolist() == third["tokens"].tolist() == [[True, True, False, False]]
    rows = [[False] * 4, [True, True, False, False]]
    assert second["heads"].tolist() == third["heads"].tolist() == [rows]


def test_kept_are_the_largest_and_the_first_of_equals() -> None:
    scores = np.asarray([[5, 7, 7, 1, 7]])
    exists = np.asarray([[True, True, True, True, False]])
    assert first_largest(scores, exists, 512).tolist() == [[False, True, True, False, False]]
    assert first_largest(scores, exists, 257).tolist() == [[False, True, True, False, False]]
    assert first_largest(scores, exists, 256).tolist() == [[False, True, False, False, False]]


def test_ramp_is_that_of_the_published_schedule() -> None:
    """The specification's twelve layers, three of which keep all, down to 0.3."""
    wanted = [1, 1, 1, 0.922, 0.844, 0.767, 0.689, 0.611, 0.533, 0.456, 0.378, 0.3]
    np.testing.assert_allclose(ramp(12, 0.3, 3), wanted, atol=6e-4)


def test_shares_of_a_setting_are_cumulative() -> None:
    tensors = {"out": np.linspace(0.01, 0.02, 12)}
    stored = codes({"threshold": from_setting((0.3, 0.6, 0.2, 0.1), (12, 4), {})}, tensors)
    shares = stored["threshold"]
    np.testing.assert_allclose(shares[:, 0] / 1024, ramp(12, 0.3, 2), atol=2e-3)
    np.testing.assert_allclose(shares[:, 1] / 1024, ramp(12, 0.6, 4), atol=2e-3)
    assert set(shares[:, 2]) == {205} and set(shares[:, 3]) == {26}
    assert stored["head_factor"][0] == 512 and stored["head_factor"][-1] == 1024
    everything = codes({"threshold": from_setting((1.0,) * 4, (12, 4), {})}, tensors)["threshold"]
    np.testing.assert_array_equal(everything[:, :3], 1024)
    np.testing.assert_array_equal(everything[:, 3], ALWAYS_CODE)
    strength = np.asarray([[0.1, 0.2, 0.3, 0.9]])
    np.testing.assert_allclose(to_strength(from_strength(strength, {}), {}), strength)


def test_published_keys_of_gpt2_are_a_quarter() -> None:
    """921, 716, 4 x 204 and 6 x 102 of 1024 keys (repository): 24.9 % in the mean."""
    keys = np.asarray([921, 716, *[204] * 4, *[102] * 6])
    assert keys.mean() / 1024 == pytest.approx(0.249, abs=5e-4)
    steps = keys / np.concatenate([[1024], keys[:-1]])
    parts = np.concatenate([steps[:, None], np.full((12, 3), 0.5)], axis=1)
    variable = np.log(parts) - np.log1p(-np.minimum(parts, 1 - 1e-4))
    stored = codes({"threshold": variable}, {"out": np.ones(12)})["threshold"]
    np.testing.assert_allclose(stored[:, 0], keys, atol=1)


@pytest.mark.parametrize("error", [0.1, 0.5])
def test_error_of_a_score_moves_probabilities_by_half_of_it_at_most(error: float) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2000, 8)) * 3
    moved = scores + np.eye(8)[0] * error
    before, after = jax.nn.softmax(scores), jax.nn.softmax(moved)
    change = jnp.sum(jnp.abs(after - before), axis=-1)
    p0 = before[:, 0]
    # The derivative is 2 p0 (1 - p0), at most 1/2, wherever between the two scores it is taken.
    assert jnp.all(change <= error / 2 + 1e-6)
    small = jnp.sum(jnp.abs(jax.nn.softmax(scores + np.eye(8)[0] * 1e-3) - before), axis=-1)
    np.testing.assert_allclose(small, 2e-3 * p0 * (1 - p0), atol=2e-6)
    assert 2 * 0.1 * 0.5 * 0.5 == 0.05


@pytest.mark.parametrize("variant", ["bert", "decoder"])
def test_counts_are_those_of_a_plain_loop(variant: str) -> None:
    model = model_of(variant, "spatten")
    deployment, output = run_hard(model, policy_of(model, "spatten", seed=5), "spatten")
    shape, workload, trace = deployment.structure, output.workload, output.trace
    valid, pairs = existing(model)
    heads = shape.num_heads
    for layer, example in np.ndindex(shape.num_layers, len(valid)):
        alive = int(trace["tokens"][layer, example].sum())
        left = trace["keep"][layer, 0, example]
        assert alive == left.any(axis=(0, 1)).sum() or shape.is_causal
        compared = alive + heads
        if shape.is_causal and valid[example].sum() > 1:
            before = pairs[example]
            if layer:
                before = trace["keep"][layer - 1, 0, example].any(axis=0)
            compared = before.sum() + alive * heads
        for head in range(heads):
            place = (example, layer, head)
            kept, low = trace["keep"][layer, :, example, head]
            used = trace["used"][layer, example, head] & kept
            rows = trace["heads"][layer, example, head]
            np.testing.assert_array_equal(kept.any(axis=-1), rows)
            queries = rows.sum()
            expected = {
                "filter0.mac": kept.sum() * shape.head_dim,
                "threshold.compare": queries,
                "qk.mac": low.sum() * shape.head_dim,
                "softmax.exp": kept.sum() + low.sum(),
                "softmax.reciprocal": queries + low.any(axis=-1).sum(),
                "select.compare": kept.sum() + compared / heads,
                "pv.mac": used.sum() * shape.head_dim,
                "output.multiply": queries * shape.head_dim,
            }
            assert workload.operations.keys() == expected.keys()
            for key, count in expected.items():
                assert workload.operations[key].count[place] == count, key
            for stream, mask in (("key0", kept), ("key1", low), ("value", used)):
                assert workload.streams[stream].vectors[place][-1] == mask.any(axis=0).sum()
    np.testing.assert_array_equal(workload.streams["key1"].bits, LOW_BITS)
    np.testing.assert_array_equal(workload.streams["key0"].bits, 12 - LOW_BITS)


def test_pruned_tokens_and_heads_leave_the_linear_layers_and_the_mean_too() -> None:
    model = model_of("patches", "spatten")
    deployment, output = run_hard(model, policy_of(model, "spatten", seed=5), "spatten")
    alive = output.trace["tokens"].sum(axis=-1)
    # Logits are sums over the tokens that are left, whose number makes a mean of them.
    np.testing.assert_array_equal(output.num_pooled, alive[-1])
    real = deployment.real_logits(output.logits, output.num_pooled)
    np.testing.assert_allclose(real * alive[-1][:, None], output.logits * deployment.logit_scale)
    rows = output.trace["heads"].sum(axis=-1).mean(axis=-1)
    assert np.all(alive[0] == alive[0, 0]) and np.all(alive[1] < alive[0])
    gemms = output.workload.block_gemms
    for site, wanted in (("up", alive), ("down", alive), ("qkv", rows), ("out", rows)):
        np.testing.assert_allclose(gemms[site].rows, wanted.T, err_msg=site)


# The machine


def test_published_point_has_the_published_area_and_power() -> None:
    shape = ModelShape(num_layers=1, num_tokens=1024, num_heads=1, head_dim=64, width=64, hidden=64)
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
    # 255 tokens: a key per cycle by high bits, and again in 7 % of the rows; a fifth of the values.
    busy = {name: float(cycles[0, 0]) / 255 for name, cycles in price.unit_busy_cycles.items()}
    assert busy["qk"] == pytest.approx(255 * 1.07, rel=1e-3)
    assert busy["pv"] == pytest.approx(51.0, rel=1e-3)
