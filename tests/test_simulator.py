"""The row-by-row simulator: hand-worked rows, and agreement with the differentiable cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kendalltau
from tiny_model import fast_cost

from codesign.errors import PresetError, UnknownNameError
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.resizing import spec_with_sizes
from codesign.hw.simulator import GemmShape, Simulation, simulate
from codesign.hw.spec import AcceleratorSpec, load_preset
from codesign.hw.surrogate import Cost, cost
from codesign.workload import (
    Trace,
    Workload,
    fetched_vectors,
    gemm,
    layers_second,
    operation,
    row_statistics,
    stream,
)

SPEC = load_preset("energon")
SITES = {"qkv": (64, 192), "out": (64, 64), "up": (64, 128), "down": (128, 64)}
ENDS = {"embed": (16, 64, None), "head": (64, 10, 1)}
GEMM_SHAPES = {name: GemmShape(inner=k, outer=n) for name, (k, n) in SITES.items()} | {
    name: GemmShape(inner=k, outer=n, rows=rows) for name, (k, n, rows) in ENDS.items()
}


def make_masks(
    rng: np.random.Generator,
    shape: tuple[int, int, int, int],
    valid: np.ndarray,
    first: float,
    last: float,
    agreement: float,
) -> np.ndarray:
    """Nested masks `[L, B, H, 2, T, S]`: rows of uneven length whose queries agree in part.

    The score of a pair mixes a key's popularity, a local band and noise; each row keeps its best
    keys, a fraction that varies from row to row.
    """
    layers, batch, heads, tokens = shape
    popular = rng.normal(size=(layers, batch, heads, 1, tokens))
    noise = rng.normal(size=(layers, batch, heads, tokens, tokens))
    distance = np.abs(np.arange(tokens)[:, None] - np.arange(tokens)) / tokens
    score = agreement * (popular - 2.0 * distance) + (1.0 - agreement) * noise
    exists = valid[:, None, :, None] & valid[:, None, None, :]
    score = np.where(exists, score, -np.inf)
    order = np.argsort(np.argsort(-score, axis=-1), axis=-1)
    spread = np.exp(0.3 * rng.normal(size=(layers, batch, heads, tokens, 1)))
    length = valid.sum(axis=1)[:, None, None, None]
    rounds = [order < np.maximum(np.round(length * kept * spread), 1) for kept in (first, last)]
    return np.stack([rounds[0] & exists, rounds[0] & rounds[1] & exists], axis=3)


def make_trace(masks: np.ndarray, valid: np.ndarray, bits: dict[str, np.ndarray], head_dim: int):
    return Trace(
        packed=np.packbits(masks, axis=-1),
        valid=valid,
        num_keys=masks.shape[-1],
        head_dim=head_dim,
        bits=bits,
        mechanism="energon" if masks.shape[3] > 1 else "dense",
    )


def make_bits(rng: np.random.Generator | None, layers: int) -> dict[str, np.ndarray]:
    """Published widths without a generator, else random legal ones."""
    if rng is None:
        bits = {"query_bits": np.full(layers, 4), "key_bits": np.tile([2, 4], (layers, 1))}
        bits |= {"qk_bits": np.full(layers, 16), "v_bits": np.full(layers, 16)}
    else:
        low = rng.integers(2, 6, layers)
        key_bits = np.stack([low, low + rng.integers(1, 3, layers)], axis=1)
        bits = {"query_bits": rng.integers(2, 9, layers), "key_bits": key_bits}
        bits |= {name: rng.integers(8, 17, layers) for name in ("qk_bits", "v_bits")}
    for name in (*SITES, *ENDS):
        count = layers if name in SITES else 1
        for side in ("weight_bits", "activation_bits"):
            drawn = np.full(count, 8) if rng is None else rng.integers(2, 9, count)
            bits[f"{name}.{side}"] = drawn
    return bits


def workload_from_masks(
    trace: Trace, *, is_dense: bool = False, is_causal: bool = False
) -> Workload:
    """The workload of hard masks, through the statistics that models report."""
    d, bits, valid = trace.head_dim, trace.bits, jnp.asarray(trace.valid, float)
    tokens = jnp.sum(valid, axis=1)
    exists = valid[:, None, :, None] * valid[:, None, None, :]
    if is_causal:
        exists = exists * jnp.tri(valid.shape[1])[None, None]
    ones = jnp.ones_like(valid)[:, None, :] * valid[:, None, :]

    def layer(index: int) -> Workload:
        keep = jnp.asarray(trace.keep(index), float)
        rounds = [] if is_dense else [keep[:, :, r] for r in range(keep.shape[2])]
        first = jnp.broadcast_to(exists, keep[:, :, 0].shape)
        entering = [first, *rounds] if rounds else [keep[:, :, -1]]
        alive = [jnp.sum(mask, axis=(2, 3)) for mask in entering]
        queries = jnp.broadcast_to(tokens[:, None], alive[0].shape)
        b_a, b_v = float(bits["qk_bits"][index]), float(bits["v_bits"][index])
        operations = {
            "qk.mac": operation(alive[-1] * d, b_a, b_a),
            "softmax.exp": operation(alive[-1], b_a, b_a),
            "softmax.reciprocal": operation(queries, b_a, b_a),
            "pv.mac": operation(alive[-1] * d, b_a, b_v),
            "output.multiply": operation(queries * d, b_a, b_v),
        }
        rows = {"attention": row_statistics(jnp.sum(entering[-1], axis=-1), ones, trace.num_keys)}
        resident = {"key": tokens * d * b_a, "value": tokens * d * b_v}
        planes = np.diff(bits["key_bits"][index], prepend=0) if rounds else []
        low = float(np.sum(planes))
        out_bits = jnp.asarray(float(bits["out.activation_bits"][index]))

        def fetch(mask: jax.Array, width: float, name: str):
            vectors = fetched_vectors(mask)
            return stream(vectors, jnp.asarray(width), d, buffer=name, resident_bits=resident[name])

        streams = {
            "query": stream(queries[..., None], jnp.asarray(b_a), d),
            "output": stream(queries[..., None], out_bits, d),
            "key_rest": fetch(entering[-1], b_a - low, "key"),
            "value": fetch(entering[-1], b_v, "value"),
        }
        for r, plane in enumerate(planes):
            widths = float(bits["query_bits"][index]), float(plane)
            operations[f"filter{r}.mac"] = operation(alive[r] * d, *widths)
            operations[f"filter{r}.statistic"] = operation(alive[r], *widths)
            operations[f"filter{r}.compare"] = operation(alive[r], *widths)
            rows[f"filter{r}"] = row_statistics(jnp.sum(entering[r], axis=-1), ones, trace.num_keys)
            streams[f"key{r}"] = fetch(entering[r], float(plane), "key")
        if rounds:
            listed = sum(alive[1:], start=jnp.zeros_like(queries))
            operations["threshold.evaluate"] = operation(queries * len(rounds), 1.0, 1.0)
            entry_bits = np.maximum(np.ceil(np.log2(trace.valid.sum(axis=1))), 1.0)
            operations["index.bits"] = operation(listed * entry_bits[:, None], 1.0, 1.0)
        return Workload(
            operations=operations,
            rows=rows,
            streams=streams,
            block_gemms={
                site: gemm(tokens, k, n, *site_bits(site, index)) for site, (k, n) in SITES.items()
            },
            end_gemms={},
            head_dim=d,
        )

    def site_bits(site: str, index: int):
        return tuple(
            jnp.asarray(float(bits[f"{site}.{side}"][index]))
            for side in ("activation_bits", "weight_bits")
        )

    layers = [layer(index) for index in range(trace.packed.shape[0])]
    workload = layers_second(jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))
    ends = {
        site: gemm(tokens if rows is None else jnp.ones_like(tokens), k, n, *site_bits(site, 0))
        for site, (k, n, rows) in ENDS.items()
    }
    ends = {site: jax.tree.map(lambda leaf: leaf[:, None], end) for site, end in ends.items()}
    return workload.replace(end_gemms=ends)


def both(
    trace: Trace, spec: AcceleratorSpec, *, is_dense: bool = False, is_causal: bool = False
) -> tuple[Simulation, Cost, Workload]:
    workload = workload_from_masks(trace, is_dense=is_dense, is_causal=is_causal)
    return (
        simulate(trace, spec, GEMM_SHAPES, is_causal=is_causal),
        fast_cost(workload, accelerator_from_spec(spec)),
        workload,
    )


def padded(batch: int, tokens: int) -> np.ndarray:
    """Validity of `batch` examples, the later ones shorter."""
    lengths = tokens - np.arange(batch) * (tokens // (2 * batch))
    return np.arange(tokens) < lengths[:, None]


def random_trace(seed: int, tokens: int = 64, head_dim: int = 64) -> Trace:
    rng = np.random.default_rng(seed)
    valid = padded(2, tokens)
    masks = make_masks(rng, (2, 2, 2, tokens), valid, 0.5, 0.22, 0.5)
    return make_trace(masks, valid, make_bits(None, 2), head_dim)


@pytest.mark.smoke
@pytest.mark.parametrize("seed", range(3))
def test_counts_bytes_and_energy_equal_the_surrogate(seed: int):
    trace = random_trace(seed)
    trace = dataclasses.replace(trace, bits=make_bits(np.random.default_rng(seed), 2))
    simulation, surrogate, workload = both(trace, SPEC)
    assert simulation.operations.keys() == workload.operations.keys()
    for key, count in simulation.operations.items():
        np.testing.assert_array_equal(count, np.sum(workload.operations[key].count, axis=2))
    # float32 against float64 from here on.
    np.testing.assert_allclose(
        simulation.busy_cycles["dram"], surrogate.unit_busy_cycles["dram"], rtol=1e-5
    )
    for name, cycles in simulation.busy_cycles.items():
        np.testing.assert_allclose(cycles, surrogate.unit_busy_cycles[name], rtol=1e-5)
    for name, spent in simulation.unit_energy_pj.items():
        np.testing.assert_allclose(spent, surrogate.unit_energy_pj[name], rtol=1e-5)
    np.testing.assert_allclose(simulation.host.cycles, surrogate.block_host.cycles, rtol=1e-5)
    np.testing.assert_allclose(simulation.host.end_cycles, surrogate.end_host.cycles, rtol=1e-5)
    for scope in ("attention", "end_to_end"):
        np.testing.assert_allclose(
            simulation.energy_pj(scope), surrogate.energy_pj(scope), rtol=1e-5
        )


@pytest.mark.parametrize("tokens", [64, 128])
@pytest.mark.parametrize("kept", [(0.3, 0.1), (0.5, 0.22), (0.8, 0.5)])
def test_latency_within_one_percent_at_the_preset(tokens: int, kept: tuple[float, float]):
    rng = np.random.default_rng(tokens)
    valid = padded(2, tokens)
    masks = make_masks(rng, (2, 2, 4, tokens), valid, *kept, 0.5)
    trace = make_trace(masks, valid, make_bits(None, 2), 64)
    simulation, surrogate, _ = both(trace, SPEC)
    np.testing.assert_allclose(surrogate.attention_cycles, simulation.attention_cycles, rtol=0.01)


@pytest.mark.parametrize("slow_last", [True, False])
def test_heads_of_different_slow_stages_take_turns(slow_last: bool):
    """One head keeps nearly all keys, the other few: the stages' totals are alike, and neither is the latency."""
    rng = np.random.default_rng(3)
    tokens = 64
    valid = np.ones((1, tokens), bool)
    kept = ((0.9, 0.85), (0.3, 0.05))
    heads = [make_masks(rng, (1, 1, 1, tokens), valid, *one, 0.5) for one in kept]
    masks = np.concatenate(heads[::-1] if slow_last else heads, axis=2)
    trace = make_trace(masks, valid, make_bits(None, 1), 64)
    simulation, surrogate, _ = both(trace, SPEC)
    slowest = max(cycles.item() for cycles in simulation.busy_cycles.values())
    real = simulation.attention_cycles.item()
    assert real > 1.1 * slowest
    np.testing.assert_allclose(surrogate.attention_cycles, real, rtol=0.02)


@jax.jit
def jitted_cost(workload: Workload, sizes: dict[str, jax.Array]) -> Cost:
    return cost(workload, accelerator_from_spec(SPEC).replace(sizes=sizes))


def draw_sizes(rng: np.random.Generator) -> dict[str, float]:
    lanes = float(rng.integers(1, 5))
    width = float(rng.choice([16, 32, 48, 64]))
    filter_lanes = float(rng.integers(2, 25))
    return {
        "filter_array.lanes": filter_lanes,
        "filter_array.width": float(rng.choice([32, 64])),
        "filter_statistics.lanes": filter_lanes,
        "qk.lanes": lanes,
        "qk.width": width,
        "softmax.lanes": float(rng.integers(1, 5)),
        "pv.lanes": lanes,
        "pv.width": width,
        "query_block": float(rng.integers(2, 33)),
        "key.bytes": float(rng.choice([2, 8, 64])) * 1024,
        "value.bytes": float(rng.choice([2, 8, 64])) * 1024,
        "dram.bytes_per_cycle": float(rng.uniform(4, 64)),
        "host.rows": float(rng.choice([8, 12, 16, 32])),
        "host.cols": float(rng.choice([8, 12, 16, 32])),
        "host.sram_bytes": float(rng.choice([2, 16, 256])) * 1024,
    }


def test_latency_over_random_policies_and_sizes():
    """200 points, 8 sizes by 25 policies: 5 % each, and the same order overall and at each size."""
    rng = np.random.default_rng(0)
    tokens, valid = 64, padded(2, 64)
    simulated, estimated = [], []
    for _ in range(8):
        spec = spec_with_sizes(SPEC, draw_sizes(rng))
        at_size = []
        for _ in range(25):
            first = rng.uniform(0.15, 0.95)
            masks = make_masks(
                rng, (1, 2, 4, tokens), valid, first, first * rng.uniform(0.1, 0.95), rng.uniform()
            )
            trace = make_trace(masks, valid, make_bits(rng, 1), 64)
            simulation = simulate(trace, spec, GEMM_SHAPES)
            workload = workload_from_masks(trace)
            surrogate = jitted_cost(workload, accelerator_from_spec(spec).sizes)
            at_size.append((simulation.attention_cycles, surrogate.attention_cycles))
        pairs = np.asarray(at_size)
        simulated.append(pairs[:, 0].ravel())
        estimated.append(pairs[:, 1].ravel())
        assert kendalltau(simulated[-1], estimated[-1]).statistic >= 0.95
    real, model = np.concatenate(simulated), np.concatenate(estimated)
    np.testing.assert_allclose(model, real, rtol=0.05)
    assert kendalltau(real, model).statistic >= 0.95


def hand_trace() -> Trace:
    """Two rounds, 3 queries of 4 keys, d = 2; round 1 keeps what round 0 keeps."""
    keep = np.array([[1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    masks = np.broadcast_to(keep, (1, 1, 1, 2, 4, 4))
    return make_trace(masks, np.ones((1, 4), bool), make_bits(None, 1), 2)


def test_hand_worked_rows():
    """Rows keep 2, 2, 1, 0 of 4 keys; the union of the queries wants 3 of 4."""
    simulation = simulate(hand_trace(), SPEC, GEMM_SHAPES)
    # Round 0 takes all 16 pairs, round 1 the 5 kept ones, attention the same 5; d = 2.
    assert simulation.operations["filter0.mac"].item() == 16 * 2
    assert simulation.operations["filter1.mac"].item() == 5 * 2
    assert simulation.operations["pv.mac"].item() == 5 * 2
    # (5 + 5) kept pairs of 2 bits of index.
    assert simulation.operations["index.bits"].item() == 10 * 2
    # 2 elements of 2 bits of all 4 keys, then 2 + 12 and 16 bits of the 3 wanted ones.
    moved = simulation.stream_bytes
    assert [moved[name].item() for name in ("key0", "key1", "key_rest", "value")] == [2, 1.5, 9, 12]
    # One step of 8 lanes per round with a survivor, 8 cycles per row; one cycle per kept key.
    assert simulation.busy_cycles["filter_array"].item() == (4 + 3) + 4 * 8
    assert simulation.busy_cycles["qk"].item() == 5
    # Filtering binds: rows take 10, 10, 10, 9 cycles, the last has no attention; drain 32.
    assert simulation.attention_cycles.item() == 39 + 32


def test_a_full_index_queue_holds_the_filter_back():
    """Attention of 30 cycles per row, filtering of 10: a deeper queue cannot help, none hurts not."""
    trace = random_trace(0)
    latency = []
    for depth in (1, 2, 16, 1000):
        queue = SPEC.pipeline.index_queue.model_copy(update={"value": depth})
        pipeline = SPEC.pipeline.model_copy(update={"index_queue": queue})
        spec = SPEC.model_copy(update={"pipeline": pipeline})
        latency.append(simulate(trace, spec, {}).attention_cycles)
    for shallow, deep in zip(latency, latency[1:], strict=False):
        assert np.all(deep <= shallow)
    assert np.any(latency[-1] < latency[0])


def test_dense_attention_is_simulated_and_priced_too():
    trace = random_trace(1)
    exists = trace.valid[:, None, :, None] & trace.valid[:, None, None, :]
    masks = np.broadcast_to(exists[None, :, :, None], (2, 2, 2, 1, 64, 64))
    trace = make_trace(masks, trace.valid, trace.bits, 64)
    simulation, surrogate, _ = both(trace, SPEC, is_dense=True)
    assert not any(key.startswith("filter") for key in simulation.operations)
    np.testing.assert_allclose(
        simulation.energy_pj("end_to_end"), surrogate.energy_pj("end_to_end"), rtol=1e-5
    )
    np.testing.assert_allclose(
        simulation.latency_cycles("end_to_end"), surrogate.latency_cycles("end_to_end"), rtol=0.01
    )


@pytest.mark.parametrize("is_dense", [False, True])
def test_causal_examples_filter_only_pairs_that_exist(is_dense: bool):
    """Half the pairs enter the first round; one example is padded, one is a single token."""
    rng = np.random.default_rng(5)
    valid = np.arange(48) < np.array([48, 29, 1])[:, None]
    causal = np.tril(np.ones((48, 48), bool))
    masks = make_masks(rng, (1, 3, 2, 48), valid, 0.6, 0.3, 0.5) & causal
    bits = make_bits(None, 1)
    if is_dense:
        exists = causal & valid[:, None, :] & valid[:, :, None]
        masks = np.broadcast_to(exists[None, :, None, None], (1, 3, 2, 1, 48, 48))
    trace = make_trace(masks, valid, bits, 64)
    simulation, surrogate, workload = both(trace, SPEC, is_dense=is_dense, is_causal=True)
    pairs = np.array([[48 * 49 // 2], [29 * 30 // 2], [1]])
    first = "qk.mac" if is_dense else "filter0.mac"
    np.testing.assert_array_equal(simulation.operations[first], 2 * 64 * pairs)
    for key, count in simulation.operations.items():
        np.testing.assert_array_equal(count, np.sum(workload.operations[key].count, axis=2))
    np.testing.assert_allclose(
        simulation.energy_pj("attention"), surrogate.energy_pj("attention"), rtol=1e-5
    )
    # Early rows are short and wait for memory.
    np.testing.assert_allclose(
        simulation.latency_cycles("attention")[:2],
        surrogate.latency_cycles("attention")[:2],
        rtol=0.03,
    )


@pytest.mark.parametrize("slow_first", ["stage", "memory"])
def test_early_causal_rows_wait_for_what_does_not_grow(slow_first: str):
    """A stage of as many cycles for every row, or main memory, is slow at first; attention is slow later."""
    rng = np.random.default_rng(6)
    tokens = 64
    valid = np.ones((1, tokens), bool)
    exists = np.tril(np.ones((tokens, tokens), bool))
    trace = make_trace(
        make_masks(rng, (1, 1, 2, tokens), valid, 1.0, 1.0, 0.5) & exists,
        valid,
        make_bits(None, 1),
        64,
    )
    # Attention takes 32.5 cycles of the mean row.
    if slow_first == "stage":
        unit = SPEC.units["filter_array"]
        assert unit.overhead is not None
        overhead = unit.overhead.model_copy(update={"value": 22.0})
        slow = unit.model_copy(update={"overhead": overhead})
        spec = SPEC.model_copy(update={"units": SPEC.units | {"filter_array": slow}})
    else:
        spec = spec_with_sizes(SPEC, {"dram.bytes_per_cycle": 15.0})
    simulation, surrogate, _ = both(trace, spec, is_causal=True)
    busiest = max(cycles.item() for cycles in simulation.busy_cycles.values())
    real = simulation.attention_cycles.item()
    assert real > 1.05 * busiest
    np.testing.assert_allclose(surrogate.attention_cycles, real, rtol=0.02)


@pytest.mark.parametrize("is_early", [True, False])
def test_rows_that_keep_few_keys_wait_only_if_they_come_first(is_early: bool):
    """Filters take as long for every row, attention less for one half of a head and more for the other.

    Filters run ahead, as far as the queue lets them, while attention is slow; what attention has waited is lost.
    """
    tokens = 64
    valid = np.ones((1, tokens), bool)
    masks = make_masks(np.random.default_rng(8), (1, 1, 1, tokens), valid, 1.0, 1.0, 1.0)
    half = slice(0, tokens // 2) if is_early else slice(tokens // 2, tokens)
    masks[..., half, 4:] = False
    trace = make_trace(masks, valid, make_bits(None, 1), 64)
    unit = SPEC.units["filter_array"]
    assert unit.overhead is not None
    overhead = unit.overhead.model_copy(update={"value": 30.0})
    slow = unit.model_copy(update={"overhead": overhead})
    spec = SPEC.model_copy(update={"units": SPEC.units | {"filter_array": slow}})
    simulation, surrogate, _ = both(trace, spec)
    busiest = max(cycles.item() for cycles in simulation.busy_cycles.values())
    real = simulation.attention_cycles.item()
    assert (real > 1.15 * busiest) == is_early
    np.testing.assert_allclose(surrogate.attention_cycles, real, rtol=0.03)


def test_padding_changes_nothing():
    """An example alone and the same one padded to twice its length."""
    rng = np.random.default_rng(3)
    short = np.ones((1, 32), bool)
    masks = make_masks(rng, (1, 1, 2, 32), short, 0.5, 0.2, 0.5)
    longer = np.zeros((1, 1, 2, 2, 64, 64), bool)
    longer[..., :32, :32] = masks
    bits = make_bits(None, 1)
    alone = simulate(make_trace(masks, short, bits, 64), SPEC, GEMM_SHAPES)
    padded_ = simulate(make_trace(longer, np.arange(64)[None] < 32, bits, 64), SPEC, GEMM_SHAPES)
    assert padded_.latency_cycles("end_to_end") == alone.latency_cycles("end_to_end")
    assert padded_.energy_pj("end_to_end") == pytest.approx(alone.energy_pj("end_to_end"))


def test_unknown_names_and_rules_are_refused():
    trace = hand_trace()
    with pytest.raises(UnknownNameError, match="linear site `qkw`"):
        simulate(trace, SPEC, {"qkw": GemmShape(inner=2, outer=2)})
    with pytest.raises(UnknownNameError, match="unknown scope"):
        simulate(trace, SPEC, {}).energy_pj("host")
    flat = SPEC.units["qk"].model_copy(update={"rule": "flat"})
    spec = SPEC.model_copy(update={"units": {**SPEC.units, "qk": flat}})
    with pytest.raises(PresetError, match="units.qk.rule"):
        simulate(trace, spec, {})
    with pytest.raises(UnknownNameError, match="no size `qk.lane`"):
        spec_with_sizes(SPEC, {"qk.lane": 2.0})
