"""The differentiable cost: worked figures, gradients against differences, and what must never fall."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from codesign import gates
from codesign.errors import UnknownNameError
from codesign.hw import energy
from codesign.hw.accelerator import Accelerator, accelerator_from_spec
from codesign.hw.closed_form import ModelShape, Setting, workload_from_fractions
from codesign.hw.host import host_cost
from codesign.hw.operating_points import operating_points, published_setting
from codesign.hw.resizing import spec_with_sizes
from codesign.hw.spec import AcceleratorSpec, load_preset
from codesign.hw.surrogate import cost
from codesign.workload import Workload, fetched_vectors, gemm

SPEC = load_preset("energon")
ONE_HEAD = ModelShape(num_layers=1, num_tokens=512, num_heads=1, head_dim=64, width=64, hidden=256)
SMALL = ModelShape(
    num_layers=2,
    num_tokens=24,
    num_heads=2,
    head_dim=24,
    width=40,
    hidden=72,
    embed=(24, 20, 40),
    head=(1, 40, 10),
)
# Fractional sizes and bits, off every rounding step and tie.
UNEVEN = Setting(
    kept=(0.6, 0.3),
    query_bits=4.3,
    key_bits=(2.2, 4.6),
    qk_bits=12.4,
    v_bits=10.7,
    weight_bits=5.3,
    activation_bits=6.4,
)
# float32 sums of a few terms against figures of five digits.
FLOAT32 = 1e-5


def published(**changes: float) -> Workload:
    setting = dataclasses.replace(published_setting(SPEC), output_bits=16.0, **changes)
    return workload_from_fractions(ONE_HEAD, setting)


def with_switch(name: str, value: bool) -> AcceleratorSpec:
    choice = getattr(SPEC.switches, name).model_copy(update={"value": value})
    return SPEC.model_copy(update={"switches": SPEC.switches.model_copy(update={name: choice})})


def total_bytes(workload: Workload, spec: AcceleratorSpec = SPEC) -> float:
    result = cost(workload, accelerator_from_spec(spec))
    return float(result.unit_energy_pj["dram"][0, 0]) / energy.dram_pj_per_byte(spec)


@pytest.mark.smoke
def test_worked_check_of_energon():
    result = cost(published(), accelerator_from_spec(SPEC))
    busy = {name: float(cycles[0, 0]) for name, cycles in result.unit_busy_cycles.items()}
    # 512 rows of 512 * 0.222 keys, one per cycle.
    assert busy["qk"] == busy["pv"] == pytest.approx(58_196, abs=0.1)
    # 512 * (512 + 256) / 8 and 8 per row.
    assert busy["filter_array"] == 49_152 + 4_096
    assert busy["dram"] == pytest.approx(10_240, rel=FLOAT32)
    # One row through both stages (104 and 113.66 cycles) and the drain.
    expected = 58_195.97 + 104 + 113.66 + 32
    assert float(result.latency_cycles("attention")[0]) == pytest.approx(expected, rel=FLOAT32)


def test_energy_area_and_power_of_the_published_point():
    result = cost(published(), accelerator_from_spec(SPEC))
    by_unit = {name: float(value[0]) for name, value in result.energy_by_unit("attention").items()}
    dram = by_unit.pop("dram")
    core = sum(by_unit.values())
    assert dram == pytest.approx(24.6e6, rel=0.005)
    assert core == pytest.approx(18.6e6, rel=0.005)
    # Before the fitted factor: 610 mW over the 58,196 ns of the check.
    assert core / SPEC.energy_factor.value / 58_196 == pytest.approx(610, rel=0.005)
    point = SPEC.operating_point
    # pJ per ns are mW.
    assert core / 58_196 == pytest.approx(point.core_power.base * 1e3, rel=0.005)
    assert float(result.area_mm2("attention")) == pytest.approx(point.area.value, rel=0.001)
    bandwidth_power = SPEC.dram.bandwidth.base * energy.dram_pj_per_byte(SPEC) * 1e-12
    assert bandwidth_power == pytest.approx(point.memory_power.base, rel=0.001)


def test_bytes_of_the_published_and_of_a_narrow_point():
    assert total_bytes(published()) == pytest.approx(262_144, rel=FLOAT32)
    narrow = dataclasses.replace(
        published_setting(SPEC), qk_bits=12.0, output_bits=12.0, v_bits=8.0
    )
    # 512 * 64 * (12 + 12 + 2 + 2 + 8 + 8) / 8.
    assert total_bytes(workload_from_fractions(ONE_HEAD, narrow)) == pytest.approx(
        180_224, rel=FLOAT32
    )


def test_union_of_the_worked_masks():
    masks = jnp.asarray([[1.0, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    assert float(jnp.mean(masks)) == pytest.approx(5 / 12)
    vectors = fetched_vectors(masks[None, None])
    assert float(vectors[0, 0, -1]) / 4 == 0.75


def test_separate_storage_fetches_kept_keys_in_full():
    # 4 more bits of every key of 64 elements.
    extra = 512 * 64 * 4 / 8
    spec = with_switch("separate_storage", True)
    assert total_bytes(published(), spec) == pytest.approx(262_144 + extra, rel=FLOAT32)


def test_index_lists_and_attention_scaling_are_switches():
    narrow = published(qk_bits=8.0)
    listed = cost(narrow, accelerator_from_spec(with_switch("index_lists_priced", True)))
    plain = cost(narrow, accelerator_from_spec(SPEC))
    scaled = cost(narrow, accelerator_from_spec(with_switch("au_scales", True)))
    # 512 * 512 * (0.5 + 0.222) indices of 9 bits, written and read.
    lists = 512 * 512 * 0.722 * 9 * 2 / 8 * 1.25 * 0.525
    difference = listed.energy_pj("attention") - plain.energy_pj("attention")
    assert float(difference[0]) == pytest.approx(lists, rel=1e-3)
    ratio = scaled.unit_busy_cycles["qk"] / plain.unit_busy_cycles["qk"]
    assert float(ratio[0, 0]) == pytest.approx(8 * 8 / 256)


def test_pipeline_switches():
    plain = cost(published(), accelerator_from_spec(SPEC))
    serial = cost(published(), accelerator_from_spec(with_switch("memory_overlaps", False)))
    bare = cost(published(), accelerator_from_spec(with_switch("fill_and_drain", False)))
    gap = serial.attention_cycles - plain.attention_cycles
    assert float(gap[0, 0]) == pytest.approx(10_240, rel=1e-4)
    assert float(bare.attention_cycles[0, 0]) == pytest.approx(58_196, abs=0.1)


HOST_GOLDEN = [
    # M, K, N, cycles of the array (None: not worked), bytes
    (768, 768, 400_895, 786_432),
    (768, 3072, None, 2_850_816),
    (3072, 768, None, 9_928_704),
]


@pytest.mark.parametrize("inner,outer,cycles,moved", HOST_GOLDEN)
def test_host_cycles_and_bytes(inner: int, outer: int, cycles: int | None, moved: int):
    product = gemm(jnp.asarray([128.0]), inner, outer, jnp.asarray(8.0), jnp.asarray(8.0))
    product = jax.tree.map(lambda leaf: leaf[None], product)
    result = host_cost([product], accelerator_from_spec(SPEC), hard_maximum)
    assert float(result.dram_pj[0, 0, 0]) / energy.dram_pj_per_byte(SPEC) == pytest.approx(
        moved, rel=FLOAT32
    )
    macs = 128 * inner * outer
    # 0.2 for the multiplication and 32 * 0.0033 for the addition.
    assert float(result.mac_pj[0, 0, 0]) == pytest.approx(macs * 0.3056, rel=FLOAT32)
    # One vector of 16 bytes per row and tile, 1.25 * sqrt(256 / 8) pJ per byte.
    tiles = inner * outer / 256
    assert float(result.sram_pj[0, 0, 0]) == pytest.approx(128 * tiles * 16 * 7.0711, rel=FLOAT32)
    if cycles is not None:
        assert float(result.cycles[0, 0, 0]) == cycles
        choice = SPEC.host.prefetch_weights.model_copy(update={"value": True})
        spec = SPEC.model_copy(
            update={"host": SPEC.host.model_copy(update={"prefetch_weights": choice})}
        )
        prefetched = host_cost([product], accelerator_from_spec(spec), hard_maximum)
        assert float(prefetched.cycles[0, 0, 0]) == 294_958


def hard_maximum(values: list[jax.Array]) -> jax.Array:
    return jnp.max(jnp.stack(values), axis=0)


def test_host_area_and_other_nodes():
    area = cost(published(), accelerator_from_spec(SPEC)).area_by_unit("end_to_end")
    assert float(area["host.mac"] + area["host.sram"]) == pytest.approx(1.32, abs=0.005)
    technology = SPEC.technology.model_copy(
        update={
            "node": SPEC.technology.node.model_copy(update={"value": 28.0}),
            "supply": SPEC.technology.supply.model_copy(update={"value": 1.0}),
        }
    )
    spec = SPEC.model_copy(update={"technology": technology})
    assert energy.multiply_pj(spec) * 64 + energy.add_pj(spec) * 32 == pytest.approx(
        0.157, abs=5e-4
    )
    area = cost(published(), accelerator_from_spec(spec)).area_by_unit("end_to_end")
    assert float(area["host.mac"] + area["host.sram"]) == pytest.approx(0.511, abs=0.002)


def test_narrow_linear_operands_save_host_energy_but_cycles_only_by_choice():
    accelerator = accelerator_from_spec(SPEC)
    choice = SPEC.host.scales_with_bits.model_copy(update={"value": True})
    spec = SPEC.model_copy(
        update={"host": SPEC.host.model_copy(update={"scales_with_bits": choice})}
    )
    wide, narrow = published(), published(weight_bits=4.0, activation_bits=4.0)
    assert cost(narrow, accelerator).energy_pj("end_to_end") < cost(wide, accelerator).energy_pj(
        "end_to_end"
    )
    cycles = [cost(w, accelerator).block_host.cycles[0, 0] for w in (wide, narrow)]
    assert cycles[0] == cycles[1]
    scaled = cost(narrow, accelerator_from_spec(spec)).block_host.cycles[0, 0]
    assert float(scaled) == pytest.approx(float(cycles[0]) / 4, rel=FLOAT32)


def test_wide_linear_operands_take_several_passes():
    accelerator = accelerator_from_spec(SPEC)
    eight, nine = published(), published(activation_bits=9.0)
    ratio = [cost(w, accelerator).block_host.cycles[0, 0] for w in (eight, nine)]
    # Four products, of one cycle less each.
    assert float(ratio[1] + 4) == pytest.approx(2 * float(ratio[0] + 4), rel=FLOAT32)


def test_scopes_and_breakdowns_add_up():
    point = operating_points(SPEC, SMALL)[-1]
    result = cost(point.workload, accelerator_from_spec(SPEC))
    ends = result.end_host
    by_layer = jnp.sum(result.latency_by_layer("end_to_end"), axis=1)
    assert ends.cycles.shape == (1, 2)
    np.testing.assert_allclose(
        result.latency_cycles("end_to_end"), by_layer + jnp.sum(ends.cycles, axis=1), rtol=FLOAT32
    )
    end_energy = jnp.sum(ends.mac_pj + ends.sram_pj + ends.dram_pj, axis=1)
    np.testing.assert_allclose(
        result.energy_pj("end_to_end"),
        jnp.sum(result.energy_by_layer("end_to_end"), axis=1) + end_energy,
        rtol=FLOAT32,
    )
    assert result.energy_pj("attention") < result.energy_pj("end_to_end")
    with pytest.raises(UnknownNameError, match="unknown scope"):
        result.energy_pj("host")  # type: ignore[arg-type]


def test_operating_points_are_ordered():
    latency, spent = {}, {}
    for point in operating_points(SPEC, SMALL):
        result = cost(point.workload, accelerator_from_spec(SPEC))
        latency[point.name] = float(result.latency_cycles("end_to_end")[0])
        spent[point.name] = float(result.energy_pj("end_to_end")[0])
    for values in (latency, spent):
        assert values["cheapest legal"] < values["published"] < values["dense"]


CAUSAL = dataclasses.replace(SMALL, is_causal=True)


def test_causal_shapes_count_pairs_that_exist():
    """Against masks: half the pairs and the diagonal, and the unions of blocks that see ever more keys."""
    workload = workload_from_fractions(CAUSAL, Setting())
    tokens, heads, width = CAUSAL.num_tokens, CAUSAL.num_heads, CAUSAL.head_dim
    pairs = heads * tokens * (tokens + 1) // 2
    assert float(workload.operations["softmax.exp"].count[0, 0, 0]) == pairs
    assert float(workload.operations["qk.mac"].count[0, 0, 0]) == pairs * width
    mask = jnp.tri(tokens)[None, None]
    vectors = heads * fetched_vectors(mask)[0, 0]
    np.testing.assert_allclose(workload.streams["value"].vectors[0, 0, 0], vectors)
    rows = workload.rows["attention"]
    lengths = np.arange(1, tokens + 1)
    for level in (0, tokens.bit_length()):
        # One lane, and more lanes than keys: a step per key, a step per row.
        steps = np.sum(np.ceil(lengths / 2.0**level)) * heads
        assert float(rows.segments[0, 0, 0, level]) == steps
    assert float(rows.maximum[0, 0, 0]) == tokens


def test_causal_unions_of_independent_queries():
    """Two rounds at half: every query of a block that reaches a key misses it half the time."""
    workload = workload_from_fractions(
        CAUSAL, dataclasses.replace(UNEVEN, kept=(0.5, 0.5), union=None)
    )
    tokens, heads = CAUSAL.num_tokens, CAUSAL.num_heads
    fetched = workload.streams["value"].vectors[0, 0, 0]
    for level, size in ((0, 1), (2, 4), (4, 16)):
        expected = 0.0
        for start in range(0, tokens, size):
            block = np.arange(start, min(start + size, tokens))
            for key in range(tokens):
                expected += 1.0 - 0.5 ** np.sum(block >= key)
        assert float(fetched[level]) == pytest.approx(heads * expected, rel=FLOAT32)


def test_causal_attention_costs_less_than_full():
    for setting in (Setting(), UNEVEN):
        half, full = (
            cost(workload_from_fractions(shape, setting), accelerator_from_spec(SPEC))
            for shape in (CAUSAL, SMALL)
        )
        assert half.energy_pj("attention") < full.energy_pj("attention")
        assert half.latency_cycles("attention") < full.latency_cycles("attention")


def test_dense_workload_feeds_no_filter():
    result = cost(workload_from_fractions(SMALL, Setting()), accelerator_from_spec(SPEC))
    assert not any(name.startswith("filter") for name in result.unit_busy_cycles)
    assert bool(jnp.all(jnp.isfinite(result.attention_cycles)))


def test_operation_or_buffer_the_machine_lacks_is_named():
    workload = published()
    stray = workload.operations | {"predict.mac": workload.operations["qk.mac"]}
    with pytest.raises(UnknownNameError, match="no unit for operation `predict.mac`"):
        cost(workload.replace(operations=stray), accelerator_from_spec(SPEC))
    streams = workload.streams | {"value": workload.streams["value"].replace(buffer="shared")}
    with pytest.raises(UnknownNameError, match="no buffer `shared`"):
        cost(workload.replace(streams=streams), accelerator_from_spec(SPEC))


def test_smooth_cost_tends_to_the_hard_one_from_above():
    accelerator = accelerator_from_spec(SPEC)
    hard = float(cost(published(), accelerator).latency_cycles("end_to_end")[0])
    smooth = [
        float(cost(published(), accelerator, smoothness=p).latency_cycles("end_to_end")[0])
        for p in (8.0, 32.0, 512.0)
    ]
    assert smooth[0] > smooth[1] > smooth[2] >= hard
    assert smooth[2] == pytest.approx(hard, rel=0.01)


# --- gradients


def uneven_machine() -> Accelerator:
    """Sizes off every power of two and off every tie, in float64."""
    sizes = accelerator_from_spec(SPEC).sizes
    rng = np.random.default_rng(0)
    sizes = {
        name: jnp.asarray(float(size) * rng.uniform(1.05, 1.4)) for name, size in sizes.items()
    }
    # Small enough that neither keys nor values of a head fit, and that the host fetches twice.
    sizes |= {name: jnp.asarray(800.0) for name in ("key.bytes", "value.bytes")}
    sizes["host.sram_bytes"] = jnp.asarray(1234.0)
    return accelerator_from_spec(SPEC).replace(sizes=sizes)


def uneven_workload() -> Workload:
    """The small model with every leaf moved a little, so that no two rows or times tie."""
    rng = np.random.default_rng(1)

    def moved(leaf: jax.Array) -> jax.Array:
        return leaf * jnp.asarray(rng.uniform(1.0, 1.02, leaf.shape))

    return jax.tree.map(moved, workload_from_fractions(SMALL, UNEVEN))


def objective(tree: tuple[dict[str, jax.Array], Workload], accelerator: Accelerator) -> jax.Array:
    result = cost(tree[1], accelerator.replace(sizes=tree[0]), smoothness=8.0)
    return (
        jnp.log(result.latency_cycles("end_to_end")[0])
        + jnp.log(result.energy_pj("end_to_end")[0])
        + jnp.log(result.area_mm2("end_to_end"))
    )


def differences(
    fn: Callable[[jax.Array], jax.Array], flat: jax.Array, step: float
) -> tuple[jax.Array, jax.Array]:
    """Gradient and central differences along every coordinate."""
    shifts = step * jnp.eye(flat.size)
    values = jax.jit(jax.vmap(fn))(jnp.concatenate([flat[None] + shifts, flat[None] - shifts]))
    plus, minus = jnp.split(values, 2)
    return jax.jit(jax.grad(fn))(flat), (plus - minus) / (2 * step)


def test_relaxed_cost_matches_finite_differences(monkeypatch: pytest.MonkeyPatch):
    """Without rounding, in float64, along the logarithm of every size and every workload leaf."""
    monkeypatch.setattr(gates, "straight_through", lambda hard, soft: soft)
    with jax.enable_x64(True):
        accelerator, workload = uneven_machine(), uneven_workload()
        tree = (accelerator.sizes, workload)
        flat, unravel = ravel_pytree(tree)

        def fn(change: jax.Array) -> jax.Array:
            return objective(unravel(flat * jnp.exp(change)), accelerator)

        gradient, estimate = differences(fn, jnp.zeros_like(flat), 1e-6)
        # Central differences of a smooth function at step 1e-6 keep about 9 digits.
        np.testing.assert_allclose(gradient, estimate, rtol=1e-3, atol=1e-8)
        names = list(accelerator.sizes)
        for name, slope in zip(sorted(names), gradient[: len(names)], strict=True):
            assert abs(float(slope)) > 1e-9, name


def test_straight_through_passes_of_the_slices():
    """d cycles / d bits: one pass of 4 bits forward, slope of bits / 4 backward."""
    workload, accelerator = published(), accelerator_from_spec(SPEC)

    def cycles(bits: jax.Array) -> jax.Array:
        mac = workload.operations["filter0.mac"].replace(bits_a=jnp.reshape(bits, (1, 1, 1)))
        operations = workload.operations | {"filter0.mac": mac}
        result = cost(workload.replace(operations=operations), accelerator)
        return result.unit_busy_cycles["filter_array"][0, 0]

    value, slope = jax.value_and_grad(cycles)(jnp.asarray(3.0))
    assert float(value) == 49_152 + 4_096
    assert float(slope) == pytest.approx(512 * 512 / 8 / 4)


def test_published_sizes_have_a_slope():
    """At the preset, on powers of two: the mean of both sides; cycles of full rows fall as 1/lanes."""
    workload, accelerator = published(), accelerator_from_spec(SPEC)

    def cycles(lanes: jax.Array) -> jax.Array:
        sizes = accelerator.sizes | {"qk.lanes": lanes}
        return cost(workload, accelerator.replace(sizes=sizes)).unit_busy_cycles["qk"][0, 0]

    # 113.66 keys per row: the remainder of the longest row is rounded up to 114.
    assert float(jax.grad(cycles)(jnp.asarray(1.0))) == pytest.approx(-58_196, rel=0.34 / 113.66)


def test_a_buffer_just_too_small_is_worth_enlarging():
    workload = published(qk_bits=16.0, union=None)
    accelerator = accelerator_from_spec(spec_with_sizes(SPEC, {"key.bytes": 60_000.0}))

    def moved(capacity: jax.Array) -> jax.Array:
        sizes = accelerator.sizes | {"key.bytes": capacity}
        result = cost(workload, accelerator.replace(sizes=sizes))
        return result.unit_busy_cycles["dram"][0, 0]

    assert float(jax.grad(moved)(jnp.asarray(60_000.0))) < 0
    assert moved(jnp.asarray(65_536.0)) < moved(jnp.asarray(65_535.0))


# --- what must never fall

BIT_KNOBS = {
    "query_bits": [2.0, 3.0, 4.0, 5.0, 8.0],
    "qk_bits": [8.0, 10.5, 12.0, 16.0],
    "v_bits": [8.0, 10.5, 12.0, 16.0],
    "weight_bits": [2.0, 4.5, 8.0],
    "activation_bits": [2.0, 4.5, 8.0],
}


@pytest.mark.parametrize("knob", BIT_KNOBS)
def test_energy_and_latency_never_fall_as_bits_rise(knob: str):
    results = [
        cost(
            workload_from_fractions(SMALL, dataclasses.replace(UNEVEN, **{knob: bits})),
            accelerator_from_spec(SPEC),
        )
        for bits in BIT_KNOBS[knob]
    ]
    latency = [float(result.latency_cycles("end_to_end")[0]) for result in results]
    spent = [float(result.energy_pj("end_to_end")[0]) for result in results]
    assert latency == sorted(latency)
    assert spent == sorted(spent) and spent[0] < spent[-1]


def test_cost_never_falls_as_more_is_kept():
    latency, spent = [], []
    for last in (0.05, 0.1, 0.2, 0.4, 0.6):
        setting = dataclasses.replace(UNEVEN, kept=(0.6, last))
        result = cost(workload_from_fractions(SMALL, setting), accelerator_from_spec(SPEC))
        latency.append(float(result.latency_cycles("attention")[0]))
        spent.append(float(result.energy_pj("attention")[0]))
    assert latency == sorted(latency)
    assert spent == sorted(spent)


@pytest.mark.parametrize(
    "size", ["filter_array.lanes", "qk.lanes", "pv.width", "dram.bytes_per_cycle", "query_block"]
)
def test_latency_never_rises_with_a_larger_machine(size: str):
    workload = workload_from_fractions(SMALL, UNEVEN)
    accelerator = accelerator_from_spec(SPEC)

    @jax.jit
    def latency(factor: jax.Array) -> jax.Array:
        sizes = accelerator.sizes | {size: accelerator.sizes[size] * factor}
        sizes |= {"key.bytes": jnp.asarray(100.0)}
        return cost(workload, accelerator.replace(sizes=sizes)).latency_cycles("attention")[0]

    cycles = [float(latency(jnp.asarray(factor))) for factor in (0.25, 0.5, 1.0, 2.0, 4.0)]
    assert cycles == sorted(cycles, reverse=True)


def test_resized_preset_prices_as_the_resized_machine():
    sizes = {"key.bytes": 20_000.0, "query_block": 24.0, "qk.lanes": 3.0, "host.sram_bytes": 9e4}
    resized = accelerator_from_spec(spec_with_sizes(SPEC, sizes))
    base = accelerator_from_spec(SPEC)
    changed = base.replace(
        sizes=base.sizes | {name: jnp.asarray(value) for name, value in sizes.items()}
    )
    for scope in ("attention", "end_to_end"):
        one, other = (cost(published(), machine) for machine in (resized, changed))
        np.testing.assert_allclose(one.energy_pj(scope), other.energy_pj(scope), rtol=FLOAT32)
        np.testing.assert_allclose(
            one.latency_cycles(scope), other.latency_cycles(scope), rtol=FLOAT32
        )
        np.testing.assert_allclose(one.area_mm2(scope), other.area_mm2(scope), rtol=FLOAT32)
