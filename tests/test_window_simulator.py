"""The window-by-window simulator of ESACT: hand-worked windows, and agreement with the differentiable cost."""

import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import mask_workloads as masks
import numpy as np
import pytest
import window_workloads as windows
from scipy.stats import kendalltau

from codesign.errors import PresetError, UnknownNameError
from codesign.hw.frame import common_frame
from codesign.hw.resizing import spec_with_sizes
from codesign.hw.simulator import GemmShape, simulate
from codesign.hw.spec import AcceleratorSpec, load_preset
from codesign.hw.window_schedule import GroupWork, run_groups
from codesign.hw.windows import _passage
from codesign.workload import Trace

SCOPES = ("attention", "end_to_end")
METRICS = ("latency_cycles", "energy_pj")
CAUSAL = pytest.mark.parametrize("is_causal", [False, True])
DENSE = pytest.mark.parametrize("is_dense", [False, True])


@pytest.fixture(autouse=True)
def in_double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def machine(shares_heads: bool = True, groups: float = 16.0, **sizes: float) -> AcceleratorSpec:
    """The preset with other sizes, `unit_lanes` for `unit.lanes`."""
    spec = load_preset("esact")
    unit = spec.units["execution"]
    assert unit.shares_heads is not None and unit.groups is not None
    changes = {
        "shares_heads": unit.shares_heads.model_copy(update={"value": shares_heads}),
        "groups": unit.groups.model_copy(update={"value": groups}),
    }
    spec = spec.model_copy(
        update={"units": spec.units | {"execution": unit.model_copy(update=changes)}}
    )
    return spec_with_sizes(spec, {name.replace("__", "."): one for name, one in sizes.items()})


def padded(tokens: int) -> np.ndarray:
    """Two examples, the second a fifth shorter."""
    return np.arange(tokens) < np.array([tokens, tokens - tokens // 5])[:, None]


def hand_trace() -> Trace:
    """One head of two elements, two windows of 8 rows; rows keep keys 0 and 1, then keys 1 and 2; odd rows copy."""
    keep = np.zeros((1, 1, 1, 1, 16, 16), bool)
    keep[..., :8, :2] = keep[..., 8:, 1:3] = True
    rows = np.arange(16)
    bits = masks.make_bits(None, 1, "esact")
    bits |= {name: np.array([8]) for name in ("qk_bits", "v_bits")}
    return Trace(
        packed=np.packbits(keep, axis=-1),
        valid=np.ones((1, 16), bool),
        num_keys=16,
        head_dim=2,
        bits=bits,
        source=(rows // 2 * 2)[None, None, None],
        ffn_source=rows[None, None],
        compares=np.array([[True]]),
    )


def test_hand_worked_windows() -> None:
    spec = machine(
        groups=1.0,
        prediction__lanes=4.0,
        top_k__lanes=16.0,
        similarity__lanes=16.0,
        execution__lanes=4.0,
        softmax__lanes=8.0,
        port__lanes=16.0,
        dram__bytes_per_cycle=1e9,
    )
    shapes = {
        "qkv": GemmShape(inner=4, outer=6),
        "out": GemmShape(inner=2, outer=4),
        "up": GemmShape(inner=4, outer=8),
        "down": GemmShape(inner=8, outer=4),
    }
    found = simulate(hand_trace(), spec, shapes)
    counted = {key: value.item() for key, value in found.operations.items()}
    assert counted["predict.shift_add"] == 2 * 16 * 4 * 2
    assert counted["filter0.shift_add"] == 16 * 16 * 2
    # Rows 1 to 7 of a window meet 1, 1, 2, 2, 3, 3, 4 critical ones, each 2 + 2 entries.
    assert counted["similarity.add"] == 2 * 16 * 4
    # Keys 0, 1 and 2, of which the second window makes the last; each window reads two; 8 rows of 2 pairs.
    assert counted["generate.mac"] == 2 * 3 * 4 * 2
    assert counted["generate.bytes"] == 3 * 4 and counted["fetch.bytes"] == 4 * 4
    assert counted["qk.mac"] == counted["pv.mac"] == 8 * 2 * 2
    assert counted["copy.bytes"] == 8 * 2 and counted["ffn.bytes"] == 0
    # Prediction on 4 lanes: keys of all tokens 2 x 64 / 4 = 32; a window's queries 64 / 4 = 16 and scores 256 / 4 = 64: it
    # ends at 112 and 192. Top-k 128 / 16 = 8 and similarity 64 / 16 = 4 follow it on the window.
    assert found.busy_cycles["prediction"].item() == 32 + 2 * (16 + 64)
    # Attention 2 x 4 x 2 x 2 / 4 = 8 cycles; softmax 8 / 8 = 1; the port 8 / 16 + 8 / 16, a cycle each.
    assert found.busy_cycles["execution"].item() == 16
    # From 192 the second window's attention.
    assert found.attention_cycles.item() == pytest.approx(200, abs=1e-3)
    # Keys and values 2 x 2 x 8 / 4 = 8 cycles, then 1 x 2 x 8 / 4 = 4; queries of 4 rows 32 / 4 = 8; the output projection
    # 8 x 8 / 4 = 16, feed-forward 2 x 8 x 32 / 4 = 128. Window 0: 112 + 8 + 8 + 8 = 136, and until 280. Window 1 waits for
    # it, from 192: 280 + 4 + 8 + 8 = 300, and 144 more.
    assert found.attention_cycles.item() + found.own_cycles.item() == pytest.approx(444, abs=1e-3)


@pytest.mark.parametrize(("shares", "expected"), [(True, [18.0, 22.0]), (False, [17.0, 25.0])])
def test_hand_worked_groups(shares: bool, expected: list[float]) -> None:
    """Three heads on two groups, two windows at 0: heads of 2 + 4, 2 + 4 and 3 + 4 cycles, then 4 and 4 and 0."""
    work = GroupWork(
        make=np.array([[2.0, 0.0], [2.0, 0.0], [3.0, 0.0]]),
        query=np.zeros((3, 2)),
        attend=np.array([[4.0, 4.0], [4.0, 4.0], [4.0, 0.0]]),
        linear=np.array([4.0, 4.0]),
        beside=[np.array([1.0, 1.0])],
        groups=2,
        shares_heads=shares,
    )
    # Shared: group 0 0-6 head 0, 6-13 head 2; group 1 0-6 head 1, 6-10 and 10-14 heads 0 and 1 of window 1. The first
    # window's linear work 13-17 and 14-18, the other's 17-21 (head 2 has none) and 18-22.
    # Own: group 0 0-6 and 6-13 heads 0 and 2, 13-17 linear, 17-21 head 0, 21-25 linear; group 1 head 1, and ends before.
    assert run_groups(work, np.zeros(2)).done.tolist() == expected


@CAUSAL
@DENSE
@pytest.mark.parametrize("frame", [lambda spec: spec, common_frame], ids=["own", "common"])
def test_counts_bytes_and_energy_equal_the_surrogate(
    is_causal: bool, is_dense: bool, frame: Callable[[AcceleratorSpec], AcceleratorSpec]
) -> None:
    rng = np.random.default_rng(1)
    trace = windows.random_trace(rng, padded(64), layers=2, is_causal=is_causal, is_dense=is_dense)
    spec = frame(load_preset("esact"))
    simulation = simulate(trace, spec, windows.gemm_shapes(), is_causal=is_causal)
    price, counts = windows.priced(trace, spec, is_causal=is_causal)
    assert simulation.operations.keys() == counts.keys()
    for key, count in simulation.operations.items():
        np.testing.assert_array_equal(count, counts[key], err_msg=key)
    for own, theirs in (
        (simulation.unit_energy_pj, price.unit_energy_pj),
        (simulation.own_energy_pj, price.block_own.energy_pj),
        (simulation.own_end_energy_pj, price.end_own.energy_pj),
    ):
        assert own.keys() == theirs.keys()
        for unit, spent in own.items():
            np.testing.assert_allclose(spent, theirs[unit], rtol=1e-9, err_msg=unit)
    for own, theirs in (
        (simulation.busy_cycles, price.unit_busy_cycles),
        (simulation.own_busy_cycles, price.block_own.busy_cycles),
    ):
        np.testing.assert_allclose(own["dram"], theirs["dram"], rtol=1e-9)
    # A product takes whole cycles.
    np.testing.assert_allclose(simulation.own_end_cycles, price.end_own.cycles, rtol=0.02, atol=1.0)
    for scope in SCOPES:
        np.testing.assert_allclose(simulation.energy_pj(scope), price.energy_pj(scope), rtol=1e-9)
        np.testing.assert_allclose(
            simulation.latency_cycles(scope), price.latency_cycles(scope), rtol=0.12
        )


@CAUSAL
def test_padding_changes_nothing(is_causal: bool) -> None:
    rng = np.random.default_rng(3)
    alone = windows.random_trace(rng, np.ones((1, 44), bool), is_causal=is_causal)
    pairs = np.zeros((*alone.packed.shape[:4], 64, 64), bool)
    pairs[..., :44, :44] = masks.masks_of(alone)
    longer = masks.make_trace(pairs, np.arange(64)[None] < 44, alone.bits)
    behind = [(0, 0), (0, 0), (0, 0), (0, 20)]
    longer = longer.replace(  # type: ignore[attr-defined]
        source=np.pad(alone.source, behind),
        ffn_source=np.pad(alone.ffn_source, behind[1:]),
        compares=alone.compares,
    )
    short, padded_ = (
        simulate(one, load_preset("esact"), windows.gemm_shapes(), is_causal=is_causal)
        for one in (alone, longer)
    )
    for scope in SCOPES:
        assert padded_.latency_cycles(scope) == short.latency_cycles(scope)
        assert padded_.energy_pj(scope) == pytest.approx(short.energy_pj(scope))


@pytest.mark.parametrize("shares_heads", [True, False])
def test_agreement_over_random_policies_and_sizes(shares_heads: bool) -> None:
    """200 points, 8 sizes by 25 policies: 5 % in the mean, and the same order overall; at each size about the same."""
    rng = np.random.default_rng(0)
    points = []
    for _ in range(8):
        lanes = {
            f"{unit}__lanes": one.lanes.value * float(rng.choice([0.25, 0.5, 1.0, 2.0]))
            for unit, one in load_preset("esact").units.items()
        }
        bandwidth = float(rng.uniform(32.0, 256.0))
        spec = machine(shares_heads, dram__bytes_per_cycle=bandwidth, **lanes)
        at_size = []
        for index in range(25):
            structure = masks.STRUCTURES[index % len(masks.STRUCTURES)]
            trace = windows.random_trace(rng, padded(64), structure=structure)
            simulation = simulate(trace, spec, windows.gemm_shapes())
            price, _ = windows.priced(trace, spec)
            at_size.append(
                [
                    (
                        np.mean(getattr(simulation, metric)(scope)),
                        np.mean(getattr(price, metric)(scope)),
                    )
                    for scope, metric in itertools.product(SCOPES, METRICS)
                ]
            )
        points.append(at_size)
    figures = np.moveaxis(
        np.asarray(points), (2, 3), (1, 2)
    )  # Sizes, figures, simulator and model, policies.
    for index, (_, metric) in enumerate(itertools.product(SCOPES, METRICS)):
        real, model = figures[:, index, 0], figures[:, index, 1]
        assert np.mean(np.abs(model / real - 1.0)) <= 0.05
        assert kendalltau(real.ravel(), model.ravel()).statistic >= 0.93
        for one, other in zip(real, model, strict=True):
            least = 0.95 if metric == "energy_pj" else 0.6
            assert kendalltau(one, other).statistic >= least


def test_machines_and_models_without_rules_are_refused() -> None:
    spec, trace = load_preset("esact"), hand_trace()
    with pytest.raises(UnknownNameError, match="lacks `qkv`"):
        simulate(trace, spec, {})
    without = spec.pipeline.model_copy(update={"rows_at_once": None})
    with pytest.raises(PresetError, match="needs `pipeline.rows_at_once`"):
        simulate(trace, spec.model_copy(update={"pipeline": without}), windows.gemm_shapes())
    blocks = spec.units["top_k"].model_copy(update={"rule": "rows"})
    changed = spec.model_copy(update={"units": spec.units | {"top_k": blocks}})
    with pytest.raises(PresetError, match="units.top_k.rule"):
        simulate(trace, changed, windows.gemm_shapes())


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1] * 8, [1] * 8, 8),  # Side by side all the way.
        ([1] * 8, [0] * 7 + [8], 15),  # All of the second behind seven of the first.
        ([8] + [0] * 7, [1] * 8, 15),  # The second ends its first eighth with the first unit, at 8.
        ([0] * 7 + [8], [8] + [0] * 7, 8),  # What the second works on is there at once.
    ],
)
def test_hand_worked_eighths_of_two_units(
    first: list[int], second: list[int], expected: int
) -> None:
    work = [jnp.asarray(one, float)[None, None] for one in (first, second)]
    assert float(_passage(work)[0, 0]) == expected
