"""Sanger: pack and split by hand, the mask at its limits, directions, counts, and the machine."""

import numpy as np
import pytest
from tiny_model import existing, fast_cost
from tiny_policies import model_of, policy_of, run_hard

from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.closed_form import ModelShape
from codesign.hw.operating_points import closed_form_workload, published_setting
from codesign.hw.spec import load_preset
from codesign.mechanisms.sanger import codes, from_setting, from_strength, to_strength
from codesign.references.sanger import (
    direction,
    lockstep_slots,
    packed_slots,
    packed_utilisation,
    reference_mask,
)

SPEC = load_preset("sanger")
MANTISSA, SHIFT = 24576, 10
"""24 of 4096 steps an octave: a score less by 170.67 halves a probability."""


def test_utilisation_of_the_worked_rows() -> None:
    """The specification's pieces of 0, 5, 16 and 20 pairs: 0, 1, 1 and 2 segments of 16."""
    mask = np.zeros((4, 64), bool)
    for row, number in enumerate((0, 5, 16, 20)):
        mask[row, :number] = True
    assert packed_utilisation(mask) == 0.640625
    # Side by side they are one row in four pieces, and uncut it fills its segments better.
    assert packed_utilisation(mask.reshape(1, 256)) == 0.640625
    assert packed_utilisation(mask.reshape(1, 256), piece=256) == pytest.approx(41 / 16 / 3)


def test_rows_in_lock_step_wait_for_the_longest() -> None:
    """Of 0, 5, 16 and 20 pairs: two steps of 16 elements for four rows, or one for the first two and two for the others."""
    mask = np.zeros((4, 64), bool)
    for row, number in enumerate((0, 5, 16, 20)):
        mask[row, :number] = True
    assert lockstep_slots(mask) == 4 * 2 * 16
    assert lockstep_slots(mask, rows=2) == 2 * 16 + 2 * 2 * 16
    # The last block has one row; a piece that no row of a block wants takes no step.
    assert lockstep_slots(mask, rows=3) == 3 * 16 + 2 * 16
    assert lockstep_slots(np.concatenate([mask, 0 * mask], axis=1) > 0) == 4 * 2 * 16
    assert lockstep_slots(np.concatenate([mask, mask[::-1]], axis=1)) == 2 * 4 * 2 * 16
    assert packed_slots(mask) == 4 * 16


def test_packing_never_takes_more_places_than_lock_step() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((3, 2, 100, 150)) < rng.uniform(0.0, 0.6, (3, 2, 100, 1))
    packed, lockstep = packed_slots(mask), lockstep_slots(mask)
    assert packed.shape == lockstep.shape == (3, 2)
    assert np.all(mask.sum(axis=(-2, -1)) <= packed) and np.all(packed < lockstep)
    alike = np.broadcast_to(mask[:, :, :1], mask.shape)
    np.testing.assert_array_equal(packed_slots(alike), lockstep_slots(alike))
    one = float(mask[1, 1].sum() / packed[1, 1])
    assert packed_utilisation(mask[1, 1]) == one


def masks(threshold: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    scores = np.repeat(rng.integers(-1500, 1500, (2, 1, 7, 19)), len(threshold), axis=1)
    exists = rng.random((2, 1, 7, 19)) < 0.8
    exists[..., 4] = True
    kept = reference_mask(scores, exists, np.asarray(threshold), MANTISSA, SHIFT)
    return scores, exists, kept


def test_mask_is_a_threshold_of_the_softmax() -> None:
    tau = [0.001, 0.03, 0.2]
    scores, exists, kept = masks([round(value * 2**16) for value in tau])
    octaves = scores * MANTISSA / 2.0**SHIFT / 4096
    weights = np.where(exists, 2.0 ** (octaves - octaves.max()), 0.0)
    probability = weights / weights.sum(axis=-1, keepdims=True)
    own = np.broadcast_to(np.asarray(tau)[None, :, None, None], probability.shape)
    clear = np.abs(probability / own - 1.0) > 0.001
    largest = np.where(exists, scores, -(2**40))
    is_first = np.arange(19) == largest.argmax(axis=-1)[..., None]
    np.testing.assert_array_equal(kept[clear], ((probability > own) & exists | is_first)[clear])
    assert np.mean(clear) > 0.99


def test_limits_of_the_threshold() -> None:
    _, exists, kept = masks([0, 1, 700, 2**16])
    np.testing.assert_array_equal(kept[:, 0], np.broadcast_to(exists[:, 0], kept[:, 0].shape))
    np.testing.assert_array_equal(kept[:, -1].sum(axis=-1), 1)
    for looser, tighter in ((0, 1), (1, 2), (2, 3)):
        assert not np.any(kept[:, tighter] & ~kept[:, looser])


@pytest.mark.parametrize("bits", [8, 16])
def test_directions_and_norms_are_those_of_the_rows(bits: int) -> None:
    rng = np.random.default_rng(bits)
    rows = rng.integers(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1), (40, 16))
    low, norm = direction(rows, 20000, bits)
    size = np.linalg.norm(rows, axis=-1, keepdims=True)
    wanted = np.clip(np.rint(rows / size * 7 * 2**15 / 20000), -7, 7)
    assert np.mean(low == wanted) > 0.999 and np.abs(low - wanted).max() <= 1
    np.testing.assert_allclose(norm, size * 2.0 ** (8 - bits), atol=0.5)
    # A factor on a row changes its norm alone.
    np.testing.assert_array_equal(direction(2 * rows, 20000, bits + 1)[0], low)
    np.testing.assert_array_equal(direction(0 * rows, 20000, bits)[0], 0)


def test_strengths_settings_and_codes() -> None:
    strength = np.asarray([[[0.1], [0.9]]])
    np.testing.assert_allclose(to_strength(from_strength(strength, {}), {}), strength)
    tensors = {
        "logit": np.asarray([1e-8]),
        "sanger_query": np.asarray([0.5]),
        "sanger_key": np.asarray([0.75]),
    }
    knobs = {"qk_bits": np.asarray([12.0]), "threshold": from_setting((0.002,), (1, 2, 1), {})}
    stored = codes(knobs, tensors)
    assert np.ravel(stored["threshold"]).tolist() == [131, 131]
    assert stored["query_range"].tolist() == [2**14]
    assert stored["key_range"].tolist() == [3 * 2**13]
    # 16 codes a unit of either norm, 7 steps of 0.5 and 0.75.
    unit = 1e-8 * 256 * 0.5 * 0.75 / 49 * np.log2(np.e) * 4096
    got = stored["mask_mantissa"] * 2.0 ** -stored["mask_shift"].astype(float)
    np.testing.assert_allclose(got, unit, rtol=2.0**-14)
    knobs["threshold"] = from_setting((0.0,), (1, 2, 1), {})
    assert not codes(knobs, tensors)["threshold"].any()


@pytest.mark.parametrize("variant", ["patches", "decoder"])
def test_counts_are_those_of_a_plain_loop(variant: str) -> None:
    model = model_of(variant, "sanger")
    deployment, output = run_hard(model, policy_of(model, "sanger", seed=5), "sanger")
    shape, workload = deployment.structure, output.workload
    valid, pairs = existing(model)
    keep = (output.trace["keep"] & pairs[None, None, :, None])[:, 0]
    for layer, example, head in np.ndindex(shape.num_layers, len(valid), shape.num_heads):
        place, kept = (example, layer, head), keep[layer, example, head]
        there = int(pairs[example].sum())
        expected = {
            "filter0.mac": there * shape.head_dim,
            "filter0.exp": there,
            "threshold.compare": there,
            "qk.mac": kept.sum() * shape.head_dim,
            "softmax.exp": kept.sum(),
            "softmax.reciprocal": int(valid[example].sum()),
            "pv.mac": kept.sum() * shape.head_dim,
            "output.multiply": int(valid[example].sum()) * shape.head_dim,
        }
        assert workload.operations.keys() == expected.keys()
        for key, count in expected.items():
            assert workload.operations[key].count[place] == count, key
        segments = workload.rows["packed"].segments[place]
        rows = kept[valid[example]].sum(axis=-1)
        assert segments[0] == kept.sum() and segments[2] == np.ceil(rows / 4).sum()
        assert workload.streams["key0"].vectors[place][-1] == valid[example].sum()
        assert workload.streams["key_rest"].vectors[place][-1] == kept.any(axis=0).sum()
    np.testing.assert_array_equal(workload.streams["key_rest"].bits, 12.0)
    np.testing.assert_array_equal(workload.streams["key0"].bits, 4.0)


# The machine


def test_published_point_has_the_published_area_and_power() -> None:
    shape = ModelShape(num_layers=1, num_tokens=512, num_heads=1, head_dim=64, width=64, hidden=64)
    price = fast_cost(
        closed_form_workload(SPEC, shape, published_setting(SPEC)), accelerator_from_spec(SPEC)
    )
    point = SPEC.operating_point
    assert point.core_power is not None
    assert float(price.area_mm2("attention")) == pytest.approx(point.area.value, rel=0.001)
    energy = {name: float(value[0]) for name, value in price.energy_by_unit("attention").items()}
    core = sum(value for name, value in energy.items() if name != "dram")
    nanoseconds = float(price.latency_cycles("attention")[0]) / 0.5
    assert core / nanoseconds == pytest.approx(point.core_power.base * 1e3, rel=0.005)
    # 8 pieces of 64 keys a row: 8 steps of the mask, and one segment of 16 kept keys each for scores and values.
    busy = {name: float(cycles[0, 0]) / 512 for name, cycles in price.unit_busy_cycles.items()}
    assert busy["mask_array"] == 8.0 and busy["pe_array"] == 16.0
