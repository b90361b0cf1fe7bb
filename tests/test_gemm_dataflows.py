"""Three dataflows on one hierarchy: cycles beside SCALE-Sim's, and derivatives by every factor, size and width."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_points import DATAFLOWS, dataflow_machine, relaxed_points
from jax.flatten_util import ravel_pytree

from codesign.hw.gemm.cost import cost
from codesign.hw.gemm.layer import Layer, matmul
from codesign.hw.gemm.machine import Machine, with_sizes, with_switches
from codesign.hw.gemm.mapping import Mapping, complete, dataflow_order
from codesign.hw.gemm.names import CONVOLUTION, MATMUL
from codesign.hw.tool_models import TOOLS, gemm_cost

SLOPE, NOUGHT = (
    1e-3,
    1e-8,
)  # Of central differences of logarithms in float64, where nothing is rounded up.
STEP = 1e-5
SMOOTHNESS = 2.0  # So low that the fastest memory is felt.
SHAPES = [(128, 768, 768), (33, 100, 10), (1, 40, 17), (700, 64, 300), (16, 16, 16)]
"""Rows, reduction, columns: whole and partial tiles, sides of the array that stay part empty."""


def array_mapping(layer: Layer, dataflow: str, side: float) -> Mapping:
    """Tiles as large as the array, in turn; what is inside runs whole."""
    flow, levels = DATAFLOWS[dataflow], 4
    temporal, spatial = np.ones((2, len(SHAPES), levels, 3))
    for level, name in ((1, flow.below_accumulator), (2, flow.below_scratchpad)):
        spatial[:, level, MATMUL.index(name)] = side
    for name in set(flow.inside) & set(MATMUL):
        temporal[:, 0, MATMUL.index(name)] = layer.extent(name)
    order = np.broadcast_to(dataflow_order(dataflow, MATMUL), (len(SHAPES), levels, 3))
    return complete(jnp.asarray(temporal[:, :3]), jnp.asarray(spatial), jnp.asarray(order), layer)


@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_array_takes_the_cycles_of_scale_sim(dataflow: str):
    """Filled and drained with every tile, partial steps whole: SCALE-Sim 3.0.0's, to the cycle."""
    machine = with_switches(dataflow_machine(dataflow), fill_and_drain=True, whole_steps=True)
    rows, inner, outer = np.asarray(SHAPES, float).T
    layer = matmul(jnp.asarray(rows), jnp.asarray(inner), jnp.asarray(outer))
    products = np.stack([rows, outer, inner], axis=-1).astype(int)
    for side in (16, 32):
        mapping = array_mapping(layer, dataflow, float(side))
        sized = with_sizes(machine, {"side": jnp.asarray(float(side))})
        cycles = cost(layer, mapping, sized).busy_cycles["multipliers"]
        tool = gemm_cost(TOOLS["scale_sim"], products, np.full(len(SHAPES), side), dataflow)
        np.testing.assert_array_equal(np.asarray(cycles), tool.cycles)


def smooth_machine(dataflow: str) -> Machine:
    """Without what is rounded up, whose derivatives are substituted; every memory slow enough to be felt."""
    machine = with_switches(
        dataflow_machine(dataflow), whole_blocks=False, whole_cycles=False, fill_and_drain=True
    )
    machine = with_sizes(machine, {"registers.words_per_cycle": jnp.asarray(150.0)})
    multiplier = dataclasses.replace(machine.structure.multiplier, scales_with_bits=True)
    return machine.replace(structure=dataclasses.replace(machine.structure, multiplier=multiplier))


def log_costs(
    trained: dict[str, Any], order: jax.Array, layer: Layer, machine: Machine
) -> jax.Array:
    """Logarithms of latency and energy, `[2, N]`, by logarithms of inner factors, sizes and extents, and by widths."""
    powers = {name: jax.tree.map(jnp.exp2, trained[name]) for name in trained if name != "bits"}
    own = layer.replace(extents=powers["extents"], bits=trained["bits"])
    mapping = complete(powers["temporal"], powers["spatial"], order, own)
    result = cost(own, mapping, with_sizes(machine, powers["sizes"]), smoothness=SMOOTHNESS)
    return jnp.log(jnp.stack([result.latency_cycles, result.total_pj]))


@pytest.mark.parametrize(
    ("dataflow", "dims"),
    [*((name, MATMUL) for name in DATAFLOWS), ("weight_stationary", CONVOLUTION)],
    ids=[*DATAFLOWS, "convolution"],
)
def test_derivatives_are_those_of_central_differences(dataflow: str, dims: tuple[str, ...]):
    """By every inner factor in time and in space, every size of the machine, every extent and width."""
    with jax.enable_x64(True):
        machine = smooth_machine(dataflow)
        layer, mapping = relaxed_points(3, dims=dims, dataflow=dataflow)
        order = jnp.broadcast_to(dataflow_order(dataflow, dims), mapping.order.shape)
        widths_off_steps = {"weights": 6.5, "inputs": 7.3, "outputs": 9.0, "partial": 30.5}
        trained = {
            "temporal": jnp.log2(mapping.temporal[:, :-1]),
            "spatial": jnp.log2(mapping.spatial),
            "extents": jnp.log2(layer.extents),
            "sizes": {name: jnp.log2(size) for name, size in machine.sizes.items()},
            "bits": widths_off_steps,
        }
        point, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf, float), trained))

        def total(flat: jax.Array) -> jax.Array:
            return jnp.sum(log_costs(unravel(flat), order, layer, machine), axis=1)

        slopes = jax.jit(jax.jacrev(total))(point)
        # A factor of 1 is one that the machine does not tile: there derivatives jump.
        is_free = unravel(jnp.ones_like(point))
        for name in ("temporal", "spatial"):
            is_free[name] = trained[name] > 0.0
        free = (
            np.asarray(ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(float), is_free))[0]) > 0
        )
        steps = STEP * jnp.eye(point.size)[free]
        change = jax.jit(jax.vmap(lambda step: total(point + step) - total(point - step)))
        differences = (change(steps) / (2.0 * STEP)).T
        np.testing.assert_allclose(slopes[:, free], differences, rtol=SLOPE, atol=NOUGHT)
        # What is trained has an effect, all but a few factors that commute with others.
        felt = unravel(jnp.max(jnp.abs(slopes), axis=0))
        for name, slope in (felt["sizes"] | felt["bits"]).items():
            assert float(slope) > 1e-4, name
        for name in ("temporal", "spatial"):
            assert np.mean(np.asarray(felt[name])[np.asarray(is_free[name])] > 1e-4) > 0.75, name
