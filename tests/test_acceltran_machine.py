"""AccelTran on the differentiable cost model: a machine whose own units run the linear layers and skip zeros."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from jax.flatten_util import ravel_pytree

from codesign import gates
from codesign.errors import PresetError, UnknownNameError
from codesign.hw import acceltran_estimator, energy
from codesign.hw.accelerator import Accelerator, accelerator_from_spec
from codesign.hw.closed_form import ModelShape, Setting, workload_from_fractions
from codesign.hw.operating_points import operating_points
from codesign.hw.resizing import spec_with_sizes
from codesign.hw.spec import AcceleratorSpec, load_preset
from codesign.hw.surrogate import SCOPES, Cost, cost
from codesign.workload import Workload

PRESETS = ("acceltran-edge", "acceltran-edge-lp", "acceltran-server")
# Edge and Edge-LP share a main memory.
EITHER_MEMORY = pytest.mark.parametrize(
    "preset", [PRESETS[0], pytest.param(PRESETS[1], marks=pytest.mark.slow), PRESETS[2]]
)
EDGE = load_preset("acceltran-edge")
# One head of 16 by 16 elements: every count below can be worked by hand.
TOY = ModelShape(num_layers=1, num_tokens=16, num_heads=1, head_dim=16, width=16, hidden=32)
EIGHT = Setting(qk_bits=8.0, v_bits=8.0)
SMALL = ModelShape(
    num_layers=2,
    num_tokens=24,
    num_heads=2,
    head_dim=24,
    width=40,
    hidden=72,
    head=(1, 40, 10),
)
UNEVEN = Setting(
    qk_bits=12.4,
    v_bits=10.7,
    weight_bits=5.3,
    activation_bits=6.4,
    activation_density=0.6,
    weight_density=0.7,
)
FLOAT32 = 1e-5
# LP-DDR3 at 25.6 GB/s and 700 MHz; activations, weights and masks at 370 GB/s.
DRAM, BUFFER = 25.6e9 / 700e6, 370e9 / 700e6


compiled_cost = jax.jit(
    cost, static_argnames=("smoothness",), compiler_options=tiny_model.FAST_COMPILE
)


def price(shape: ModelShape, setting: Setting, spec: AcceleratorSpec = EDGE) -> Cost:
    return compiled_cost(workload_from_fractions(shape, setting), accelerator_from_spec(spec))


def total(result: Cost, name: str) -> float:
    value = getattr(result, name)("end_to_end")
    return float(value[0]) if value.ndim else float(value)


@pytest.mark.parametrize("preset", PRESETS)
def test_area_is_that_of_the_published_closed_form(preset: str):
    spec = load_preset(preset)
    with jax.enable_x64(True):
        result = price(TOY, EIGHT, spec)
        areas = [float(result.area_mm2(scope)) for scope in SCOPES]
    published = acceltran_estimator.area_mm2(acceltran_estimator.Machine.from_spec(spec))
    assert areas == pytest.approx([published, published], rel=1e-12)
    assert areas[0] == pytest.approx(spec.operating_point.area.value, abs=5e-4)


@pytest.mark.smoke
def test_worked_cycles():
    result = price(TOY, EIGHT)
    busy = {name: float(cycles[0]) for name, cycles in result.busy_by_unit("end_to_end").items()}
    # 2 * 16^3 in attention; 16 rows of 16 x 48, 16 x 16, 16 x 32, 32 x 16; 16 * 32 elements of GELU.
    attention = 2 * 16**3
    linear = 16 * (16 * 48 + 16 * 16 + 2 * 16 * 32) + 16 * 32
    # 64 elements of 16 lanes of 16 multipliers.
    assert busy["lane"] == pytest.approx((attention + linear) / 16_384, rel=FLOAT32)
    # 256 scores, 8 a cycle in each of 4 * 64 units; two norms of 256 elements, 8 a cycle in 64.
    assert busy["softmax"] == pytest.approx(256 / 2_048, rel=FLOAT32)
    assert busy["norm"] == pytest.approx(512 / 512, rel=FLOAT32)
    # 2048 weights of 8 bits and a mask bit, shared by 4 examples.
    assert busy["dram"] == pytest.approx(2_048 * 9 / 8 / 4 / DRAM, rel=FLOAT32)
    assert busy["weight"] == pytest.approx(2_048 / 4 / BUFFER, rel=FLOAT32)
    # Q, K, V, output, scores and probabilities, inputs of qkv and up, of 256; input of down, 512.
    elements = 8 * 256 + 512
    assert busy["activation"] == pytest.approx(elements / BUFFER, rel=FLOAT32)
    assert busy["mask"] == pytest.approx((elements + 2_048 / 4) / 8 / BUFFER, rel=FLOAT32)
    # Cycles of the batch of 4: norm 32 (the first weights, 288 bytes in 7.9 cycles, come meanwhile), Q, K and V one tile of
    # 16^3 / 16 = 256 cycles on lanes of their own, scores 256, softmax 32, attention 256, output 256, norm 32, up 256 (two
    # tiles side by side), GELU 16, down 256.
    batch = 32 + 256 + 256 + 32 + 256 + 256 + 32 + 256 + 16 + 256
    assert total(result, "latency_cycles") == pytest.approx(batch / 4, rel=FLOAT32)
    # Attention: Q and K are written, 4 * 256 bytes each; scores, softmax, attention.
    by_scope = float(result.latency_cycles("attention")[0])
    assert by_scope == pytest.approx((2 * 1_024 / BUFFER + 256 + 32 + 256) / 4, rel=FLOAT32)


def test_worked_energy():
    wide = dataclasses.replace(
        EIGHT, qk_bits=20.0, v_bits=20.0, weight_bits=20.0, activation_bits=20.0
    )
    result = price(TOY, wide)
    spent = {name: float(value[0]) for name, value in result.energy_by_unit("end_to_end").items()}
    # Lane, pre- and post-sparsity and FIFO, mW at 0.7 GHz, over 16 products.
    per_product = (5.1955 + 0.2852968 + 0.2613971 + 0.0563909) / 0.7 / 16
    products = 2 * 16**3 + 16 * 2_048
    assert spent["lane"] == pytest.approx((products + 512) * per_product, rel=FLOAT32)
    assert spent["softmax"] == pytest.approx(256 * 34.6343 / 0.7 / 8, rel=FLOAT32)
    assert spent["norm"] == pytest.approx(512 * 43.8378 / 0.7 / 8, rel=FLOAT32)
    assert spent["dram"] == pytest.approx(2_048 * 21 / 8 / 4 * 13.43777522e3 / 64, rel=FLOAT32)
    # nJ per 64 byte at 1 MB, times the square root of 8 MB.
    assert spent["weight"] == pytest.approx(
        2_048 * 20 / 8 / 4 * 0.0856588e3 / 64 * 8**0.5, rel=FLOAT32
    )
    # Data-flow unit and DMA of 64 elements while lanes work.
    lane_cycles = float(result.busy_by_unit("end_to_end")["lane"][0])
    elements = 64 * (11.3711 + 0.0335287) / 0.7
    assert spent["processing_elements"] == pytest.approx(lane_cycles * elements, rel=FLOAT32)
    leakage = 64 * (16 * (0.3189685 + 0.1507329 + 0.0324301 + 0.0140774) + 4 * 2.6696 + 2.5753)
    leakage += 64 * (2.7312 + 0.0063819) + 4 * 247.918667 + 8 * 210.40467 + 238.196
    latency = total(result, "latency_cycles")
    assert spent["standing"] == pytest.approx(latency * leakage / 0.7, rel=FLOAT32)


def test_narrow_operands_save_the_multipliers_share():
    wide = dataclasses.replace(EIGHT, weight_bits=20.0, activation_bits=20.0)
    lane = [
        float(price(TOY, setting).block_own.energy_pj["lane"][0, 0]) for setting in (wide, EIGHT)
    ]
    # 0.8 of the lane's power goes with the product of the widths, 64 of 400.
    saved = 16 * 2_048 * 0.8 * 5.1955 / 0.7 / 16 * (1 - 64 / 400)
    assert lane[0] - lane[1] == pytest.approx(saved, rel=1e-4)


def test_effectual_products_and_stored_elements():
    half = dataclasses.replace(EIGHT, activation_density=0.5, weight_density=0.25)
    dense, sparse = price(TOY, EIGHT), price(TOY, half)
    # Both operands of attention at 0.5, softmax counts all elements.
    ratio = sparse.unit_busy_cycles["lane"] / dense.unit_busy_cycles["lane"]
    assert float(ratio[0, 0]) == pytest.approx(0.25)
    assert sparse.unit_busy_cycles["softmax"] == dense.unit_busy_cycles["softmax"]
    linear = 16 * 2_048 * 0.5 * 0.25 + 512
    assert float(sparse.block_own.busy_cycles["lane"][0, 0]) == pytest.approx(linear / 16_384)
    # A quarter of 8 bits and the mask bit, of 9.
    ratio = sparse.block_own.busy_cycles["dram"] / dense.block_own.busy_cycles["dram"]
    assert float(ratio[0, 0]) == pytest.approx(3 / 9)
    # All six tensors of attention are stored without their zeros, scores included: DynaTran prunes them as well.
    ratio = sparse.unit_busy_cycles["activation"] / dense.unit_busy_cycles["activation"]
    assert float(ratio[0, 0]) == pytest.approx(0.5)


def test_densities_are_read_by_name():
    """QK takes those of query and key, PV of probabilities and value, a product of its input and weight."""
    plain = workload_from_fractions(TOY, EIGHT)
    accelerator = accelerator_from_spec(EDGE)

    def lanes(densities: dict[str, float]) -> tuple[float, float]:
        leaves = {name: jnp.full((1, 1), value) for name, value in densities.items()}
        result = compiled_cost(plain.replace(densities=leaves), accelerator)
        own = result.block_own.busy_cycles["lane"]
        return float(result.unit_busy_cycles["lane"][0, 0]) * 16_384, float(own[0, 0]) * 16_384

    half = 16**3
    assert lanes({"query": 0.5, "key": 0.5})[0] == pytest.approx(half + half / 4)
    assert lanes({"probabilities": 0.5, "value": 0.25})[0] == pytest.approx(half + half / 8)
    assert lanes({"scores": 0.5})[0] == pytest.approx(2 * half)
    whole = lanes({})[1]
    for site, size in (("qkv", 768), ("out", 256), ("up", 512), ("down", 512)):
        less = lanes({site: 0.5, f"{site}.weight": 0.5})[1]
        assert whole - less == pytest.approx(16 * size * 0.75)


def test_weights_are_loaded_once_per_batch():
    assert EDGE.storage is not None
    batch = EDGE.storage.batch.model_copy(update={"value": 16.0})
    spec = EDGE.model_copy(update={"storage": EDGE.storage.model_copy(update={"batch": batch})})
    four, sixteen = price(TOY, EIGHT), price(TOY, EIGHT, spec)
    ratio = four.block_own.busy_cycles["dram"] / sixteen.block_own.busy_cycles["dram"]
    assert float(ratio[0, 0]) == pytest.approx(4.0)


def test_activations_that_do_not_fit_travel_to_main_memory():
    # 6 * 256 bytes of attention and 1024 of linear layers, of 4 examples, in 8,000 bytes.
    spec = spec_with_sizes(EDGE, {"activation.bytes": 8_000.0})
    result, roomy = price(TOY, EIGHT, spec), price(TOY, EIGHT)
    assert float(result.unit_busy_cycles["dram"][0, 0]) == 0.0
    extra = result.block_own.busy_cycles["dram"] - roomy.block_own.busy_cycles["dram"]
    assert float(extra[0, 0]) == pytest.approx(2 * (2_560 - 2_000) / DRAM, rel=1e-4)
    tight = price(TOY, EIGHT, spec_with_sizes(EDGE, {"activation.bytes": 4_000.0}))
    assert float(tight.unit_busy_cycles["dram"][0, 0]) == pytest.approx(
        2 * (1_536 - 1_000) / DRAM, rel=1e-4
    )


def test_without_masks_zeros_are_stored_and_loaded():
    assert EDGE.storage is not None
    spec = EDGE.model_copy(update={"storage": EDGE.storage.model_copy(update={"masks": None})})
    half = dataclasses.replace(EIGHT, activation_density=0.5, weight_density=0.5)
    result = price(TOY, half, spec)
    assert float(result.block_own.busy_cycles["dram"][0, 0]) == pytest.approx(
        2_048 / 4 / DRAM, rel=FLOAT32
    )
    assert "mask" not in result.busy_by_unit("end_to_end")


def test_low_power_starts_half_a_product_per_multiplier_and_cycle():
    half = dataclasses.replace(EIGHT, activation_density=0.5, weight_density=0.5)
    edge, low = (price(TOY, half, load_preset(name)) for name in PRESETS[:2])
    busy = low.busy_by_unit("end_to_end")
    all_products = 2 * 16**3 + 16 * 2_048 + 512
    assert float(busy["lane.issue"][0]) == pytest.approx(all_products / 8_192, rel=FLOAT32)
    assert float(busy["lane"][0]) == float(edge.busy_by_unit("end_to_end")["lane"][0])
    assert total(low, "latency_cycles") >= total(edge, "latency_cycles")
    for unit in ("lane", "dram", "processing_elements"):
        one, other = (result.energy_by_unit("end_to_end")[unit] for result in (edge, low))
        assert float(one[0]) == pytest.approx(float(other[0]), rel=FLOAT32)


def test_utilisation_and_standing_power():
    utilisation = EDGE.dram.bandwidth.model_copy(update={"value": 0.5, "unit": "1"})
    power = utilisation.model_copy(update={"value": 70.0, "unit": "mW"})
    lane = EDGE.units["lane"].model_copy(update={"utilisation": utilisation})
    spec = EDGE.model_copy(update={"units": {**EDGE.units, "lane": lane}, "standing_power": power})
    plain, changed = price(TOY, EIGHT), price(TOY, EIGHT, spec)
    ratio = changed.unit_busy_cycles["lane"] / plain.unit_busy_cycles["lane"]
    assert float(ratio[0, 0]) == pytest.approx(2.0)
    # 70 mW at 0.7 GHz.
    assert plain.standing_pj_per_cycle is not None and changed.standing_pj_per_cycle is not None
    difference = changed.standing_pj_per_cycle - plain.standing_pj_per_cycle
    assert float(difference) == pytest.approx(100.0, rel=1e-3)


@EITHER_MEMORY
def test_breakdowns_add_up_and_points_are_ordered(preset: str):
    spec = load_preset(preset)
    latency, spent = {}, {}
    for point in operating_points(spec, SMALL):
        result = compiled_cost(point.workload, accelerator_from_spec(spec))
        ends = sum(jnp.sum(value) for value in result.end_own.energy_pj.values())
        assert result.standing_pj_per_cycle is not None
        ends = ends + jnp.sum(result.end_own.cycles) * result.standing_pj_per_cycle
        by_layer = jnp.sum(result.energy_by_layer("end_to_end"), axis=1) + ends
        np.testing.assert_allclose(result.energy_pj("end_to_end"), by_layer, rtol=FLOAT32)
        assert result.energy_pj("attention") < result.energy_pj("end_to_end")
        assert not any(name.startswith("host") for name in result.busy_by_unit("end_to_end"))
        latency[point.name] = total(result, "latency_cycles")
        spent[point.name] = total(result, "energy_pj")
    for values in (latency, spent):
        assert values["cheapest legal"] < min(values["published"], values["dense"])


def test_resized_preset_prices_as_the_resized_machine():
    sizes = {"processing_elements": 100.0, "lane.lanes": 12.0, "activation.bytes": 3e6}
    resized = accelerator_from_spec(spec_with_sizes(EDGE, sizes))
    base = accelerator_from_spec(EDGE)
    changed = base.replace(
        sizes=base.sizes | {name: jnp.asarray(value) for name, value in sizes.items()}
    )
    workload = workload_from_fractions(SMALL, UNEVEN)
    for name in ("energy_pj", "latency_cycles", "area_mm2"):
        one, other = (
            total(compiled_cost(workload, machine), name) for machine in (resized, changed)
        )
        assert one == pytest.approx(other, rel=FLOAT32)
    with pytest.raises(UnknownNameError, match="no size `weight.bytes`"):
        spec_with_sizes(EDGE, {"weight.bytes": 1.0})


# --- what must never fall


@pytest.mark.parametrize("density", ["activation_density", "weight_density"])
@EITHER_MEMORY
def test_cycles_and_energy_fall_with_sparsity(density: str, preset: str):
    spec = load_preset(preset)
    with jax.enable_x64(True):
        results = [
            price(SMALL, dataclasses.replace(UNEVEN, **{density: value}), spec)
            for value in (0.05, 0.2, 0.5, 0.8, 1.0)
        ]
        latency = [round(total(result, "latency_cycles"), 9) for result in results]
        spent = [total(result, "energy_pj") for result in results]
    assert latency == sorted(latency) and spent == sorted(spent)
    assert spent[0] < spent[-1]
    # The low-power machine starts products too slowly to gain time by skipping them.
    assert latency[0] < latency[-1] or preset == "acceltran-edge-lp"


@pytest.mark.parametrize("knob", ["qk_bits", "v_bits", "weight_bits", "activation_bits"])
def test_energy_and_traffic_rise_with_bits(knob: str):
    with jax.enable_x64(True):
        results = [
            price(SMALL, dataclasses.replace(UNEVEN, **{knob: bits}))
            for bits in (2.0, 4.5, 8.0, 12.3, 20.0)
        ]
        latency = [round(total(result, "latency_cycles"), 9) for result in results]
        spent = [total(result, "energy_pj") for result in results]
        memory = "dram" if knob == "weight_bits" else "activation"
        moved = [float(result.busy_by_unit("end_to_end")[memory][0]) for result in results]
    assert latency == sorted(latency) and spent == sorted(spent) and spent[0] < spent[-1]
    assert moved == sorted(moved) and moved[0] < moved[-1]


@pytest.mark.parametrize(
    "size",
    [
        "processing_elements",
        "lane.lanes",
        "softmax.lanes",
        "dram.bytes_per_cycle",
        "activation.bytes",
    ],
)
def test_latency_never_rises_with_a_larger_machine(size: str):
    workload = workload_from_fractions(SMALL, UNEVEN)
    accelerator = accelerator_from_spec(spec_with_sizes(EDGE, {"activation.bytes": 2e4}))

    @jax.jit
    def latency(factor: jax.Array) -> jax.Array:
        sizes = accelerator.sizes | {size: accelerator.sizes[size] * factor}
        return cost(workload, accelerator.replace(sizes=sizes)).latency_cycles("end_to_end")[0]

    cycles = [float(latency(jnp.asarray(factor))) for factor in (0.01, 0.25, 0.5, 1.0, 2.0, 4.0)]
    assert cycles == sorted(cycles, reverse=True) and cycles[0] > cycles[-1]


# --- gradients


def uneven_machine(preset: str) -> Accelerator:
    """Sizes off every tie, in float64; activations do not fit, so that their memory matters too."""
    accelerator = accelerator_from_spec(load_preset(preset))
    rng = np.random.default_rng(0)
    sizes = {
        name: jnp.asarray(float(size) * rng.uniform(0.7, 1.3))
        for name, size in accelerator.sizes.items()
    }
    sizes["activation.bytes"] = jnp.asarray(5_000.0)
    return accelerator.replace(sizes=sizes)


def uneven_workload() -> Workload:
    """The small model with every leaf moved a little."""
    rng = np.random.default_rng(1)

    def moved(leaf: jax.Array) -> jax.Array:
        return leaf * jnp.asarray(rng.uniform(1.0, 1.02, leaf.shape))

    return jax.tree.map(moved, workload_from_fractions(SMALL, UNEVEN))


def objective(tree: tuple[dict[str, jax.Array], Workload], accelerator: Accelerator) -> jax.Array:
    result = cost(tree[1], accelerator.replace(sizes=tree[0]), smoothness=8.0)
    return (
        jnp.log(result.latency_cycles("end_to_end")[0])
        + jnp.log(result.energy_pj("end_to_end")[0])
        + jnp.log(result.latency_cycles("attention")[0])
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


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS[:2])
def test_gradients_match_central_differences(preset: str, monkeypatch: pytest.MonkeyPatch):
    """In float64, along the logarithm of every size and every leaf of the workload, densities included."""
    monkeypatch.setattr(gates, "straight_through", lambda hard, soft: soft)
    with jax.enable_x64(True):
        accelerator, workload = uneven_machine(preset), uneven_workload()
        tree = (accelerator.sizes, workload)
        flat, unravel = ravel_pytree(tree)

        def fn(change: jax.Array) -> jax.Array:
            return objective(unravel(flat * jnp.exp(change)), accelerator)

        gradient, estimate = differences(fn, jnp.zeros_like(flat), 1e-6)
        # Central differences of a smooth function at step 1e-6 keep about 9 digits.
        np.testing.assert_allclose(gradient, estimate, rtol=1e-3, atol=1e-8)
        slopes = unravel(gradient)
        for name, slope in slopes[0].items():
            assert abs(float(slope)) > 1e-9, name
        ignored = {site for site, x in slopes[1].densities.items() if not float(jnp.max(x)) > 1e-6}
        # What leaves a product or enters a table is priced where the next product reads it.
        assert ignored == {"attention", "attention_branch", "gelu", "ffn_branch"}


def test_smooth_latency_lies_above_and_tends_to_the_maximum():
    workload, accelerator = workload_from_fractions(SMALL, UNEVEN), accelerator_from_spec(EDGE)
    hard = float(compiled_cost(workload, accelerator).latency_cycles("end_to_end")[0])
    smooth = [
        float(compiled_cost(workload, accelerator, smoothness=p).latency_cycles("end_to_end")[0])
        for p in (8.0, 32.0, 512.0)
    ]
    assert smooth[0] > smooth[1] >= smooth[2] >= hard * (1 - FLOAT32)
    assert smooth[2] == pytest.approx(hard, rel=0.01)


# --- faults


def test_an_operation_that_takes_no_time_needs_a_price():
    softmax = EDGE.units["softmax"].model_copy(update={"energy": {}})
    spec = EDGE.model_copy(update={"units": {**EDGE.units, "softmax": softmax}})
    with pytest.raises(PresetError, match="units.softmax.energy.reciprocal"):
        energy.operation_pj(spec, "softmax", "reciprocal")


def test_filtering_is_no_work_for_this_machine():
    workload = workload_from_fractions(TOY, Setting(kept=(0.5,), key_bits=(4.0,)))
    with pytest.raises(UnknownNameError, match="no unit for operation `filter0.mac`"):
        cost(workload, accelerator_from_spec(EDGE))
