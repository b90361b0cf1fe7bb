"""The dense cost model: the worked example, counts against a walk through the loops, invariances, switches."""

import dataclasses
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_points import random_points

from codesign.errors import UnknownNameError
from codesign.hw.gemm.cost import cost, overuse, required_sizes
from codesign.hw.gemm.layer import Layer, matmul, widths
from codesign.hw.gemm.machine import (
    Machine,
    area_mm2,
    machine_from_file,
    with_sizes,
    with_switches,
)
from codesign.hw.gemm.machine_file import load_machine
from codesign.hw.gemm.mapping import Mapping, complete, dataflow_order
from codesign.hw.gemm.names import AXES, CONVOLUTION, MATMUL, STRIDED, TENSORS
from codesign.hw.gemm.reuse import filled_words, nest_of

FLOAT32 = 1e-5


def gemmini(**sizes: float) -> Machine:
    machine = machine_from_file(load_machine("gemmini"))
    named = {name.replace("_bytes", ".bytes"): jnp.asarray(size) for name, size in sizes.items()}
    return with_sizes(machine, named)


PRICE = jax.jit(cost)


def golden() -> tuple[Layer, Mapping, Machine]:
    """The worked example of docs/dense_layers.md: P, C, K = 128, 768, 768."""
    layer = matmul(128.0, 768.0, 768.0)
    temporal, spatial = np.ones((3, 3)), np.ones((4, 3))
    temporal[0, 0], temporal[1, 1], temporal[2, 2] = 16, 4, 6
    spatial[1, 1], spatial[2, 2] = 16, 16
    order = np.asarray([[0, 1, 2], [1, 0, 2], [2, 0, 1], [0, 1, 2]])
    mapping = complete(jnp.asarray(temporal), jnp.asarray(spatial), jnp.asarray(order), layer)
    return layer, mapping, gemmini(accumulator_bytes=1024.0, scratchpad_bytes=7168.0)


GOLDEN = [
    # Accesses (words), bandwidth (words/cycle), cycles, pJ/access, energy (uJ)
    ("registers", 80_216_064, 10_000, 8021.6, 0.48746, 39.102),
    ("accumulator", 10_518_528, 32, 328_704, 1.94628, 20.472),
    ("scratchpad", 10_813_440, 32, 337_920, 0.66591, 7.201),
    ("dram", 3_637_248, 8, 454_656, 100, 363.725),
]


@pytest.mark.parametrize("name,words,rate,cycles,per_word,energy", GOLDEN)
def test_worked_example_by_level(name, words, rate, cycles, per_word, energy):
    layer, mapping, machine = golden()
    result = PRICE(layer, mapping, machine)
    assert float(sum(result.accesses[name].values())) == words
    assert float(result.busy_cycles[name]) == pytest.approx(cycles, abs=0.05)
    assert words / float(result.busy_cycles[name]) == pytest.approx(rate, rel=FLOAT32)
    price = float(machine.access_pj(machine.structure.index(name)))
    assert price == pytest.approx(per_word, abs=5e-6)
    assert float(result.energy_pj[name]) / 1e6 == pytest.approx(energy, abs=5e-4)


def test_worked_example():
    layer, mapping, machine = golden()
    result = cost(layer, mapping, machine)
    assert float(layer.macs) == 75_497_472
    assert float(result.busy_cycles["multipliers"]) == 294_912
    assert float(result.energy_pj["multipliers"]) / 1e6 == pytest.approx(42.339, abs=5e-4)
    assert float(result.latency_cycles) == 454_656
    assert float(result.total_pj) / 1e6 == pytest.approx(472.839, abs=5e-4)
    # Smooth maximum at p = 8 and 32: 1.0230 and 1.0000 times the largest.
    for smoothness, ratio in ((8.0, 1.0230), (32.0, 1.0000)):
        smooth = cost(layer, mapping, machine, smoothness=smoothness)
        assert float(smooth.latency_cycles) / 454_656 == pytest.approx(ratio, abs=5e-5)


def test_hardware_derived_from_the_worked_example_holds_it():
    layer, mapping, machine = golden()
    as_one = jax.tree.map(lambda leaf: leaf[None] if leaf.ndim else leaf, (layer, mapping))
    sizes = required_sizes(*as_one, machine.structure)
    figures = {name: float(size) for name, size in sizes.items()}
    assert figures == {"side": 16.0, "accumulator.bytes": 1024.0, "scratchpad.bytes": 7168.0}
    assert all(float(excess) <= 0.0 for excess in overuse(layer, mapping, machine).values())
    small = gemmini(accumulator_bytes=512.0, scratchpad_bytes=7168.0, side=8.0)
    excess = overuse(layer, mapping, small)
    # 64 words of 32 bit where 8 columns have 16 words each; 16 rows and columns on 8.
    assert float(excess["accumulator.bytes"]) == pytest.approx(0.0)
    assert float(excess["accumulator.side"]) == float(excess["scratchpad.side"]) == 1.0


def walked_words(layer: Layer, mapping: Mapping, tensor: str, level: int) -> float:
    """Counts the words that enter a level by going through all iterations of the loops outside, tile by tile."""
    dims, stride = layer.dims, np.asarray(layer.stride)
    temporal, spatial, order = (
        np.asarray(leaf).astype(int) for leaf in (mapping.temporal, mapping.spatial, mapping.order)
    )
    loops = [(m, d) for m in range(3, level, -1) for d in order[m][::-1]]

    def corner(position: dict[tuple[int, int], int]) -> tuple[tuple[int, int], ...]:
        """First element and extent along each axis of the tile at a position."""
        start, extent = np.zeros(len(dims), int), np.ones(len(dims), int)
        for m in range(4):
            for d in range(len(dims)):
                extent[d] *= spatial[m, d] if m > level else temporal[m, d] * spatial[m, d]
                start[d] += position.get((m, d), 0) * extent[d]
                extent[d] *= temporal[m, d] if m > level else 1
        inside = np.prod(temporal[: level + 1] * spatial[: level + 1], axis=0)
        result = []
        for axis in AXES[tensor]:
            first, size = 0, 1
            for name in axis:
                if name in dims:
                    d = dims.index(name)
                    is_strided = name in STRIDED and tensor == "inputs"
                    step = int(stride[STRIDED.index(name)]) if is_strided else 1
                    first += step * start[d]
                    size += step * (inside[d] - 1)
            result.append((first, size))
        return tuple(result)

    total, last = 0, None
    for values in itertools.product(*(range(temporal[m, d]) for m, d in loops)):
        position = dict(zip(loops, values, strict=True))
        tile = corner(position)
        size = int(np.prod([extent for _, extent in tile]))
        # Only the innermost loop of more than one iteration slides a window; with the others all begins anew.
        active = [loop for loop in loops if temporal[loop] > 1]
        if last is None:
            total += size
        elif tile != last:
            kept = 0
            if position[active[-1]] > 0:
                overlaps = [
                    max(0, extent - abs(first - old))
                    for (first, extent), (old, _) in zip(tile, last, strict=True)
                ]
                kept = int(np.prod(overlaps))
            total += size - kept
        last = tile
    return float(total * np.prod(spatial[level + 1 :]))


SMALL_DIMS = [(MATMUL, 12), (CONVOLUTION, 12)]


@pytest.mark.parametrize("dims,num", SMALL_DIMS, ids=["matmul", "convolution"])
def test_counts_are_those_of_a_walk_through_the_loops(dims: tuple[str, ...], num: int):
    rng = np.random.default_rng(0)
    for _ in range(num):
        temporal, spatial = np.ones((4, len(dims))), np.ones((4, len(dims)))
        for dim, name in enumerate(dims):
            for prime in {"N": (), "R": (3,), "S": (2,)}.get(name, (2, 2)):
                temporal[rng.integers(4), dim] *= prime
        spatial[1, dims.index("C")] = 2
        order = np.stack([rng.permutation(len(dims)) for _ in range(4)])
        stride = rng.integers(1, 3, size=2).astype(float)
        extents = np.prod(temporal * spatial, axis=0)
        arrays = [jnp.asarray(a) for a in (extents, stride, temporal, spatial, order)]
        layer = Layer(extents=arrays[0], stride=arrays[1], bits=widths(), dims=dims)
        mapping = Mapping(temporal=arrays[2], spatial=arrays[3], order=arrays[4], dims=dims)
        nest = nest_of(layer, mapping, whole=False, slides=True)
        for tensor, level in itertools.product(TENSORS, range(3)):
            found = float(filled_words(nest, tensor, level))
            assert found == walked_words(layer, mapping, tensor, level), (tensor, level)


def moved_unit_loops(mapping: Mapping, seed: int) -> Mapping:
    """Puts the loops with one iteration elsewhere in their level; the others keep their order."""
    rng = np.random.default_rng(seed)
    temporal, order = np.asarray(mapping.temporal), np.asarray(mapping.order).copy()
    for index in np.ndindex(order.shape[:-1]):
        row = list(order[index])
        free = [dim for dim in row if temporal[(*index, dim)] == 1.0]
        row = [dim for dim in row if temporal[(*index, dim)] != 1.0]
        for dim in free:
            row.insert(rng.integers(len(row) + 1), dim)
        order[index] = row
    changed: Mapping = mapping.replace(order=jnp.asarray(order))  # type: ignore[attr-defined]
    return changed


def check_equal(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize("dims", [MATMUL, CONVOLUTION], ids=["matmul", "convolution"])
def test_loops_with_one_iteration_may_stand_anywhere(dims: tuple[str, ...]):
    layer, mapping = random_points(40, dims=dims)
    check_equal(
        PRICE(layer, mapping, gemmini()), PRICE(layer, moved_unit_loops(mapping, 3), gemmini())
    )


def repriced(machine: Machine, level: str | None, constant: str, factor: float) -> Machine:
    """The machine with a constant of a level, or of the multipliers, times a factor."""
    structure, old = machine.structure, machine.structure.multiplier
    levels, multiplier = list(structure.levels), old
    if level is None:
        multiplier = dataclasses.replace(old, **{constant: getattr(old, constant) * factor})
    else:
        place = structure.index(level)
        price = getattr(levels[place], constant) * factor
        levels[place] = dataclasses.replace(levels[place], **{constant: price})
    changed = dataclasses.replace(structure, levels=tuple(levels), multiplier=multiplier)
    return machine.replace(structure=changed)


def test_energy_is_linear_in_every_constant():
    """Twice a constant more is twice its share more, and all shares together are the whole energy."""
    layer, mapping, machine = golden()
    before = cost(layer, mapping, machine)
    constants = [(None, "constant_pj"), (None, "product_pj")]
    for level in machine.structure.levels:
        constants += [(level.name, "base_pj"), (level.name, "slope_pj")]
    shares = []
    for level, constant in constants:
        gained = [
            float(cost(layer, mapping, repriced(machine, level, constant, factor)).total_pj)
            - float(before.total_pj)
            for factor in (2.0, 3.0)
        ]
        # Float32 sums of 5e8 pJ.
        assert gained[1] == pytest.approx(2.0 * gained[0], rel=FLOAT32, abs=200.0)
        shares.append(gained[0])
    assert sum(shares) == pytest.approx(float(before.total_pj), rel=FLOAT32)
    assert sum(share > 0.0 for share in shares) == 2 + 4 + 2  # two memories grow dearer


@pytest.mark.parametrize("dims", [MATMUL, CONVOLUTION], ids=["matmul", "convolution"])
def test_relaxed_factors_lie_between_whole_ones(dims: tuple[str, ...]):
    """Accesses never fall as one factor, and the layer with it, grows, and whole factors are points of that curve."""
    layer, mapping = random_points(24, dims=dims)
    count = jax.jit(lambda *given: cost(*given, gemmini()).accesses)
    for level, dim in itertools.product(range(4), range(len(dims))):
        if dims[dim] in "RS":
            continue

        def at(factor: float, level: int = level, dim: int = dim) -> Any:
            own = mapping.temporal[:, level, dim]
            grown = mapping.replace(temporal=mapping.temporal.at[:, level, dim].set(factor))
            extents = layer.extents.at[:, dim].multiply(factor / own)
            return count(layer.replace(extents=extents), grown)

        steps = [at(float(factor)) for factor in np.linspace(1.0, 4.0, 7)]
        for low, high in itertools.pairwise(steps):
            fallen = jax.tree.map(lambda a, b: float(jnp.max(a * (1.0 - FLOAT32) - b)), low, high)
            assert max(jax.tree.leaves(fallen)) <= 0.0


def test_another_batch_of_the_same_shape_is_not_compiled_again():
    price = jax.jit(chex.assert_max_traces(n=1)(lambda *given: cost(*given, gemmini()).edp))
    for seed in range(3):
        price(*random_points(5, seed=seed))


def test_points_of_a_batch_are_priced_as_if_alone():
    layer, mapping = random_points(6)
    together = PRICE(layer, mapping, gemmini())
    for point in range(6):
        alone = jax.tree.map(lambda leaf, p=point: leaf[p] if leaf.ndim else leaf, (layer, mapping))
        np.testing.assert_allclose(PRICE(*alone, gemmini()).edp, together.edp[point], rtol=FLOAT32)


def test_sizes_may_differ_by_point():
    layer, mapping = random_points(3)
    sizes = {"side": jnp.asarray([8.0, 16.0, 32.0])}
    together = PRICE(layer, mapping, with_sizes(gemmini(), sizes))
    for point, side in enumerate((8.0, 16.0, 32.0)):
        alone = PRICE(layer, mapping, gemmini(side=side)).edp[point]
        np.testing.assert_allclose(together.edp[point], alone, rtol=FLOAT32)


def test_switches():
    layer, mapping, machine = golden()
    plain = cost(layer, mapping, machine)
    # Every fill of the registers, 4,718,592 words in tiles of 256, takes 2 * 16 + 16 - 2 cycles more.
    filled = cost(layer, mapping, with_switches(machine, fill_and_drain=True))
    assert float(filled.busy_cycles["multipliers"]) == 294_912 + 18_432 * 46 - 1
    ahead = cost(layer, mapping, with_switches(machine, fill_and_drain=True, prefetch_weights=True))
    assert float(ahead.busy_cycles["multipliers"]) == 294_912 + 46
    # Unfinished sums, 1,081,344 written and read, have 32 instead of 8 bit.
    spilled = cost(layer, mapping, with_switches(machine, partial_sums_spill_in_full=True))
    more = sum(spilled.accesses["dram"].values()) - sum(plain.accesses["dram"].values())
    assert float(more) == 2 * 1_081_344 * 3
    read = cost(layer, mapping, with_switches(machine, first_partial_sum_read=True))
    assert float(read.accesses["accumulator"]["outputs.accumulate"]) == 4_718_592
    with pytest.raises(UnknownNameError, match="no switch `fill_drain`: did you mean"):
        with_switches(machine, fill_drain=True)
    with pytest.raises(UnknownNameError, match="has no size `sides`: did you mean `side`"):
        with_sizes(machine, {"sides": jnp.asarray(1.0)})


def test_partial_tiles_take_whole_steps_and_move_what_exists():
    """C = 100 on 16 rows: 7 steps, 100 rows of weights."""
    layer = matmul(32.0, 100.0, 16.0)
    temporal, spatial = np.ones((3, 3)), np.ones((4, 3))
    temporal[0, 0], spatial[1, 1], spatial[2, 2] = 32, 16, 16
    order = np.tile(dataflow_order("weight_stationary", MATMUL), (4, 1))
    mapping = complete(jnp.asarray(temporal), jnp.asarray(spatial), jnp.asarray(order), layer)
    machine = with_switches(gemmini(), whole_steps=True, whole_blocks=False)
    result = cost(layer, mapping, machine)
    assert float(result.busy_cycles["multipliers"]) == 32 * 7
    assert float(result.accesses["dram"]["weights.read"]) == pytest.approx(1600, rel=FLOAT32)
    assert float(result.accesses["scratchpad"]["inputs.read"]) == 32 * 7 * 16
    assert float(result.energy_pj["multipliers"]) == pytest.approx(51_200 * 0.5608, rel=FLOAT32)


def test_dataflows():
    assert list(dataflow_order("weight_stationary", MATMUL)) == [0, 1, 2]
    assert list(dataflow_order("input_stationary", MATMUL)) == [2, 0, 1]
    assert list(dataflow_order("output_stationary", MATMUL)) == [1, 0, 2]
    kept = [CONVOLUTION[dim] for dim in dataflow_order("output_stationary", CONVOLUTION)]
    assert kept == ["R", "S", "C", "P", "Q", "K", "N"]
    with pytest.raises(UnknownNameError, match="unknown dataflow `row_stationary`"):
        dataflow_order("row_stationary", MATMUL)


def test_area_is_that_of_the_densities():
    areas = area_mm2(gemmini())
    # 256 multipliers of 0.000878 mm2, 32 and 128 KB at 0.0032 mm2/KB.
    expected = {"multipliers": 0.2248, "accumulator": 0.1024, "scratchpad": 0.4096}
    assert {name: float(area) for name, area in areas.items()} == pytest.approx(expected, rel=1e-3)
