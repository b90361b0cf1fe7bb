"""Dense layers on random machines: cost never falls with bits or work, never rises with bandwidth or lanes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_points import DATAFLOWS, dataflow_machine, random_points

from codesign.hw.gemm.cost import cost
from codesign.hw.gemm.layer import Layer
from codesign.hw.gemm.machine import Machine, with_sizes, with_switches
from codesign.hw.gemm.mapping import Mapping

NUM = 60
FLOAT32 = 1e-5
PRICE = jax.jit(cost)
EVERY = pytest.mark.parametrize("dataflow", DATAFLOWS)
COUNTING = {"timeloop": {}, "in_full": {"whole_blocks": False, "partial_sums_spill_in_full": True}}
COUNTING["in_full"] |= {"first_partial_sum_read": True, "sliding_window": False}
"""Switches of `gemmini` as they are, and others that count more."""


def points(dataflow: str, **switches: bool) -> tuple[Layer, Mapping, Machine]:
    """Random layers, each with a random mapping and sizes of its own, a fourth to four times those of the file."""
    layer, mapping = random_points(NUM, dataflow=dataflow, seed=1)
    # Of rows that a stride leaves out a larger tile spans more.
    layer = layer.replace(stride=jnp.ones_like(layer.stride))  # type: ignore[attr-defined]
    rng = np.random.default_rng(2)
    machine = with_switches(dataflow_machine(dataflow), **switches)
    sizes = {
        name: size * jnp.asarray(4.0 ** rng.uniform(-1.0, 1.0, NUM))
        for name, size in machine.sizes.items()
    }
    return layer, mapping, with_sizes(machine, sizes)


def check_at_most(small: jax.Array, large: jax.Array) -> None:
    """Checks values against bounds, but for the rounding of float32 sums."""
    np.testing.assert_array_less(np.asarray(small), np.asarray(large) * (1.0 + FLOAT32))


@EVERY
def test_more_bandwidth_never_takes_longer_nor_more_energy(dataflow: str):
    layer, mapping, machine = points(dataflow)
    before = PRICE(layer, mapping, machine)
    rates = [name for name in machine.sizes if name.endswith("words_per_cycle")]
    shortened = np.zeros(NUM, bool)
    for name in rates:
        faster = with_sizes(machine, {name: machine.sizes[name] * 3.0})
        after = PRICE(layer, mapping, faster)
        check_at_most(after.latency_cycles, before.latency_cycles)
        np.testing.assert_array_equal(after.total_pj, before.total_pj)
        shortened |= np.asarray(after.latency_cycles < before.latency_cycles)
    assert len(rates) == 4 and shortened.mean() > 0.25


@EVERY
def test_more_lanes_never_cost_more_at_fixed_work(dataflow: str):
    """Twice the array: half the steps of a loop outside, everything else equal."""
    layer, mapping, machine = points(dataflow)
    flow, before = DATAFLOWS[dataflow], PRICE(layer, mapping, machine)
    larger = with_sizes(machine, {"side": machine.sizes["side"] * 2.0})
    for level, name in ((1, flow.below_accumulator), (2, flow.below_scratchpad)):
        dim = layer.dims.index(name)
        factor = jnp.where(mapping.temporal[:, 3, dim] % 2 == 0, 2.0, 1.0)
        wider = mapping.replace(
            temporal=mapping.temporal.at[:, 3, dim].divide(factor),
            spatial=mapping.spatial.at[:, level, dim].multiply(factor),
        )
        after = PRICE(layer, wider, larger)
        for kind in (after.busy_cycles, {"latency": after.latency_cycles}):
            whole = before.busy_cycles | {"latency": before.latency_cycles}
            for part, cycles in kind.items():
                check_at_most(cycles, whole[part])
        check_at_most(after.total_pj, before.total_pj)
        halved = np.asarray(
            after.busy_cycles["multipliers"] * 2 == before.busy_cycles["multipliers"]
        )
        assert np.array_equal(halved, np.asarray(factor) == 2.0) and halved.any()


@pytest.mark.parametrize("counting", COUNTING)
@EVERY
def test_wider_words_never_cost_less(dataflow: str, counting: str):
    layer, mapping, machine = points(dataflow, **COUNTING[counting])
    for name in ("weights", "inputs", "outputs", "partial"):
        results = [
            PRICE(layer.replace(bits=layer.bits | {name: jnp.asarray(bits)}), mapping, machine)
            for bits in (4.0, 8.0, 12.0, 33.0)
        ]
        for narrow, wide in itertools.pairwise(results):
            assert np.all(wide.total_pj > narrow.total_pj), name
            check_at_most(narrow.latency_cycles, wide.latency_cycles)


@pytest.mark.parametrize("counting", COUNTING)
@EVERY
def test_more_work_never_costs_less(dataflow: str, counting: str):
    layer, mapping, machine = points(dataflow, **COUNTING[counting])
    before = PRICE(layer, mapping, machine)
    for level, dim in itertools.product(range(4), range(3)):
        grown = mapping.replace(temporal=mapping.temporal.at[:, level, dim].multiply(2.0))
        more = layer.replace(extents=layer.extents.at[:, dim].multiply(2.0))
        after = PRICE(more, grown, machine)
        check_at_most(before.latency_cycles, after.latency_cycles)
        check_at_most(before.total_pj, after.total_pj)
        assert np.all(after.busy_cycles["multipliers"] > before.busy_cycles["multipliers"])
