"""The clock as a size: the law of the supply, the same machine as a file, gradients, what a faster clock changes."""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from codesign.errors import PresetError, UnknownNameError
from codesign.hw.accelerator import CLOCK, accelerator_from_spec
from codesign.hw.closed_form import ModelShape
from codesign.hw.operating_points import closed_form_workload, published_setting
from codesign.hw.resizing import spec_with_sizes
from codesign.hw.simulation import standing_pj_per_cycle
from codesign.hw.sizing import size_ranges
from codesign.hw.spec import AcceleratorSpec, load_preset, parse_preset, preset_names
from codesign.hw.supply import MOST_SUPPLY, clock_ratio, supply_ratio
from codesign.hw.surrogate import SCOPES, Cost, cost

PRESETS = ("energon", "sofa", "esact", "acceltran-edge")
"""A host and rows, a host and standing power, own linear layers, synthesised blocks that leak."""
SOME = pytest.mark.parametrize(
    "preset", [*PRESETS[:-1], pytest.param(PRESETS[-1], marks=pytest.mark.slow)]
)
SHAPE = ModelShape(
    num_layers=2, num_tokens=64, num_heads=2, head_dim=32, width=64, hidden=128, head=(1, 64, 10)
)
SLOWER = 0.8


@pytest.fixture(autouse=True)
def in_double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@functools.cache
def machine(preset: str) -> AcceleratorSpec:
    text = f'extends = "{preset}"\n[technology]\nthreshold = {{ value = 0.35, unit = "V", source = "test" }}\n'
    return parse_preset(text, origin="mine.toml")


@functools.cache
def priced(preset: str, **sizes: float) -> Cost:
    """The published point at other sizes, in float64."""
    return of_file(machine(preset), **sizes)


def of_file(spec: AcceleratorSpec, **sizes: float) -> Cost:
    with jax.enable_x64(True):
        accelerator = accelerator_from_spec(spec)
        given = {name.replace("__", "."): jnp.asarray(value) for name, value in sizes.items()}
        resized = accelerator.replace(sizes=accelerator.sizes | given)  # type: ignore[attr-defined]
        workload = closed_form_workload(spec, SHAPE, published_setting(spec))
        return tiny_model.fast_cost(workload, resized)


def figures(price: Cost) -> np.ndarray:
    """Latency and energy of both scopes."""
    return np.asarray(
        [
            float(one(scope)[0])
            for one in (price.latency_cycles, price.energy_pj)
            for scope in SCOPES
        ]
    )


@pytest.mark.parametrize("threshold", [0.1, 0.35, 0.5])
def test_supply_is_what_the_clock_needs(threshold: float) -> None:
    assert clock_ratio(1.0, threshold) == pytest.approx(1.0)
    assert supply_ratio(1.0, threshold) == pytest.approx(1.0)
    for supply in np.linspace(0.6, MOST_SUPPLY, 9):
        clock = clock_ratio(supply, threshold)
        assert supply_ratio(clock, threshold) == pytest.approx(supply, rel=1e-12)
        with jax.enable_x64(True):
            slope = float(jax.grad(supply_ratio)(jnp.asarray(clock), threshold))
        step = 1e-5
        by_differences = (
            supply_ratio(clock + step, threshold) - supply_ratio(clock - step, threshold)
        ) / (2.0 * step)
        assert slope == pytest.approx(by_differences, rel=1e-6)


@SOME
def test_at_its_own_clock_nothing_changes(preset: str) -> None:
    fixed = without_threshold(preset)
    np.testing.assert_allclose(figures(priced(preset)), figures(of_file(fixed)), rtol=1e-12)
    assert CLOCK not in accelerator_from_spec(fixed).sizes


def without_threshold(preset: str) -> AcceleratorSpec:
    """The preset with the clock of its file for good."""
    spec = load_preset(preset)
    technology = spec.technology.model_copy(update={"threshold": None})
    return spec.model_copy(update={"technology": technology})


def test_planar_presets_have_a_clock() -> None:
    """Of the node next above their own; FinFETs have no card of that kind."""
    with_clock = {
        name for name in preset_names() if load_preset(name).technology.threshold is not None
    }
    assert {name for name in preset_names() if not name.startswith("acceltran")} == with_clock


@pytest.mark.parametrize("preset", ["energon", "sofa", "sanger"])
def test_machines_at_either_end_of_their_clock_are_files(preset: str) -> None:
    spec = load_preset(preset)
    own = size_ranges(spec)[CLOCK]
    for clock in (own.low, own.high):
        built = spec_with_sizes(spec, {CLOCK: clock})
        again = AcceleratorSpec.model_validate_json(built.model_dump_json())
        np.testing.assert_allclose(figures(of_file(again)), figures(of_file(built)), rtol=1e-12)
        # It may be clocked on from there, never beyond a supply of 1.2 times the threshold.
        rest = size_ranges(again)[CLOCK]
        slowest = spec_with_sizes(again, {CLOCK: rest.low}).technology
        assert slowest.supply.value >= 1.2 * slowest.threshold.value * (1.0 - 1e-9)


@SOME
def test_the_file_of_another_clock_is_the_same_machine(preset: str) -> None:
    """Cycles of the file are its own clock's: so many more as that is slower."""
    spec = spec_with_sizes(machine(preset), {CLOCK: SLOWER})
    assert spec.clock_hz == pytest.approx(SLOWER * machine(preset).clock_hz)
    expected = supply_ratio(SLOWER, 0.35 / machine(preset).technology.supply.value)
    assert spec.technology.supply.value == pytest.approx(
        expected * machine(preset).technology.supply.value
    )
    own = figures(of_file(spec)) / np.asarray([SLOWER, SLOWER, 1.0, 1.0])
    np.testing.assert_allclose(own, figures(priced(preset, clock=SLOWER)), rtol=1e-9)
    # The simulators read the file.
    watts = standing_pj_per_cycle(spec) * spec.clock_hz
    before = standing_pj_per_cycle(machine(preset)) * machine(preset).clock_hz
    assert watts == pytest.approx(expected * before)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_slower_clock_takes_longer_and_less_energy_where_units_bind(preset: str) -> None:
    fast, slow = (
        figures(priced(preset, clock=clock, dram__bytes_per_cycle=1e9)) for clock in (1.0, SLOWER)
    )
    np.testing.assert_allclose(slow[:2], fast[:2] / SLOWER, rtol=1e-4)
    assert np.all(slow[2:] < fast[2:])
    # Main memory alone does not care: its bytes per second stay.
    fast, slow = (
        figures(priced(preset, clock=clock, dram__bytes_per_cycle=1e-3)) for clock in (1.0, SLOWER)
    )
    assert slow[1] == pytest.approx(fast[1], rel=1e-3)


@SOME
def test_gradient_by_the_clock_is_that_of_finite_differences(preset: str) -> None:
    with jax.enable_x64(True):
        spec = machine(preset)
        accelerator = accelerator_from_spec(spec)
        workload = closed_form_workload(spec, SHAPE, published_setting(spec))

        @jax.jit
        def log_product(clock: jax.Array) -> jax.Array:
            sizes = accelerator.sizes | {CLOCK: clock}
            price = cost(workload, accelerator.replace(sizes=sizes), smoothness=8.0)  # type: ignore[attr-defined]
            product = price.latency_cycles("end_to_end") * price.energy_pj("end_to_end")
            return jnp.log(product)[0]

        clock, step = jnp.asarray(0.9), 1e-4
        by_differences = (log_product(clock + step) - log_product(clock - step)) / (2.0 * step)
        assert float(jax.grad(log_product)(clock)) == pytest.approx(float(by_differences), rel=1e-3)


def test_clocks_have_a_range_and_whole_percents() -> None:
    own = size_ranges(machine("energon"))[CLOCK]
    ratio = 0.35 / machine("energon").technology.supply.value
    assert own.high == math.floor(100.0 * clock_ratio(MOST_SUPPLY, ratio)) / 100.0 > 1.0
    assert own.low == math.ceil(100.0 * clock_ratio(0.6, ratio)) / 100.0 < 0.6
    assert own.neighbours(0.876) == pytest.approx((0.87, 0.88))
    assert own.next(0.87, 1) == pytest.approx(0.88) and own.next(own.high, 1) == own.high


def test_clocks_beyond_what_supplies_allow_are_refused() -> None:
    ends = 'least = { value = 0.95, unit = "1", source = "test" }\nmost = { value = 5, unit = "1", source = "test" }\n'
    text = 'extends = "energon"\n[technology]\nthreshold = { value = 0.35, unit = "V", source = "test" }\n[sizes.clock]\n'
    with pytest.raises(PresetError, match="`sizes.clock`: supplies of 0.6 to 1.1"):
        size_ranges(parse_preset(text + ends, origin="mine.toml"))


def test_a_threshold_too_high_and_a_clock_without_one_are_refused() -> None:
    text = 'extends = "energon"\n[technology]\nthreshold = { value = 0.95, unit = "V", source = "test" }\n'
    with pytest.raises(
        PresetError, match=r"must be at most `technology.supply` / 1\.2 \(0\.917 V\)"
    ):
        parse_preset(text, origin="mine.toml")
    with pytest.raises(UnknownNameError, match="no size `clock`"):
        spec_with_sizes(load_preset("acceltran-edge"), {CLOCK: 0.9})
