"""The tile-by-tile simulator of SOFA and LAPA: hand-worked tiles, and agreement with the differentiable cost."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import mask_workloads as masks
import numpy as np
import pytest
import tiny_model
from scipy.stats import kendalltau

from codesign.errors import PresetError, UnknownNameError
from codesign.hw.accelerator import Accelerator, accelerator_from_spec
from codesign.hw.frame import common_frame
from codesign.hw.resizing import spec_with_sizes
from codesign.hw.simulator import GemmShape, Simulation, simulate
from codesign.hw.spec import AcceleratorSpec, load_preset
from codesign.hw.surrogate import Cost, cost
from codesign.workload import Trace

BOTH = pytest.mark.parametrize("name", ["sofa", "lapa"])
SCOPES = ("attention", "end_to_end")
METRICS = ("latency_cycles", "energy_pj")
TILE = 32
"""Keys of a tile in these tests: several for 64 tokens."""


@pytest.fixture(autouse=True)
def in_double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def with_tile(spec: AcceleratorSpec, keys: float) -> AcceleratorSpec:
    assert spec.pipeline.rows_at_once is not None
    tile = spec.pipeline.rows_at_once.model_copy(update={"value": keys})
    return spec.model_copy(
        update={"pipeline": spec.pipeline.model_copy(update={"rows_at_once": tile})}
    )


@functools.partial(jax.jit, compiler_options=tiny_model.FAST_COMPILE)
def priced(
    keep: jax.Array, exists: jax.Array, valid: jax.Array, bits: Any, machine: Accelerator
) -> tuple[Cost, dict[str, jax.Array]]:
    workload = masks.workload_from_masks(keep, exists, valid, bits)
    counts = {key: value.count.sum(axis=2) for key, value in workload.operations.items()}
    return cost(workload, machine), counts


def both(
    trace: Trace, spec: AcceleratorSpec, *, is_causal: bool = False
) -> tuple[Simulation, Cost, dict[str, np.ndarray]]:
    simulation = simulate(trace, spec, masks.gemm_shapes(), is_causal=is_causal)
    exists = masks.existing_pairs(trace.valid, is_causal)
    machine = accelerator_from_spec(spec)
    price, counts = priced(masks.masks_of(trace), exists, trace.valid, trace.bits, machine)
    return simulation, price, {key: np.asarray(value) for key, value in counts.items()}


def padded(tokens: int) -> np.ndarray:
    """Two examples, the second a fifth shorter."""
    return np.arange(tokens) < np.array([tokens, tokens - tokens // 5])[:, None]


def test_hand_worked_tiles_of_sofa() -> None:
    """Two heads, four tokens of four elements, two-row blocks, one tile, no rest of any division."""
    spec = hand_machine("sofa", lanes=2, tile=4)
    pairs = np.zeros((1, 1, 2, 2, 4, 4), bool)
    # Head 0: its first block wants keys 0 and 1, its second 1 and 2. Head 1: both want 2 and 3.
    pairs[0, 0, 0, :, :2, [0, 1]] = pairs[0, 0, 0, :, 2:, 1:3] = pairs[0, 0, 1, :, :, 2:] = True
    bits = masks.make_bits(None, 1, "sofa") | {"tile_bits": np.array([2])}
    trace = hand_trace(pairs, bits)
    shapes = {"qkv": GemmShape(inner=4, outer=12)}
    whole = simulate(trace, spec, shapes)
    assert whole.operations["predict.shift_add"].item() == 2 * 4 * 4 * 2
    assert whole.operations["filter0.shift_add"].item() == 2 * 16 * 2
    # One segment of four keys: ceil(4 / 12) ceil(2 / 4) cycles for each of 2 x 4 rows.
    assert whole.operations["select.compare"].item() == 8
    # Heads make 3 and 2 keys and as many values, of 4 x 2 products each.
    assert whole.operations["generate.mac"].item() == 2 * (3 + 2) * 4 * 2
    assert whole.operations["qk.mac"].item() == 2 * 4 * 2 * 2
    # A head predicts two blocks of tokens in 8 / 2 cycles each for its first block of rows; a block of rows scores 2 x 4
    # pairs of 2 elements on 2 x 2 in 4: dlzs 12, 4 | 12, 4. Sorting takes 1. A key takes 16 products on 4: 8, 4 | 8, 0.
    # Attention: 4 pairs of 2 elements on 2 lanes, twice: 8.
    busy = {name: cycles.item() for name, cycles in whole.busy_cycles.items() if name != "dram"}
    assert busy == {"dlzs": 32, "sads": 4, "su_fa": 32}
    assert whole.own_busy_cycles["kv_generation"].item() == 20
    # dlzs 0-12, 12-16, 16-28, 28-32; sads 12-13, 16-17, 28-29, 32-33; su_fa 13-21, 21-29, 29-37, 37-45.
    assert whole.attention_cycles.item() == pytest.approx(45, abs=1e-3)
    # kv_generation 13-21, 21-25, 29-37, 37-37; su_fa 21-29, 29-37, 37-45, 45-53.
    assert whole.own_cycles.item() == pytest.approx(53 - 45, abs=1e-3)


def test_hand_worked_transfers() -> None:
    """As above, without keys to make, at one byte per cycle."""
    spec = hand_machine("sofa", lanes=2, tile=4, bytes_per_cycle=1.0)
    pairs = np.zeros((1, 1, 2, 2, 4, 4), bool)
    pairs[..., :2] = True
    bits = masks.make_bits(None, 1, "sofa") | {"tile_bits": np.array([2])}
    found = simulate(hand_trace(pairs, bits), spec, {"qkv": GemmShape(inner=4, outer=12)})
    moved = {name: value.item() for name, value in found.stream_bytes.items()}
    # 4 tokens of 4 bytes; codes of 4 bits of 4 x 2 weights for 2 heads and 2 blocks; 2 x 4 queries of 2 x 2 bytes.
    assert [moved[name] for name in ("tokens", "weight_codes", "query")] == [16, 16, 32]
    # Tokens 0 and 1 again; weights of keys and values; outputs of 8 bits.
    assert [moved[name] for name in ("generate_tokens", "generate_weights")] == [8, 64]
    assert moved["output"] == 16
    # Blocks wait for 16 + 8 + 8, then 8, then (an output of 4 before it) 8 + 8, then (another) 8 bytes: 32, 40, 60, 72.
    # dlzs 32-44, 44-48, 60-72, 72-76; sads one each; su_fa 45-53, 53-61, 73-81, 81-89; the last output 4.
    assert found.attention_cycles.item() == pytest.approx(93)
    apart = hand_machine("sofa", lanes=2, tile=4, bytes_per_cycle=1.0, memory_overlaps=False)
    found = simulate(hand_trace(pairs, bits), apart, {"qkv": GemmShape(inner=4, outer=12)})
    assert found.attention_cycles.item() == pytest.approx(45 + 80)


def test_hand_worked_tiles_of_lapa() -> None:
    """One head, four tokens in one block, two tiles: a filter needs the whole row, what follows goes by tile."""
    spec = hand_machine("lapa", lanes=4, tile=2)
    pairs = np.ones((1, 1, 1, 3, 4, 4), bool)
    pairs[0, 0, 0, 2] = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]], bool)
    bits = masks.make_bits(None, 1, "lapa") | {"key_bits": np.array([[2, 4, 8]])}
    found = simulate(hand_trace(pairs, bits), spec, {"qkv": GemmShape(inner=4, outer=6)})
    # 8 products of a token on 2 elements, in two slices of the 8-bit token: 8 cycles with the first tile. Three rounds of
    # 4 x 2 pairs of 2 elements on 4 x 2, one slice each: 6 per tile. The filter takes 2 scores in 3 rounds: 6 per tile.
    assert found.busy_cycles["mrsa"].item() == 8 + 6 + 6
    assert found.busy_cycles["ddf"].item() == 12
    # Two products of 4 x 2 with a key on 8: each tile makes one key in 2 cycles; two pairs of 2 elements on 4 lanes: 1 + 1.
    assert found.own_busy_cycles["kv_generation"].item() == 4
    # mrsa 0-14-20, ddf along with it; attention 20-22-24.
    assert found.attention_cycles.item() == pytest.approx(24, abs=1e-3)
    # kv_generation 20-22-24, attention 22-24-26.
    assert found.own_cycles.item() == pytest.approx(2, abs=1e-3)


def frame_of_whole_lanes(spec: AcceleratorSpec) -> AcceleratorSpec:
    """The common frame's prices on the machine's own lanes."""
    frame = common_frame(spec)
    lanes = {f"{unit}.lanes": one.lanes.value for unit, one in spec.units.items()}
    return spec_with_sizes(frame, lanes)


def hand_machine(
    name: str,
    *,
    lanes: float,
    tile: float,
    bytes_per_cycle: float = 1e9,
    memory_overlaps: bool = True,
) -> AcceleratorSpec:
    """Every unit of as many lanes, of two elements or one, busy in every cycle."""
    spec = load_preset(name)
    sizes = {f"{unit}.lanes": lanes for unit in spec.units}
    widths = {unit: 1.0 if unit in ("su_fa", "attention") else 2.0 for unit in spec.units}
    sizes |= {
        f"{unit}.width": widths[unit] for unit, one in spec.units.items() if one.width is not None
    }
    sizes |= {"dram.bytes_per_cycle": bytes_per_cycle, "query_block": 2.0}
    spec = with_tile(spec_with_sizes(spec, sizes), tile)
    whole = {unit: one.model_copy(update={"utilisation": None}) for unit, one in spec.units.items()}
    choice = spec.switches.memory_overlaps.model_copy(update={"value": memory_overlaps})
    switches = spec.switches.model_copy(update={"memory_overlaps": choice})
    return spec.model_copy(update={"units": whole, "switches": switches})


def hand_trace(pairs: np.ndarray, bits: dict[str, np.ndarray]) -> Trace:
    return Trace(
        packed=np.packbits(pairs, axis=-1),
        valid=np.ones((1, pairs.shape[-1]), bool),
        num_keys=pairs.shape[-1],
        head_dim=2,
        bits=bits,
    )


@BOTH
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("frame", [lambda spec: spec, frame_of_whole_lanes], ids=["own", "common"])
def test_counts_bytes_and_energy_equal_the_surrogate(
    name: str, is_causal: bool, frame: Callable[[AcceleratorSpec], AcceleratorSpec]
) -> None:
    """On random widths; one example is padded, and a machine whose lanes leave no rest takes no more steps for it."""
    rng = np.random.default_rng(1)
    trace = masks.random_trace(rng, padded(64), name, layers=2, is_causal=is_causal)
    spec = with_tile(frame(load_preset(name)), TILE)
    simulation, price, counts = both(trace, spec, is_causal=is_causal)
    assert simulation.operations.keys() == counts.keys()
    for key, count in simulation.operations.items():
        np.testing.assert_array_equal(count, counts[key], err_msg=key)
    for own, theirs in (
        (simulation.unit_energy_pj, price.unit_energy_pj),
        (simulation.own_energy_pj, price.block_own.energy_pj),
    ):
        assert own.keys() == theirs.keys()
        for unit, spent in own.items():
            np.testing.assert_allclose(spent, theirs[unit], rtol=1e-9, err_msg=unit)
    for own, theirs in (
        (simulation.busy_cycles, price.unit_busy_cycles),
        (simulation.own_busy_cycles, price.block_own.busy_cycles),
    ):
        np.testing.assert_allclose(own["dram"], theirs["dram"], rtol=1e-9)
        for unit, cycles in own.items():
            # A task takes whole cycles: up to 4 operations of 4 heads and 2 tiles round up.
            np.testing.assert_allclose(cycles, theirs[unit], rtol=0.02, atol=40, err_msg=unit)
            assert np.all(cycles >= np.asarray(theirs[unit]) * (1.0 - 1e-9))
    np.testing.assert_allclose(simulation.host.cycles, price.block_host.cycles, rtol=1e-9)
    np.testing.assert_allclose(simulation.host.end_cycles, price.end_host.cycles, rtol=1e-9)
    stands = price.standing_pj_per_cycle
    assert simulation.standing_pj_per_cycle == pytest.approx(0.0 if stands is None else stands)
    for scope in SCOPES:
        # What stands is drawn over the latency; the rest is equal.
        standing = simulation.standing_pj_per_cycle * (
            simulation.latency_cycles(scope) - np.asarray(price.latency_cycles(scope))
        )
        np.testing.assert_allclose(
            simulation.energy_pj(scope) - standing, price.energy_pj(scope), rtol=1e-9
        )


@BOTH
@pytest.mark.parametrize("is_causal", [False, True])
def test_dense_attention_makes_every_key(name: str, is_causal: bool) -> None:
    valid = padded(64)
    exists = masks.existing_pairs(valid, is_causal)
    bits = masks.make_bits(None, 1, "dense")
    pairs = np.broadcast_to(exists[None, :, :, None], (1, 2, 4, 1, 64, 64))
    spec = with_tile(load_preset(name), TILE)
    simulation, price, counts = both(
        masks.make_trace(pairs, valid, bits), spec, is_causal=is_causal
    )
    assert simulation.operations.keys() == counts.keys()
    assert not any(key.startswith(("predict", "filter")) for key in counts)
    for key, count in simulation.operations.items():
        np.testing.assert_array_equal(count, counts[key], err_msg=key)
    for scope in SCOPES:
        np.testing.assert_allclose(
            simulation.energy_pj(scope), price.energy_pj(scope), rtol=0.01, err_msg=scope
        )
        np.testing.assert_allclose(
            simulation.latency_cycles(scope), price.latency_cycles(scope), rtol=0.05, err_msg=scope
        )


@BOTH
def test_padding_changes_nothing(name: str) -> None:
    rng = np.random.default_rng(3)
    alone = masks.random_trace(rng, np.ones((1, 40), bool), name)
    pairs = np.zeros((*alone.packed.shape[:4], 64, 64), bool)
    pairs[..., :40, :40] = masks.masks_of(alone)
    longer = masks.make_trace(pairs, np.arange(64)[None] < 40, alone.bits)
    spec = with_tile(load_preset(name), TILE)
    short, padded_ = (simulate(one, spec, masks.gemm_shapes()) for one in (alone, longer))
    for scope in SCOPES:
        assert padded_.latency_cycles(scope) == short.latency_cycles(scope)
        assert padded_.energy_pj(scope) == pytest.approx(short.energy_pj(scope))


@BOTH
def test_a_slower_unit_or_memory_never_helps(name: str) -> None:
    trace = masks.random_trace(np.random.default_rng(4), padded(64), name)
    spec = with_tile(load_preset(name), TILE)

    def seconds(spec: AcceleratorSpec) -> np.ndarray:
        simulation = simulate(trace, spec, masks.gemm_shapes())
        return simulation.latency_cycles("end_to_end") / spec.clock_hz

    before = seconds(spec)
    for size, value in accelerator_from_spec(spec).sizes.items():
        if not size.startswith(("host", "query_block", "token", "weight", "temporary")):
            smaller = spec_with_sizes(spec, {size: float(value) / 4.0})
            assert np.all(seconds(smaller) >= before), size


def draw_sizes(rng: np.random.Generator, spec: AcceleratorSpec) -> dict[str, float]:
    sizes = {f"{unit}.lanes": float(rng.choice([32, 64, 128])) for unit in spec.units}
    for unit, one in spec.units.items():
        if one.width is not None:
            sizes[f"{unit}.width"] = float(rng.integers(1, int(2 * one.width.value) + 1))
    sizes["query_block"] = float(rng.choice([16, 32, 48, 128]))
    sizes["dram.bytes_per_cycle"] = float(rng.uniform(16.0, 128.0))
    sizes |= {side: float(rng.choice([16, 32, 48])) for side in ("host.rows", "host.cols")}
    return sizes


@pytest.mark.parametrize("name", ["sofa", pytest.param("lapa", marks=pytest.mark.slow)])
def test_agreement_over_random_policies_and_sizes(name: str) -> None:
    """200 points, 8 sizes by 25 policies: 5 % in the mean, and the same order overall and at each size."""
    rng = np.random.default_rng(0)
    base = with_tile(load_preset(name), TILE)
    points = []
    for _ in range(8):
        spec = spec_with_sizes(base, draw_sizes(rng, base))
        at_size = []
        for index in range(25):
            structure = masks.STRUCTURES[index % len(masks.STRUCTURES)]
            trace = masks.random_trace(rng, padded(64), name, structure=structure)
            simulation, price, _ = both(trace, spec)
            at_size.append(
                [
                    (getattr(simulation, metric)(scope), getattr(price, metric)(scope))
                    for scope, metric in itertools.product(SCOPES, METRICS)
                ]
            )
        points.append(at_size)
    # Sizes, figures, and (simulator, cost model) of policies and examples.
    figures = np.moveaxis(np.asarray(points), (2, 3), (1, 2)).reshape(8, 4, 2, -1)
    for index, (scope, metric) in enumerate(itertools.product(SCOPES, METRICS)):
        real, model = figures[:, index, 0], figures[:, index, 1]
        assert np.mean(np.abs(model / real - 1.0)) <= 0.05
        assert kendalltau(real.ravel(), model.ravel()).statistic >= 0.95
        # The host takes the same for every policy: at one size some differ in latency by less than the model's error.
        is_blurred = (scope, metric) == ("end_to_end", "latency_cycles")
        for one, other in zip(real, model, strict=True):
            assert kendalltau(one, other).statistic >= (0.85 if is_blurred else 0.95)


def test_machines_and_models_without_rules_are_refused() -> None:
    spec = load_preset("sofa")
    trace = masks.random_trace(np.random.default_rng(0), padded(8), "sofa")
    with pytest.raises(UnknownNameError, match="lacks `qkv`"):
        simulate(trace, spec, {})
    with pytest.raises(UnknownNameError, match="linear site `qkw`"):
        simulate(trace, spec, {"qkw": GemmShape(inner=2, outer=2)})
    without = spec.pipeline.model_copy(update={"rows_at_once": None})
    with pytest.raises(PresetError, match="needs `pipeline.rows_at_once`"):
        simulate(trace, spec.model_copy(update={"pipeline": without}), masks.gemm_shapes())
    flat = spec.units["sads"].model_copy(update={"rule": "flat"})
    changed = spec.model_copy(update={"units": spec.units | {"sads": flat}})
    with pytest.raises(PresetError, match="units.sads.rule"):
        simulate(trace, changed, masks.gemm_shapes())
    with pytest.raises(UnknownNameError, match="unknown scope"):
        simulate(trace, spec, masks.gemm_shapes()).latency_cycles("host")
