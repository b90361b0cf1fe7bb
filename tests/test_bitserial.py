"""Keys bit by bit: worked examples, bounds, early stops that lose nothing, counts, and the machine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import fast_cost
from tiny_policies import policy_of, run_hard

from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.closed_form import ModelShape, Setting
from codesign.hw.operating_points import closed_form_workload, published_setting
from codesign.hw.spec import load_preset
from codesign.mechanisms.bitserial import (
    CODE_BITS,
    OFF_CODE,
    codes,
    from_setting,
    from_strength,
    hard_planes,
    to_strength,
)
from codesign.references.bitserial import reference_planes, sign_magnitude_steps

SPEC = load_preset("bitserial")
HAND_QUERY = np.asarray([3, -2])
HAND_KEYS = np.asarray([[5, -4], [-3, 6]])


def planes_of_row(
    keys: np.ndarray, distance: int, bits: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sums, keep, bounds = reference_planes(
        HAND_QUERY[None, None, None],
        keys[None, None],
        np.ones((1, 1, 1, len(keys)), bool),
        np.asarray([distance]),
        bits,
    )
    return sums[:, 0, 0, 0], keep[:, 0, 0, 0], bounds[:, :, 0, 0, 0]


def test_planes_of_the_worked_keys() -> None:
    """The specification's two keys of four bits: sums, bounds, and the second dropped after its sign."""
    sums, keep, bounds = planes_of_row(HAND_KEYS, 4)
    assert sums[:, 0].tolist() == [16, 20, 20, 23]
    assert bounds[:, :, 0].T.tolist() == [[2, 37], [14, 29], [18, 23], [23, 23]]
    assert sums[0, 1] == -24 and bounds[:, 0, 1].tolist() == [-38, -3]
    assert keep.tolist() == [[True, False]] * 4
    np.testing.assert_array_equal(planes_of_row(HAND_KEYS, 100)[1], True)
    # Five units further down the first plane's upper bound reaches the threshold.
    assert planes_of_row(HAND_KEYS, 5)[1][0].tolist() == [True, True]


def random_codes(bits: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    most = 2 ** (bits - 1) - 1
    query = rng.integers(-2047, 2048, (2, 3, 5, 8))
    key = rng.integers(-most - 1, most + 1, (2, 3, 11, 8))
    exists = rng.random((2, 1, 5, 11)) < 0.8
    exists[..., 3] = True
    return query, key, exists


@pytest.mark.parametrize("bits", [4, 7, 12])
def test_bounds_hold_and_never_widen_and_the_end_is_a_threshold(bits: int) -> None:
    query, key, exists = random_codes(bits)
    distance = np.asarray([0, 2 ** (bits + 9), 2 ** (bits + 11)])
    sums, keep, bounds = reference_planes(query, key, exists, distance, bits)
    exact = query @ np.swapaxes(key, -1, -2)
    np.testing.assert_array_equal(sums[-1], exact)
    assert np.all(bounds[0] <= exact) and np.all(exact <= bounds[1])
    assert np.all(np.diff(bounds[0], axis=0) >= 0) and np.all(np.diff(bounds[1], axis=0) <= 0)
    top = np.where(exists, exact, -(2**40)).max(axis=-1, keepdims=True)
    near = exists & (exact >= top - distance[None, :, None, None])
    np.testing.assert_array_equal(keep[-1], near)
    assert not np.any(keep[1:] & ~keep[:-1])
    # With t = 0 the maximum survives, and only what equals it.
    assert np.all(keep[-1][:, 0].any(axis=-1))


@pytest.mark.parametrize("bits", [4, 9, 12])
def test_planes_of_the_integer_path_are_the_references(bits: int) -> None:
    query, key, exists = random_codes(bits, seed=1)
    distance = np.asarray([2 ** (bits + 8), 2 ** (bits + 10), OFF_CODE])
    with jax.enable_x64(True):
        found = hard_planes(
            jnp.asarray(query, jnp.int32),
            jnp.asarray(key, jnp.int32),
            jnp.asarray(exists),
            jnp.asarray(distance),
            jnp.asarray(bits),
            jnp.ones((2, 1, 5)),
            tracing=True,
        )
    sums, keep, _ = reference_planes(query, key, exists, distance, bits)
    assert found.keep is not None
    np.testing.assert_array_equal(found.sums, sums[-1])
    np.testing.assert_array_equal(found.keep[:bits], keep)
    np.testing.assert_array_equal(
        found.keep[bits:], np.broadcast_to(keep[-1], found.keep[bits:].shape)
    )
    np.testing.assert_array_equal(
        found.entering[0], np.broadcast_to(exists, keep[0].shape).sum(axis=-1)
    )
    np.testing.assert_array_equal(found.entering[1:bits], keep[: bits - 1].sum(axis=-1))


def test_sign_and_magnitude_of_the_worked_key() -> None:
    """LeOPArd's rule: no component agrees in sign, so nothing can be added, and 0 stops after the first bit."""
    partial, alive, margin = sign_magnitude_steps(HAND_QUERY, HAND_KEYS[1:], 0, 3, 1)
    assert partial[:, 0].tolist() == [-8, -18, -21]
    assert not margin.any() and not alive.any()
    assert sign_magnitude_steps(HAND_QUERY, HAND_KEYS[1:], -21, 3, 1)[1].all()


@pytest.mark.parametrize("step", [1, 2])
def test_sign_and_magnitude_stop_early_and_lose_nothing(step: int) -> None:
    rng = np.random.default_rng(step)
    for _ in range(20):
        query, key = rng.integers(-31, 32, 6), rng.integers(-255, 256, (40, 6))
        exact = key @ query
        for least in (
            *np.quantile(exact, [0.1, 0.5, 0.9]).astype(int),
            exact.max(),
            exact.max() + 1,
        ):
            _, alive, _ = sign_magnitude_steps(query, key, int(least), 8, step)
            np.testing.assert_array_equal(alive[-1], exact >= least)


def test_strengths_settings_and_codes() -> None:
    strength = np.asarray([[[0.1], [0.9]]])
    np.testing.assert_allclose(to_strength(from_strength(strength, {}), {}), strength)
    widths = {"qk_bits": np.asarray([12.0, 14.0]), "plane_bits": np.asarray([12.0, 8.0])}
    tensors = {"logit": np.asarray([1e-5, 1e-5])}
    knobs = widths | {"threshold": from_setting((3.0,), (2, 1, 1), {})}
    # Two bits of the queries and six of the keys are cut from codes of 14 bits.
    assert np.ravel(codes(knobs, tensors)["threshold"]).tolist() == [300000, 1172]
    knobs = widths | {"threshold": from_setting((16.0,), (2, 1, 1), {})}
    assert np.all(codes(knobs, tensors)["threshold"] == OFF_CODE)


def test_more_distance_keeps_more_and_later() -> None:
    query, key, exists = random_codes(12, seed=2)
    before = None
    for distance in (0, 2**18, 2**20, 2**22):
        keep = reference_planes(query, key, exists, np.full(3, distance), 12)[1]
        assert before is None or not np.any(before & ~keep)
        before = keep


@pytest.mark.parametrize(("variant", "planes"), [("patches", 12.0), ("decoder", 7.0)])
def test_counts_are_those_of_a_plain_loop(variant: str, planes: float) -> None:
    model = tiny_model.random_model(variant)
    policy = policy_of(model, "bitserial", seed=5, bits=13.0, plane_bits=planes)
    deployment, output = run_hard(model, policy, "bitserial")
    shape, workload = deployment.structure, output.workload
    valid, pairs = tiny_model.existing(model)
    keep = output.trace["keep"] & pairs[None, None, :, None]
    entering = np.concatenate([np.broadcast_to(pairs[:, None], keep[:, :1].shape), keep], axis=1)
    number = int(planes)
    for layer, example, head in np.ndindex(shape.num_layers, len(valid), shape.num_heads):
        place = (example, layer, head)
        tokens, final = int(valid[example].sum()), keep[layer, -1, example, head]
        for plane in range(CODE_BITS):
            mask = entering[layer, plane, example, head] * (plane < number)
            assert (
                workload.operations[f"filter{plane}.mac"].count[place]
                == mask.sum() * shape.head_dim
            )
            assert workload.operations[f"filter{plane}.compare"].count[place] == mask.sum()
            assert workload.rows[f"filter{plane}"].segments[place][0] == mask.sum()
            assert workload.streams[f"key{plane}"].vectors[place][0] == mask.sum()
            assert workload.streams[f"key{plane}"].vectors[place][-1] == mask.any(axis=0).sum()
        assert workload.operations["threshold.evaluate"].count[place] == tokens * number
        assert workload.operations["softmax.exp"].count[place] == final.sum()
        assert workload.operations["pv.mac"].count[place] == final.sum() * shape.head_dim
        assert workload.streams["value"].vectors[place][-1] == final.any(axis=0).sum()
    assert "qk.mac" not in workload.operations and "key_rest" not in workload.streams
    np.testing.assert_array_equal(workload.operations["filter3.mac"].bits_a, 12.0)
    np.testing.assert_array_equal(workload.operations["filter3.mac"].bits_b, 1.0)


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
    # 124.8 of 32 keys at a time and row, at 83 % of the lanes' time; a fifth of the keys in the values.
    busy = {name: float(cycles[0, 0]) / 1024 for name, cycles in price.unit_busy_cycles.items()}
    assert busy["serial"] == pytest.approx(124.8 / 0.83, rel=1e-4)
    assert busy["pv"] == pytest.approx(204.8, rel=1e-4)


def test_traffic_of_the_worked_shares_is_3_9_of_12_bits() -> None:
    """1 + .6 + .4 + .3 + 8 x .2: the specification's expected planes of a key."""
    shape = ModelShape(num_layers=1, num_tokens=64, num_heads=1, head_dim=64, width=64, hidden=64)
    kept = (0.6, 0.4, 0.3, *(0.2,) * 9)
    workload = closed_form_workload(SPEC, shape, Setting(kept=kept, qk_bits=12.0, v_bits=12.0))
    planes = [workload.operations[f"filter{plane}.mac"].count for plane in range(CODE_BITS)]
    assert float(sum(planes)[0, 0, 0]) == pytest.approx(3.9 * 64 * 64 * 64, rel=1e-6)
