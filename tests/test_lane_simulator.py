"""The simulator of lanes that take tiles (AccelTran): hand-worked cycles, conservation, agreement with the cost."""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
import lane_workloads as lanes
import numpy as np
import pytest
from scipy.stats import kendalltau

from codesign.errors import PresetError, UnknownNameError
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.closed_form import ModelShape
from codesign.hw.frame import common_frame
from codesign.hw.lane_counts import Bytes, Operation, pair_tiles, product_tiles
from codesign.hw.lane_schedule import LaneMachine, Lanes, deal, run_layers
from codesign.hw.simulator import simulate
from codesign.hw.spec import AcceleratorSpec, load_preset

PRESETS = ("acceltran-edge", "acceltran-edge-lp", "acceltran-server")
SCOPES = ("attention", "end_to_end")
METRICS = ("latency_cycles", "energy_pj")
CAUSAL = pytest.mark.parametrize("is_causal", [False, True])
HAND = ModelShape(num_layers=1, num_tokens=32, num_heads=1, head_dim=16, width=16, hidden=16)


@pytest.fixture(autouse=True)
def in_double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def unbounded(spec: AcceleratorSpec) -> AcceleratorSpec:
    """The machine with memories that take no time."""
    memories = {
        name: memory.model_copy(update={"bandwidth": None})
        for name, memory in spec.memories.items()
    }
    return spec.model_copy(update={"memories": memories})


def padded(tokens: int) -> np.ndarray:
    """Two examples, the second a third shorter."""
    return np.arange(tokens) < np.array([tokens, tokens - tokens // 3])[:, None]


def hand_machine() -> AcceleratorSpec:
    """One element of two lanes, a softmax and a norm unit, batches of one, memories that take no time."""
    spec = unbounded(
        lanes.machine(
            processing_elements=1.0,
            lane__lanes=2.0,
            softmax__lanes=1.0,
            norm__lanes=1.0,
            dram__bytes_per_cycle=1e12,
        )[0]
    )
    assert spec.storage is not None
    batch = spec.storage.batch.model_copy(update={"value": 1.0})
    return spec.model_copy(update={"storage": spec.storage.model_copy(update={"batch": batch})})


def test_hand_worked_tiles() -> None:
    tensors = {
        site: np.ones_like(mask)
        for site, mask in lanes.random_tensors(
            np.random.default_rng(0), np.ones((1, 32), bool), HAND
        ).items()
    }
    tensors["query"][..., 16:, :8] = False
    trace = lanes.make_trace(np.ones((1, 32), bool), lanes.make_bits(1), tensors, HAND)
    found = simulate(trace, hand_machine(), lanes.gemm_shapes(HAND))
    # 32 tokens are two row tiles; a tile of 16^3 products takes a lane of 16 multipliers 256 cycles, a tile of 16 x 16
    # elements softmax and norm 32, the non-linearity 16.
    # Norm of two tiles 0-64. Q, K, V two tiles each, on two lanes: 64-320, 320-576, 576-832. Scores 2 x 2 tiles, of
    # the second row half the products: 832-1088 and 1088-1216. Softmax, four tiles: 1216-1344. Attention 2 x 2
    # tiles: 1344-1856. Output 1856-2112, norm 2112-2176, up 2176-2432, non-linearity 2432-2448, down 2448-2704.
    latency = found.attention_cycles + found.own_cycles
    assert latency.item() == pytest.approx(2704, abs=1e-6)
    # Attention alone: scores 0-384, softmax 384-512, attention 512-1024.
    assert found.attention_cycles.item() == pytest.approx(1024, abs=1e-6)
    # Working time of all lanes: 768 of 2 * 2 tiles of scores, 1024 of attention, over two lanes.
    assert found.busy_cycles["lane"].item() == pytest.approx((768 + 1024) / 2)
    # Five linear products of two full tiles each and 6 more of Q, K, V; 32 cycles of the non-linearity.
    assert found.own_busy_cycles["lane"].item() == pytest.approx((6 * 256 + 6 * 256 + 2 * 16) / 2)
    assert (
        found.own_busy_cycles["norm"].item() == 128 and found.busy_cycles["softmax"].item() == 128
    )
    assert found.operations["qk.mac"].item() == found.operations["pv.mac"].item() == 32 * 32 * 16


def test_hand_worked_dealing() -> None:
    """Two lanes, free at 5 and 0; tiles of 4, 6 and 2 that may start at 1."""
    free = np.array([5.0, 0.0])
    # In pairs: 4 on the second lane 1-5, 6 on the first 5-11; then 2 on the second 5-7.
    begin, end = deal(free, np.full(3, 1.0), np.array([4.0, 6.0, 2.0]), 1.0)
    assert (begin, end) == (1.0, 11.0) and free.tolist() == [11.0, 7.0]


def test_hand_worked_loads_and_spills() -> None:
    """Two tiles of 10 cycles, weights of 100 bytes at 10 a cycle; results of 30 bytes in 40, at 30 a cycle."""
    plain = LaneMachine(
        units={"lane": Lanes(number=1, per_lane=1.0)},
        unit_of={"linear.mac": "lane"},
        dram_rate=10.0,
        weight_rate=np.inf,
        activation_rate=30.0,
        mask_rate=np.inf,
        activation_bytes=40.0,
        weight_bytes=250.0,
        batch=1,
        overlaps=True,
    )
    ten = np.array([10.0])
    operations = [
        Operation(
            name=str(place),
            key="linear.mac",
            effectual=ten,
            started=ten,
            bits=(8, 8),
            needs=(place - 1,) if place else (),
            loads=Bytes(data=100.0),
            writes=Bytes(data=30.0),
        )
        for place in range(2)
    ]

    def end(**changes: object) -> tuple[float, float]:
        (run,) = run_layers([operations], dataclasses.replace(plain, **changes))  # type: ignore[arg-type]
        return run.end, run.spilled

    # Weights 0-10 and 10-20; the first runs 10-20, the second 20-30, and 20 of its 30 bytes go out and back, 20-24.
    assert end() == (30.0, 40.0)
    assert end(activation_bytes=60.0) == (30.0, 0.0)
    # No room for both weights: the second's come when the first is done, 20-30.
    assert end(weight_bytes=150.0) == (40.0, 40.0)
    # Slow main memory: 0-100, 100-200; bytes of the second 200-240.
    assert end(dram_rate=1.0) == (240.0, 40.0)
    # Nothing overlaps: 20 cycles of lanes, 240 bytes.
    assert end(overlaps=False) == (20.0 + 24.0, 40.0)
    # A unit that starts half a product a cycle: 20 for each, in turn.
    slow = {"lane": Lanes(number=1, per_lane=1.0, started_per_cycle=0.5)}
    assert end(units=slow) == (50.0, 40.0)
    # Of the first 20 bytes go and come 10-14, before the second's weights, 14-24; of the second all, 24-30, before the
    # third's, 30-40; of the third all 30 while it runs.
    operations.append(dataclasses.replace(operations[1], name="2", needs=(1,)))
    assert end(activation_bytes=10.0, weight_bytes=350.0) == (50.0, 160.0)


def test_tiles_are_those_of_a_loop_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.uniform(size=(37, 20)) < 0.4, rng.uniform(size=(20, 33)) < 0.6
    exists = np.tril(np.ones((37, 37), bool))
    found = product_tiles(one, other, 16)
    assert len(found) == 3 * 3 * 2
    expected = [
        (one[i : i + 16, k : k + 16].astype(int) @ other[k : k + 16, j : j + 16]).sum()
        for i, j, k in itertools.product((0, 16, 32), (0, 16, 32), (0, 16))
    ]
    assert found.tolist() == expected
    paired = pair_tiles(one, one, exists, 16)
    products = (one[:, None, :] & one[None, :, :]) & exists[..., None]
    expected = [
        products[i : i + 16, j : j + 16, k : k + 16].sum()
        for i, j, k in itertools.product((0, 16, 32), (0, 16, 32), (0, 16))
    ]
    assert paired.tolist() == expected


@pytest.mark.parametrize(
    ("preset", "is_causal", "is_common"),
    [
        ("acceltran-edge", False, False),
        ("acceltran-edge-lp", True, False),
        ("acceltran-server", False, True),
    ],
)
def test_counts_bytes_and_energy_equal_the_surrogate(
    preset: str, is_causal: bool, is_common: bool
) -> None:
    rng = np.random.default_rng(1)
    valid = padded(48)
    trace = lanes.make_trace(
        valid, lanes.make_bits(2, rng), lanes.random_tensors(rng, valid), is_causal=is_causal
    )
    spec, accelerator = lanes.machine(preset, activation__bytes=1e4)
    if is_common:
        spec = common_frame(spec)
        accelerator = accelerator_from_spec(spec)
    found = simulate(trace, spec, lanes.gemm_shapes(), is_causal=is_causal)
    price, counts = lanes.priced(trace, accelerator, is_causal=is_causal)
    assert found.operations.keys() == counts.keys()
    for key, count in found.operations.items():
        np.testing.assert_array_equal(count, counts[key], err_msg=key)
    for own, theirs in (
        (found.unit_energy_pj, price.unit_energy_pj),
        (found.own_energy_pj, price.block_own.energy_pj),
        (found.own_end_energy_pj, price.end_own.energy_pj),
    ):
        assert own.keys() == theirs.keys()
        for unit, spent in own.items():
            # Causal: pairs of a tile are taken to have their zeros as evenly as the tile. Elements draw power while
            # lanes work, a last cycle that is not full of products included.
            close = {"lane": 0.03 if is_causal else 1e-9, "processing_elements": 0.1}.get(
                unit, 1e-9
            )
            np.testing.assert_allclose(spent, theirs[unit], rtol=close, atol=1e-6, err_msg=unit)
    for own, theirs in (
        (found.busy_cycles, price.unit_busy_cycles),
        (found.own_busy_cycles, price.block_own.busy_cycles),
    ):
        for unit in ("dram", "activation", "mask"):
            np.testing.assert_allclose(own[unit], theirs[unit], rtol=1e-9, err_msg=unit)
    assert float(found.busy_cycles["dram"].max()) > 0.0  # Some of it does not fit.


@pytest.mark.parametrize("preset", PRESETS)
def test_no_unit_works_longer_than_the_whole_takes(preset: str) -> None:
    rng = np.random.default_rng(2)
    valid = padded(48)
    for _ in range(5):
        trace = lanes.make_trace(valid, lanes.make_bits(2, rng), lanes.random_tensors(rng, valid))
        sizes = {
            "processing_elements": float(rng.integers(1, 20)),
            "activation__bytes": float(rng.uniform(1e4, 1e5)),
            "dram__bytes_per_cycle": float(rng.uniform(1.0, 100.0)),
        }
        found = simulate(trace, lanes.machine(preset, **sizes)[0], lanes.gemm_shapes())
        for unit, cycles in found.busy_cycles.items():
            assert np.all(cycles <= found.attention_cycles * (1 + 1e-9)), unit
        total = found.latency_cycles("end_to_end")
        for unit, cycles in found.own_busy_cycles.items():
            both = cycles + found.busy_cycles.get(unit, 0.0)
            assert np.all(both.sum(axis=1) <= total * (1 + 1e-9)), unit


@pytest.mark.parametrize("preset", PRESETS[:2])
def test_where_nothing_is_uneven_the_surrogate_gives_the_same_cycles(preset: str) -> None:
    """Dense tiles of 16 x 16 x 16, on one lane of one element and on so many that each has one tile."""
    valid = np.ones((1, 48), bool)
    trace = lanes.make_trace(valid, lanes.make_bits(2))
    for count, own in ((1.0, 1.0), (64.0, 16.0)):
        spec, accelerator = lanes.machine(preset, processing_elements=count, lane__lanes=own)
        found = simulate(trace, spec, lanes.gemm_shapes())
        price, _ = lanes.priced(trace, accelerator)
        for scope, metric in itertools.product(SCOPES, METRICS):
            one, other = (float(getattr(part, metric)(scope)[0]) for part in (found, price))
            # A single lane of the low-power machine waits for the issue of its next tile as well.
            close = 0.005 if (preset, count) == ("acceltran-edge-lp", 1.0) else 1e-9
            assert one == pytest.approx(other, rel=close), (count, scope, metric)


def test_what_does_not_fit_takes_main_memory_in_turn() -> None:
    """Heads that run side by side, in a memory too small for any: what all of them write goes out and back, one by one."""
    trace = lanes.make_trace(np.ones((1, 48), bool), lanes.make_bits(2))
    sizes = {"processing_elements": 64.0, "dram__bytes_per_cycle": 1.0}
    fits, spills = (
        lanes.machine("acceltran-edge", activation__bytes=size, **sizes) for size in (1e6, 256.0)
    )
    (fast, _), (slow, _) = (
        (simulate(trace, spec, lanes.gemm_shapes()), machine) for spec, machine in (fits, spills)
    )
    found, _ = lanes.priced(trace, spills[1])
    for scope in SCOPES:
        wanted = slow.latency_cycles(scope)
        assert np.all(wanted > 1.5 * fast.latency_cycles(scope))
        np.testing.assert_allclose(found.latency_cycles(scope), wanted, rtol=0.05, err_msg=scope)


@CAUSAL
def test_padding_changes_nothing(is_causal: bool) -> None:
    rng = np.random.default_rng(3)
    bits = lanes.make_bits(2, rng)
    short = lanes.random_tensors(rng, np.ones((1, 40), bool))
    longer = {}
    for site, mask in short.items():
        sizes = [(0, 0)] * mask.ndim
        if not site.endswith(".weight"):
            sizes[-2] = (0, 24)
        if site in lanes.PAIRS:
            sizes[-1] = (0, 24)
        longer[site] = np.pad(mask, sizes, constant_values=True)
    one, other = (
        simulate(
            lanes.make_trace(valid, bits, tensors, is_causal=is_causal),
            load_preset("acceltran-edge"),
            lanes.gemm_shapes(),
            is_causal=is_causal,
        )
        for valid, tensors in (
            (np.ones((1, 40), bool), short),
            (np.arange(64)[None] < 40, longer),
        )
    )
    for scope, metric in itertools.product(SCOPES, METRICS):
        assert getattr(one, metric)(scope) == pytest.approx(getattr(other, metric)(scope))


@pytest.mark.parametrize(
    "size",
    [
        "processing_elements",
        "lane__lanes",
        "softmax__lanes",
        "dram__bytes_per_cycle",
        "activation__bytes",
    ],
)
def test_a_machine_four_times_as_large_is_never_slower(size: str) -> None:
    rng = np.random.default_rng(4)
    valid = padded(48)
    own = load_preset("acceltran-edge")
    start = {
        "processing_elements": 4.0,
        "lane__lanes": own.units["lane"].lanes.value / 8,
        "softmax__lanes": 1.0,
        # Where main memory is what binds, more lanes change nothing.
        "dram__bytes_per_cycle": 2.0
        if size in ("dram__bytes_per_cycle", "activation__bytes")
        else 1e3,
        "activation__bytes": 5e3,
    }
    for _ in range(3):
        trace = lanes.make_trace(valid, lanes.make_bits(2, rng), lanes.random_tensors(rng, valid))
        latency = [
            simulate(
                trace,
                lanes.machine(**(start | {size: start[size] * factor}))[0],
                lanes.gemm_shapes(),
            ).latency_cycles("end_to_end")
            for factor in (1.0, 4.0, 16.0)
        ]
        assert np.all(np.diff(latency, axis=0) <= 1e-9)
        assert np.all(latency[-1] < latency[0])


def test_agreement_over_random_policies_and_sizes() -> None:
    """200 points, 8 sizes by 25 policies: 5 % in the mean, and the same order overall and at each size."""
    rng = np.random.default_rng(0)
    points = []
    valid = padded(48)
    for _ in range(8):
        factors = {name: float(2.0 ** rng.uniform(-2, 1)) for name in "abcd"}
        spec, accelerator = lanes.machine(
            processing_elements=max(1.0, round(16 * factors["a"])),
            lane__lanes=max(1.0, round(16 * factors["b"])),
            dram__bytes_per_cycle=36.0 * factors["c"],
            activation__bytes=2e5 * factors["d"],
        )
        at_size = []
        for _ in range(25):
            trace = lanes.make_trace(
                valid, lanes.make_bits(2, rng), lanes.random_tensors(rng, valid)
            )
            found = simulate(trace, spec, lanes.gemm_shapes())
            price, _ = lanes.priced(trace, accelerator)
            at_size.append(
                [
                    (np.mean(getattr(found, one)(scope)), np.mean(getattr(price, one)(scope)))
                    for scope, one in itertools.product(SCOPES, METRICS)
                ]
            )
        points.append(at_size)
    figures = np.moveaxis(
        np.asarray(points), (2, 3), (0, 1)
    )  # Figures, simulator and model, sizes.
    for (real, model), name in zip(figures, itertools.product(SCOPES, METRICS), strict=True):
        assert np.mean(np.abs(model / real - 1.0)) <= 0.05, name
        assert kendalltau(real.ravel(), model.ravel()).statistic >= 0.95, name
        for one, other in zip(real, model, strict=True):
            assert kendalltau(one, other).statistic >= 0.9, name


def test_machines_and_models_without_rules_are_refused() -> None:
    spec = load_preset("acceltran-edge")
    trace = lanes.make_trace(np.ones((1, 16), bool), lanes.make_bits(2))
    with pytest.raises(UnknownNameError, match="lacks `qkv`"):
        simulate(trace, spec, {})
    elements = spec.processing_elements
    assert elements is not None
    without = elements.model_copy(update={"tile": None})
    with pytest.raises(PresetError, match="needs `processing_elements.tile`"):
        simulate(trace, spec.model_copy(update={"processing_elements": without}), {})
    rows = spec.units["softmax"].model_copy(update={"rule": "rows"})
    changed = spec.model_copy(update={"units": spec.units | {"softmax": rows}})
    with pytest.raises(PresetError, match="units.softmax.rule"):
        simulate(trace, changed, lanes.gemm_shapes())
