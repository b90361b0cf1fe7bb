"""The mapper: legal mappings of any layer, the optimum where all mappings can be tried, one compilation, clear refusals."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_points import random_points

from codesign.errors import MappingError, UnknownNameError
from codesign.hw.gemm import mapper
from codesign.hw.gemm.cost import cost, overuse
from codesign.hw.gemm.layer import Layer, matmul, widths
from codesign.hw.gemm.machine import Machine, machine_from_file, with_sizes
from codesign.hw.gemm.machine_file import load_machine
from codesign.hw.gemm.mapper import MappedLayers, MapperSettings, map_layers
from codesign.hw.gemm.mapping import Mapping, spread_allowed, tile_allowed
from codesign.hw.gemm.moves import with_loop_moved
from codesign.hw.gemm.names import CONVOLUTION, MATMUL

FLOAT32 = 1e-5
NUM_LAYERS = 12  # Of every call but one: a program for each kind of layer.
FAST = MapperSettings(
    num_starts=24, num_descended=8, descent_rounds=20, move_rounds=6, moves_per_round=60
)
SIZES = ("side", "accumulator.bytes", "scratchpad.bytes")
GOLDEN = (128.0, 768.0, 768.0)


def machines(*sizes: tuple[float, float, float]) -> Machine:
    """Machines `[NUM_LAYERS]`: side, bytes of the accumulator and of the scratchpad; the last one again and again."""
    rows = [*sizes, *[sizes[-1]] * (NUM_LAYERS - len(sizes))]
    columns = dict(zip(SIZES, jnp.asarray(rows, float).T, strict=True))
    return with_sizes(machine_from_file(load_machine("gemmini")), columns)


def layers(*extents: tuple[float, ...], dims: tuple[str, ...] = MATMUL, stride: int = 1) -> Layer:
    """Layers `[NUM_LAYERS]`, the last one again and again."""
    rows = [*extents, *[extents[-1]] * (NUM_LAYERS - len(extents))]
    return Layer(
        extents=jnp.asarray(rows, float),
        stride=jnp.full((NUM_LAYERS, 2), float(stride)),
        bits=widths(),
        dims=dims,
    )


def mapped(layer: Layer, machine: Machine, seed: int = 0) -> MappedLayers:
    return map_layers(layer, machine, settings=FAST, key=jax.random.key(seed))


@functools.cache
def random_products(seed: int) -> tuple[Layer, Machine, MappedLayers]:
    """Products of any size, primes among them, on machines of any size down to the smallest."""
    rng = np.random.default_rng(seed)
    numbers = (1, 2, 7, 13, 64, 96, 128, 251, 768, 1000, 25088, 65537)
    extents = [tuple(rng.choice(numbers, 3).astype(float)) for _ in range(NUM_LAYERS)]
    sides = 2.0 ** rng.integers(0, 8, NUM_LAYERS)
    sizes = [
        (side, side * 4.0 * 2.0 ** rng.integers(0, 10), 2.0 ** rng.integers(1, 18))
        for side in sides
    ]
    layer, machine = layers(*extents), machines(*sizes)
    return layer, machine, mapped(layer, machine)


@functools.cache
def random_convolutions(dims: tuple[str, ...]) -> tuple[Layer, Machine, MappedLayers]:
    """Convolutions with windows, strides and prime channels, on machines down to the smallest."""
    rng = np.random.default_rng(0)
    numbers = {
        **{"R": (1, 3, 7), "S": (1, 3), "P": (7, 56), "Q": (1, 13)},
        **{"C": (3, 64), "K": (36, 97), "N": (1, 4)},
    }
    extents = [tuple(float(rng.choice(numbers[dim])) for dim in dims) for _ in range(NUM_LAYERS)]
    large = [(128.0, 2.0**15, 2.0**14), (16.0, 2.0**15, 2.0**17)]
    machine = machines((1.0, 4.0, 2.0), (16.0, 64.0, 64.0), *large)
    layer = layers(*extents, dims=dims, stride=2)
    return layer, machine, mapped(layer, machine)


CASES: dict[str, Callable[[], tuple[Layer, Machine, MappedLayers]]] = {
    "matmul": functools.partial(random_products, 0),
    "other matmul": functools.partial(random_products, 1),
    "convolution of rows": functools.partial(random_convolutions, ("R", "P", "C", "K")),
    "convolution": functools.partial(random_convolutions, CONVOLUTION),
}
# Four loops take half a minute to compile, seven most of one.
EVERY_CASE = [
    pytest.param(case, marks=pytest.mark.slow if "convolution" in case else ()) for case in CASES
]


@pytest.mark.parametrize("case", EVERY_CASE)
def test_every_mapping_is_legal(case: str):
    layer, machine, found = CASES[case]()
    dims, structure = layer.dims, machine.structure
    temporal, spatial, order = (
        np.asarray(leaf)
        for leaf in (found.mapping.temporal, found.mapping.spatial, found.mapping.order)
    )
    for factors in (temporal, spatial):
        assert np.all(factors >= 1.0) and np.all(factors == np.round(factors))
    whole = np.prod(temporal.astype(int), axis=1) * np.prod(spatial.astype(int), axis=1)
    np.testing.assert_array_equal(whole, np.asarray(layer.extents).astype(int))
    np.testing.assert_array_equal(
        np.sort(order, axis=-1), np.broadcast_to(np.arange(len(dims)), order.shape)
    )
    assert np.all(tile_allowed(structure, dims) | (temporal == 1.0))
    assert np.all(spread_allowed(structure, dims) | (spatial == 1.0))
    assert np.all(np.prod(spatial, axis=-1) <= np.asarray(machine.sizes["side"])[:, None])
    held = held_bytes(layer, temporal, spatial)
    for name, bytes_held in held.items():
        instances = np.asarray(machine.sizes["side"]) if name == "accumulator" else 1.0
        assert np.all(bytes_held * instances <= np.asarray(machine.sizes[f"{name}.bytes"]))


def held_bytes(layer: Layer, temporal: np.ndarray, spatial: np.ndarray) -> dict[str, np.ndarray]:
    """What a column of `gemmini`'s accumulator (sums of 4 byte) and its scratchpad (operands) hold, by hand."""
    stride = np.asarray(layer.stride)

    def inside(level: int, dim: str) -> np.ndarray:
        if dim not in layer.dims:
            return np.ones(len(temporal))
        d = layer.dims.index(dim)
        return np.prod(temporal[:, : level + 1, d] * spatial[:, : level + 1, d], axis=1)

    sums = np.prod([inside(1, dim) for dim in "NPQK"], axis=0)
    weights = np.prod([inside(2, dim) for dim in "RSCK"], axis=0)
    rows, columns = (
        (inside(2, out) - 1) * stride[:, axis] + inside(2, window)
        for axis, (out, window) in enumerate(("PR", "QS"))
    )
    inputs = rows * columns * inside(2, "N") * inside(2, "C")
    return {"accumulator": 4.0 * sums, "scratchpad": weights + inputs}


@pytest.mark.parametrize("case", EVERY_CASE)
def test_the_stated_cost_is_that_of_the_mapping(case: str):
    layer, machine, found = CASES[case]()
    again = jax.jit(cost)(layer, found.mapping, machine)
    np.testing.assert_allclose(found.cost.edp, again.edp, rtol=FLOAT32)
    np.testing.assert_allclose(jnp.min(found.reached, axis=1), again.edp, rtol=FLOAT32)
    assert found.reached.shape == found.rounded.shape == (NUM_LAYERS, FAST.num_starts)
    assert np.all(np.min(found.reached, axis=1) <= np.min(found.rounded, axis=1))


def splits(number: int, places: int) -> list[tuple[int, ...]]:
    """All ways to write a number as a product of so many factors."""
    if places == 1:
        return [(number,)]
    return [
        (factor, *rest)
        for factor in range(1, number + 1)
        if number % factor == 0
        for rest in splits(number // factor, places - 1)
    ]


def all_mappings(extents: tuple[int, int, int]) -> Mapping:
    """All whole mappings of a product onto `gemmini`; loops of the registers, which have none outside, stay in order."""
    places = [
        [(0, 0, False), (1, 0, False), (2, 0, False), (3, 0, False)],
        [(1, 1, False), (1, 1, True), (2, 1, False), (3, 1, False)],
        [(1, 2, False), (2, 2, False), (2, 2, True), (3, 2, False)],
    ]
    chosen = list(itertools.product(*(splits(extent, 4) for extent in extents)))
    temporal, spatial = np.ones((len(chosen), 4, 3)), np.ones((len(chosen), 4, 3))
    for point, parts in enumerate(chosen):
        for own, part in zip(places, parts, strict=True):
            for (level, dim, is_spatial), factor in zip(own, part, strict=True):
                (spatial if is_spatial else temporal)[point, level, dim] = factor
    permutations = list(itertools.permutations(range(3)))
    orders = np.asarray([((0, 1, 2), *own) for own in itertools.product(permutations, repeat=3)])
    return Mapping(
        temporal=jnp.asarray(np.repeat(temporal, len(orders), axis=0)),
        spatial=jnp.asarray(np.repeat(spatial, len(orders), axis=0)),
        order=jnp.asarray(np.tile(orders, (len(chosen), 1, 1)), jnp.int32),
        dims=MATMUL,
    )


TINY_SIZES = [(2.0, 16.0, 8.0), (2.0, 64.0, 24.0), (4.0, 64.0, 12.0), (4.0, 256.0, 64.0)]
TINY_PRODUCTS = [(4, 6, 2), (3, 4, 2)]


@pytest.mark.parametrize("extents", TINY_PRODUCTS)
def test_small_products_get_the_best_mapping_there_is(extents: tuple[int, int, int]):
    every = all_mappings(extents)
    num = len(every.order)
    one = matmul(*(jnp.full((num,), float(extent)) for extent in extents))

    @jax.jit
    def least(one: Layer, every: Mapping, machine: Machine) -> jax.Array:
        limits = overuse(one, every, machine).values()
        is_legal = functools.reduce(jnp.logical_and, [excess <= 0.0 for excess in limits])
        return jnp.min(jnp.where(is_legal, cost(one, every, machine).edp, jnp.inf))

    machine = machines(*TINY_SIZES)
    found = mapped(layers(tuple(map(float, extents))), machine)
    for place in range(len(TINY_SIZES)):
        sizes = {name: machine.sizes[name][place : place + 1] for name in SIZES}
        best = float(least(one, every, with_sizes(machine, sizes)))
        assert float(found.cost.edp[place]) == pytest.approx(best, rel=FLOAT32)


def test_no_worse_than_the_worked_example():
    """Section 1 of docs/dense_layers.md: 472.839 uJ, 454,656 cycles."""
    found = mapped(layers(GOLDEN), machines((16.0, 1024.0, 7168.0)))
    assert float(found.cost.edp[0]) <= 472.839 * 454_656


def test_better_than_random_mappings():
    layer, mapping = random_points(200)
    machine = machines((16.0, 2.0**15, 2.0**17))
    single = with_sizes(machine, {name: machine.sizes[name][:1] for name in SIZES})
    limits = overuse(layer, mapping, single).values()
    is_legal = np.all([np.asarray(excess) <= 0.0 for excess in limits], axis=0)
    unit = layer.replace(stride=jnp.ones_like(layer.stride))  # type: ignore[attr-defined]
    edp = np.asarray(cost(unit, mapping, single).edp)[is_legal]
    found = mapped(layers((144.0, 144.0, 144.0)), machine)
    assert is_legal.sum() > 50 and float(found.cost.edp[0]) < 0.5 * edp.min()


def test_descent_gives_better_roundings_than_random_starts():
    sizes = [(side, 2.0**15, 2.0**17) for side in 2.0 ** np.arange(1.0, 8.0)]
    rounded = np.log2(mapped(layers(GOLDEN), machines(*sizes)).rounded)[: len(sizes)]
    descended, random = np.split(rounded, [FAST.num_descended], axis=1)
    gain = np.mean(np.median(random, axis=1) - np.median(descended, axis=1))
    assert gain > 1.0  # Half the EDP.


def test_the_key_decides_and_neighbours_do_not():
    layer, machine, found = random_products(0)
    again = mapped(layer, machine)
    other = mapped(layer, machine, seed=1)
    jax.tree.map(np.testing.assert_array_equal, found, again)
    assert np.any(np.asarray(found.rounded) != np.asarray(other.rounded))
    backwards = mapped(
        layer.replace(extents=layer.extents[::-1], stride=layer.stride[::-1]),  # type: ignore[attr-defined]
        with_sizes(machine, {name: machine.sizes[name][::-1] for name in SIZES}),
    )
    np.testing.assert_array_equal(backwards.mapping.temporal[::-1], found.mapping.temporal)
    np.testing.assert_array_equal(backwards.reached[::-1], found.reached)


def test_other_layers_and_machines_compile_nothing():
    random_products(0)
    number = mapper.search._cache_size()
    mapped(layers((3.0, 65537.0, 4096.0)), machines((64.0, 4096.0, 4096.0)), seed=5)
    mapped(layers((1.0, 1.0, 1.0)), machines((1.0, 4.0, 2.0)))
    assert mapper.search._cache_size() == number


def test_objectives_and_machines_of_one_size():
    """Multiplications on all 256 elements, or every word once at 8 words/cycle: what takes longer is reached."""
    machine = machine_from_file(load_machine("gemmini"))
    layer = matmul(jnp.asarray([128.0, 256.0]), 64.0, 64.0)
    found = map_layers(layer, machine, objective="latency", settings=FAST, key=jax.random.key(0))
    np.testing.assert_allclose(
        found.cost.latency_cycles, jnp.min(found.reached, axis=1), rtol=FLOAT32
    )
    bounds = jnp.asarray([128.0, 256.0]) * 64.0 * 64.0 / 256.0
    traffic = (layer.num_outputs + 64.0 * 64.0 + layer.extents[:, 0] * 64.0) / 8.0
    np.testing.assert_allclose(found.cost.latency_cycles, jnp.maximum(bounds, traffic))


def test_loops_move_as_in_a_list():
    rng = np.random.default_rng(0)
    num = 40
    order = np.stack([[rng.permutation(5) for _ in range(3)] for _ in range(num)])
    level, dim, place = (
        rng.integers(3, size=num),
        rng.integers(5, size=num),
        rng.integers(5, size=num),
    )
    moved = with_loop_moved(
        jnp.moveaxis(jnp.asarray(order), 0, -1)[:, :, None],
        *(jnp.asarray(part)[None] for part in (level, dim, place)),
    )
    for point in range(num):
        row = [own for own in order[point, level[point]] if own != dim[point]]
        row.insert(place[point], dim[point])
        order[point, level[point]] = row
    np.testing.assert_array_equal(np.moveaxis(np.asarray(moved)[:, :, 0], -1, 0), order)


def test_layers_that_fit_in_no_way_are_named():
    with pytest.raises(MappingError, match="layer 1 cannot.*2 times its `accumulator.bytes`"):
        mapped(
            layers((8.0, 8.0, 8.0)),
            machines((2.0, 64.0, 64.0), (2.0, 4.0, 64.0), (2.0, 64.0, 64.0)),
        )
    with pytest.raises(MappingError, match="`scratchpad.bytes`: raise that size"):
        mapped(layers((8.0, 8.0, 8.0)), machines((2.0, 64.0, 1.0)))
    with pytest.raises(MappingError, match="layer 0 cannot.*`accumulator.side`"):
        mapped(layers((8.0, 8.0, 8.0)), machines((0.5, 64.0, 64.0)))


def test_main_memory_must_tile_every_loop():
    machine = machines((16.0, 1024.0, 1024.0))
    *inner, outermost = machine.structure.levels
    levels = (*inner, dataclasses.replace(outermost, tiles=("P", "K")))
    structure = dataclasses.replace(machine.structure, levels=levels)
    with pytest.raises(MappingError, match="layer 0 iterates over `C`, which `dram`.*add it"):
        mapped(layers((8.0, 8.0, 8.0)), Machine(sizes=machine.sizes, structure=structure))


@pytest.mark.parametrize(
    ("extents", "words"),
    [
        ((8.0, 2.5, 8.0), "layer 0: `C` must be a whole number from 1 to 16777216, got 2.5"),
        ((8.0, 8.0, 0.0), "layer 0: `K` must be a whole number"),
        ((8.0, float("nan"), 8.0), "layer 0: `C` must be a whole number"),
        ((2.0**24, 2.0**24, 2.0**24), "72 prime factors, at most 64"),
    ],
)
def test_extents_are_whole_and_not_endless(extents: tuple[float, ...], words: str):
    with pytest.raises(MappingError, match=words):
        mapped(layers(extents), machines((16.0, 1024.0, 1024.0)))


def test_unknown_objectives_and_settings_are_refused():
    with pytest.raises(UnknownNameError, match="objective `edq`: did you mean `edp`"):
        map_layers(
            layers(GOLDEN), machines((1.0, 4.0, 2.0)), objective="edq", key=jax.random.key(0)
        )
    with pytest.raises(MappingError, match="`num_starts` must be a whole number of at least 1"):
        MapperSettings(num_starts=0)
    with pytest.raises(MappingError, match="`num_descended` must be a whole number"):
        MapperSettings(num_descended=1.5)  # type: ignore[arg-type]
    with pytest.raises(MappingError, match="`penalty` must be a number of at least 0, got nan"):
        MapperSettings(penalty=float("nan"))
    with pytest.raises(MappingError, match="`learning_rate` must be positive"):
        MapperSettings(learning_rate=0.0)


@pytest.mark.parametrize(
    ("layer", "sizes", "words"),
    [
        (matmul(128.0, 768.0, 768.0), {}, "layers must have one leading axis"),
        (matmul(*jnp.ones((3, 0))), {}, "layers must have one leading axis"),
        (matmul(*jnp.ones((3, 1))), {"side": jnp.ones(2)}, "`side` of the machine has shape"),
        (matmul(*jnp.ones((3, 1))), {"side": jnp.asarray(-16.0)}, "above 0 and finite, got -16"),
        (
            matmul(*jnp.ones((3, 1)), bits=widths(weights=0.0)),
            {},
            "width of `weights` must be above 0 and finite, got 0",
        ),
    ],
)
def test_layers_and_sizes_of_another_shape_or_sign_are_refused(
    layer: Layer, sizes: dict[str, jax.Array], words: str
):
    machine = with_sizes(machine_from_file(load_machine("gemmini")), sizes)
    with pytest.raises(MappingError, match=words):
        map_layers(layer, machine, key=jax.random.key(0))
