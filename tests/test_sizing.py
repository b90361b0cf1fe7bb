"""Sizes as variables: legal ranges, caps that hold at every step, descent, and values that can be built."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.errors import InfeasibleCapError, PresetError
from codesign.hw.accelerator import Accelerator, accelerator_from_spec
from codesign.hw.closed_form import ModelShape
from codesign.hw.operating_points import closed_form_workload, published_setting
from codesign.hw.sizing import (
    CAP_TOLERANCE,
    Caps,
    SizeRange,
    Sizes,
    bounds_of,
    built,
    cap_ratios,
    check_caps,
    descended,
    inside,
    size_ranges,
    total_area_mm2,
    with_sizes,
)
from codesign.hw.spec import load_preset, parse_preset, preset_names
from codesign.hw.surrogate import cost

SHAPE = ModelShape(num_layers=2, num_tokens=64, num_heads=2, head_dim=32, width=64, hidden=128)
PRESETS = ("energon", "acceltran-edge", "sofa")


def scored(preset: str, caps: Caps, smoothness: float | None = None):
    """Returns the machine of a preset, and log(energy x latency) of its published setting with the caps' ratios."""
    spec = load_preset(preset)
    accelerator = accelerator_from_spec(spec)
    workload = closed_form_workload(spec, SHAPE, published_setting(spec))

    def score(sizes: Sizes) -> tuple[jax.Array, jax.Array]:
        machine = with_sizes(accelerator, sizes)
        price = cost(workload, machine, smoothness=smoothness)
        energy = jnp.mean(price.energy_pj("end_to_end"))
        latency = jnp.mean(price.latency_cycles("end_to_end"))
        return jnp.log(energy) + jnp.log(latency), cap_ratios(machine, energy, latency, caps)

    return accelerator, score


def own_area(preset: str) -> float:
    return float(total_area_mm2(accelerator_from_spec(load_preset(preset))))


@pytest.mark.parametrize("preset", preset_names())
def test_every_size_has_a_range_round_its_own(preset: str) -> None:
    spec = load_preset(preset)
    own = accelerator_from_spec(spec).sizes
    ranges = size_ranges(spec)
    assert ranges.keys() == own.keys()
    for name, value in own.items():
        assert 0.0 < ranges[name].low <= float(value) <= ranges[name].high, name
    # An interface has no area here: more bandwidth would be free.
    assert ranges["dram.bytes_per_cycle"].high == float(own["dram.bytes_per_cycle"])


def test_ranges_of_a_file_are_factors_of_its_sizes() -> None:
    text = 'extends = "topk"\n'
    text += '[sizes."qk.lanes"]\nleast = { value = 0.5, unit = "1", source = "x" }\n'
    text += 'most = { value = 2, unit = "1", source = "x" }\n'
    found = size_ranges(parse_preset(text, origin="own.toml"))["qk.lanes"]
    assert (found.low, found.high) == (4.0, 16.0)  # of 8 lanes
    with pytest.raises(PresetError, match="no size `qk.lane`: did you mean `qk.lanes`"):
        size_ranges(parse_preset(text.replace("qk.lanes", "qk.lane"), origin="own.toml"))
    with pytest.raises(PresetError, match="`least` must lie in"):
        parse_preset(text.replace("value = 0.5", "value = 1.5"), origin="own.toml")


@pytest.mark.parametrize(
    ("grid", "value", "down", "up", "next_up"),
    [
        ("whole", 5.3, 5.0, 6.0, 6.3),
        ("whole", 5.0, 5.0, 5.0, 6.0),
        ("power_of_two", 24.0, 16.0, 32.0, 48.0),
        ("power_of_two", 32.0, 32.0, 32.0, 64.0),
        ("block", 200.0, 192.0, 256.0, 264.0),
        ("free", 3.7, 3.7, 3.7, 3.7 * 2.0**0.125),
    ],
)
def test_grids(grid, value: float, down: float, up: float, next_up: float) -> None:
    one = SizeRange(low=1.0, high=1000.0, grid=grid)
    assert one.neighbours(value) == (down, up)
    assert one.next(value, 1) == pytest.approx(next_up)
    assert one.next(one.high, 1) == one.high and one.next(one.low, -1) == one.low


@pytest.mark.parametrize("preset", PRESETS)
def test_caps_hold_after_any_step(preset: str) -> None:
    area = own_area(preset)
    caps = Caps(area_mm2=area)
    accelerator, score = scored(preset, caps)
    bounds = bounds_of(size_ranges(load_preset(preset)))
    move = jax.jit(lambda sizes: inside(sizes, bounds, lambda tried: score(tried)[1]))
    generator = np.random.default_rng(0)
    for _ in range(5):
        wild = {
            name: value * 2.0 ** generator.uniform(-5.0, 5.0)
            for name, value in accelerator.sizes.items()
        }
        after = move(wild)
        assert total_area_mm2(with_sizes(accelerator, after)) <= area * (1.0 + CAP_TOLERANCE)
        for name, value in after.items():
            assert bounds[name][0] <= value <= bounds[name][1], name
    # Where nothing is broken nothing moves.
    small = {
        name: jnp.maximum(value * 0.5, bounds[name][0]) for name, value in accelerator.sizes.items()
    }
    for name, value in move(small).items():
        assert value == small[name], name


def test_a_cap_on_power_binds() -> None:
    """Half of the power at which the machine would run: what descends keeps it, and is slower for it."""
    free, score = scored("energon", Caps(area_mm2=own_area("energon"), power_w=1.0), 16.0)
    bounds = bounds_of(size_ranges(load_preset("energon")))
    watts = Caps(power_w=1.0)
    priced = jax.jit(scored("energon", watts, 16.0)[1])

    @jax.jit
    def run(sizes: Sizes, power_w: jax.Array) -> Sizes:
        def capped(values: Sizes) -> tuple[jax.Array, jax.Array]:
            value, ratios = score(values)
            return value, ratios.at[1].divide(power_w)

        return descended(sizes, bounds, capped)

    fast = run(free.sizes, jnp.asarray(1e9))
    power = float(priced(fast)[1][0])
    slow = run(free.sizes, jnp.asarray(0.5 * power))
    assert float(priced(slow)[1][0]) <= 0.5 * power * (1.0 + CAP_TOLERANCE)
    assert float(priced(slow)[0]) > float(priced(fast)[0])


@pytest.mark.parametrize(
    "preset", ["energon", *(pytest.param(one, marks=pytest.mark.slow) for one in PRESETS[1:])]
)
def test_descent_and_building_lower_the_product_at_equal_area(preset: str) -> None:
    area = own_area(preset)
    accelerator, relaxed = scored(preset, Caps(area_mm2=area), 32.0)
    score = scored(preset, Caps(area_mm2=area))[1]
    exact = jax.jit(score)
    ranges = size_ranges(load_preset(preset))
    sizes = jax.jit(lambda start: descended(start, bounds_of(ranges), relaxed))(accelerator.sizes)
    start, descent = (float(exact(one)[0]) for one in (accelerator.sizes, sizes))
    assert descent < start - 0.1
    scores = jax.jit(jax.vmap(score))
    values = built(sizes, ranges, scores)
    final, ratios = exact({name: jnp.asarray(value) for name, value in values.items()})
    assert np.all(np.asarray(ratios) <= 1.0 + CAP_TOLERANCE)
    assert float(final) < descent + 0.1
    for name, value in values.items():
        down, up = ranges[name].neighbours(value)
        assert down == pytest.approx(value, rel=1e-12) == up, name
    # No other step of one size keeps the cap and is better.
    for name, way in itertools.product(values, (-1, 1)):
        other = values | {name: ranges[name].next(values[name], way)}
        found, taken = exact({key: jnp.asarray(value) for key, value in other.items()})
        if np.all(np.asarray(taken) <= 1.0):
            assert float(found) > float(final) - 1e-4, (name, way)


@pytest.mark.parametrize(
    "preset", [*PRESETS[:-1], pytest.param(PRESETS[-1], marks=pytest.mark.slow)]
)
def test_gradients_by_every_size_are_finite_differences(preset: str) -> None:
    with jax.enable_x64(True):
        accelerator, score = scored(preset, Caps(area_mm2=1.0, power_w=1.0), 8.0)
        generator = np.random.default_rng(1)
        sizes = {  # away from the kinks of whole numbers
            name: jnp.asarray(float(value) * 2.0 ** generator.uniform(-0.4, -0.1))
            for name, value in accelerator.sizes.items()
        }

        def total(octaves: dict[str, jax.Array], sizes=sizes, score=score) -> jax.Array:
            moved = {name: value * jnp.exp2(octaves[name]) for name, value in sizes.items()}
            value, ratios = score(moved)
            return value + jnp.sum(jnp.log(ratios))

        both = jax.jit(jax.value_and_grad(total))
        nowhere = dict.fromkeys(sizes, jnp.zeros(()))
        slopes = both(nowhere)[1]
        step = 1e-6
        for name in sizes:
            if is_step(accelerator, name):
                continue
            ends = [float(both(nowhere | {name: jnp.asarray(x, float)})[0]) for x in (-step, step)]
            wanted = (ends[1] - ends[0]) / (2.0 * step)
            assert float(slopes[name]) == pytest.approx(wanted, rel=1e-3, abs=1e-6), name


def is_step(accelerator: Accelerator, name: str) -> bool:
    """Whether a size enters through a ceil, whose derivative is that of its argument (straight-through) by definition."""
    rules = {unit.name: unit.rule for unit in accelerator.structure.units}
    unit, _, kind = name.rpartition(".")
    in_host = name in ("host.rows", "host.cols", "host.sram_bytes")
    if accelerator.structure.deals_tiles and (kind == "lanes" or name == "processing_elements"):
        return True  # Waves of tiles.
    return in_host or kind == "width" or rules.get(unit) == "blocks" or kind == "bytes"


def test_impossible_caps_are_named() -> None:
    spec = load_preset("energon")
    with pytest.raises(
        InfeasibleCapError, match="below the smallest legal machine of preset `energon`"
    ):
        check_caps(spec, Caps(area_mm2=1e-3))
    with pytest.raises(InfeasibleCapError, match="`caps.power_w` must be > 0"):
        check_caps(spec, Caps(area_mm2=5.0, power_w=-1.0))
    accelerator, score = scored("energon", Caps(area_mm2=1e-3))
    with pytest.raises(InfeasibleCapError, match="raise a cap"):
        built(accelerator.sizes, size_ranges(spec), jax.jit(jax.vmap(score)))
