"""Mappings of low cost for dense layers on given machines: all layers from many starts in one compiled program.

Descent on relaxed factors, rounding to whole ones, random moves between them; docs/dense_mapper.md says what each does, and
what is not searched.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import NDArray

from codesign.errors import MappingError, UnknownNameError
from codesign.hw.file_faults import near
from codesign.hw.gemm.cost import GemmCost
from codesign.hw.gemm.descent import descend, random_starts, relaxed_factors
from codesign.hw.gemm.layer import Layer
from codesign.hw.gemm.machine import Machine
from codesign.hw.gemm.mapping import Mapping, tile_allowed
from codesign.hw.gemm.moves import improved, rounded, starts_at
from codesign.hw.gemm.slots import OBJECTIVES, Problem, slots_of
from codesign.hw.nest_search import prime_factors

MAX_PRIMES = 64
"""Prime factors of a layer, all extents together: room for 2^64 multiplications."""
MAX_EXTENT = 2**24
"""Whole numbers up to here are exact in float32."""
COMPILER_OPTIONS = {"xla_backend_optimization_level": 1}
"""Compiled in four fifths of the default's time, and no slower."""


@dataclass(frozen=True, kw_only=True)
class MapperSettings:
    """How much is searched; docs/dense_mapper.md has what the defaults reach and other choices do not."""

    # Random starts of each layer; >= 1.
    num_starts: int = 54
    # How many of them, at most, are descended from before they are rounded; >= 1.
    num_descended: int = 18
    # Rounds of descent, at whose beginning the loop orders are chosen again; >= 1.
    descent_rounds: int = 20
    # Steps of Adam in a round; >= 1.
    steps_per_round: int = 3
    # Size of the first steps, in powers of two; > 0.
    learning_rate: float = 0.6
    # What the square of an excess, in powers of two, weighs against a halved objective; >= 0.
    penalty: float = 2.0
    # Rounds of moves, in the second half of which each begins with the better half of the mappings twice; >= 0.
    move_rounds: int = 10
    # Moves that every mapping tries in a round; >= 0.
    moves_per_round: int = 100

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
          MappingError: If a number lies outside.
        """
        counts = ("num_starts", "num_descended", "descent_rounds", "steps_per_round")
        least = dict.fromkeys(counts, 1) | {"move_rounds": 0, "moves_per_round": 0, "penalty": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            is_whole = isinstance(value, int) or name == "penalty"
            # Not below, so that what is no number is named too.
            if not (is_whole and value >= bound):
                kind = "a number" if name == "penalty" else "a whole number"
                raise MappingError(f"`{name}` must be {kind} of at least {bound}, got {value}")
        if not self.learning_rate > 0.0:
            raise MappingError(
                f"`learning_rate` must be positive, got {self.learning_rate}: raise it"
            )


@struct.dataclass
class MappedLayers:
    """What a search found.

    Attributes:
      mapping: The best mapping of each layer, `[N]`: whole factors, within all limits of the machine.
      cost: Its cost, `[N]`, nothing smooth.
      rounded: Objective of every start after rounding, `[N, S]`; the first `num_descended` were descended from.
      reached: Objective of the mappings that are left after the moves, `[N, S]`, often all the same; the least is that of
        `mapping`, as far as single precision goes.
    """

    mapping: Mapping
    cost: GemmCost
    rounded: jax.Array
    reached: jax.Array


def map_layers(
    layer: Layer,
    machine: Machine,
    *,
    objective: str = "edp",
    settings: MapperSettings | None = None,
    key: jax.Array,
) -> MappedLayers:
    """Returns mappings of low EDP, energy or latency.

    A second call with as many layers of the same dimensions compiles nothing. What is found for a layer does not depend on
    those beside it.

    Args:
      layer: Layers `[N]` with whole extents.
      machine: Its sizes are scalars, or `[N]`: a machine for each layer.
      objective: What is lowered, a key of `OBJECTIVES`.
      settings: How much is searched.
      key: Random key; the same one finds the same mappings.

    Raises:
      MappingError: If a layer fits onto its machine in no way, or its extents are no whole numbers.
      UnknownNameError: If there is no such objective.

    References:
      Hong et al., "DOSA", MICRO 2023, arXiv 2509.10702. Differs: the machine is given, moves after the rounding.
    """
    if objective not in tuple(OBJECTIVES):
        raise UnknownNameError(
            f"unknown objective `{objective}`: {near(str(objective), OBJECTIVES)}"
        )
    _check_inputs(layer, machine)
    problem = problem_of(layer, machine, objective)
    _check_limits(problem)
    found: MappedLayers = search(problem, key, settings=settings or MapperSettings())
    return found


def _check_inputs(layer: Layer, machine: Machine) -> None:
    """Does nothing if layers have one leading axis, sizes fit it, and sizes and widths are above 0.

    Raises:
      MappingError: If not.
    """
    if layer.extents.ndim != 2 or not len(layer.extents):
        raise MappingError(
            f"layers must have one leading axis, got extents of shape {tuple(layer.extents.shape)}: give their sizes as "
            "arrays, `matmul(jnp.array([128.0]), ...)`"
        )
    number = len(layer.extents)
    named = {f"`{name}` of the machine": size for name, size in machine.sizes.items()}
    named |= {f"width of `{name}`": width for name, width in layer.bits.items()}
    for name, value in named.items():
        values = np.asarray(value, float)
        if values.ndim > 1 or values.size not in (1, number):
            raise MappingError(
                f"{name} has shape {values.shape} beside {number} layers: give a scalar, or one for each"
            )
        wrong = np.atleast_1d(values)[~np.atleast_1d((values > 0.0) & (values < np.inf))]
        if len(wrong):
            raise MappingError(f"{name} must be above 0 and finite, got {wrong[0]:g}: change it")


def problem_of(layer: Layer, machine: Machine, objective: str) -> Problem:
    """Returns what a search takes.

    Raises:
      MappingError: If extents are no whole numbers from 1 on, or too large.
    """
    dtype = jnp.result_type(float)
    primes, dims, numbers = _prime_table(np.asarray(layer.extents), layer.dims)

    def beside_starts(values: jax.Array) -> jax.Array:
        values = jnp.asarray(values, dtype)
        return values[:, None] if values.ndim else values

    columns = Layer(
        extents=jnp.asarray(layer.extents, dtype)[:, None],
        stride=jnp.asarray(layer.stride, dtype)[:, None],
        bits={name: beside_starts(width) for name, width in layer.bits.items()},
        dims=layer.dims,
    )
    sizes = {name: beside_starts(size) for name, size in machine.sizes.items()}
    return Problem(
        layer=columns,
        machine=Machine(sizes=sizes, structure=machine.structure),
        primes=jnp.asarray(primes, dtype),
        prime_dims=jnp.asarray(dims),
        num_primes=jnp.asarray(numbers),
        slots=slots_of(machine.structure, layer.dims),
        objective=objective,
    )


def _prime_table(
    extents: NDArray[np.floating], dims: tuple[str, ...]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Returns prime factors, the largest first, and their dimensions, `[T, N, 1]`, and how many there are, `[N, 1]`."""
    is_whole = (extents >= 1) & (extents <= MAX_EXTENT) & (extents == np.floor(extents))
    if not np.all(is_whole):
        row, dim = np.argwhere(~is_whole)[0]
        raise MappingError(
            f"layer {row}: `{dims[dim]}` must be a whole number from 1 to {MAX_EXTENT}, got {extents[row, dim]:g}: "
            "round or split it"
        )
    values, place = np.unique(extents, return_inverse=True)
    found = [prime_factors(int(value)) for value in values]
    width = max(map(len, found), default=0)
    table = np.asarray([own + [1] * (width - len(own)) for own in found], np.int32)
    primes = table[place.reshape(extents.shape)].reshape(len(extents), -1)
    of_dims = np.broadcast_to(np.repeat(np.arange(len(dims)), width), primes.shape)
    largest_first = np.argsort(-primes, axis=1, kind="stable")
    numbers = np.sum(primes > 1, axis=1)
    if numbers.max(initial=0) > MAX_PRIMES:
        row = int(numbers.argmax())
        raise MappingError(
            f"layer {row}: its extents have {numbers[row]} prime factors, at most {MAX_PRIMES} are searched: split it"
        )
    tables = []
    for values_of, filler in ((primes, 1), (of_dims, 0)):
        ordered = np.take_along_axis(values_of, largest_first, axis=1)[:, :MAX_PRIMES]
        room = MAX_PRIMES - ordered.shape[1]
        padded = np.pad(ordered, ((0, 0), (0, room)), constant_values=filler)
        tables.append(padded.T[..., None].astype(np.int32))
    return tables[0], tables[1], numbers[:, None].astype(np.int32)


def _check_limits(problem: Problem) -> None:
    """Does nothing if one iteration of every layer fits: larger tiles need more.

    Raises:
      MappingError: If not; names the layer and the limit.
    """
    structure, dims = problem.machine.structure, problem.layer.dims
    outermost = structure.levels[-1]
    is_refused = ~tile_allowed(structure, dims)[-1] & (np.asarray(problem.layer.extents[:, 0]) > 1)
    if np.any(is_refused):
        row, dim = np.argwhere(is_refused)[0]
        raise MappingError(
            f"layer {row} iterates over `{dims[dim]}`, which `{outermost.name}`, the outermost level of machine "
            f"`{structure.name}`, does not tile: add it to its `tiles`"
        )
    for name, excess in excess_of_one(problem).items():
        over = np.broadcast_to(np.asarray(excess), (len(problem.layer.extents), 1))[:, 0]
        # Not at most, so that sizes that are no numbers are named too.
        if not np.all(over <= 0.0):
            row = int(np.argmin(over <= 0.0))
            raise MappingError(
                f"layer {row} cannot be mapped onto machine `{structure.name}`: one iteration alone takes "
                f"{2.0 ** over[row]:.3g} times its `{name}`: raise that size"
            )


@jax.jit
def excess_of_one(problem: Problem) -> dict[str, jax.Array]:
    """Returns by how many powers of two a single iteration of each layer breaks each limit, `[N, 1]`."""
    shape = (len(problem.slots.places), *problem.layer.extents.shape[:2])
    factors = jnp.ones(shape, problem.primes.dtype)
    return problem.excess(problem.mapping(factors, problem.plain_order(1)))


@functools.partial(jax.jit, static_argnames="settings", compiler_options=COMPILER_OPTIONS)
def search(problem: Problem, key: jax.Array, *, settings: MapperSettings) -> MappedLayers:
    """Returns what a search finds."""
    start_key, move_key = jax.random.split(key)
    starts = random_starts(problem, settings.num_starts, key=start_key)
    logs, order = relaxed_factors(problem, starts)[1], problem.plain_order(settings.num_starts)
    descended = descend(
        problem,
        starts[..., : settings.num_descended],
        num_rounds=settings.descent_rounds,
        steps_per_round=settings.steps_per_round,
        learning_rate=settings.learning_rate,
        penalty=settings.penalty,
    )
    logs, order = (
        jnp.concatenate([new, old[..., settings.num_descended :]], axis=-1)
        for new, old in zip(descended, (logs, order), strict=True)
    )
    placed = rounded(problem, logs, order)
    before = problem.score(placed.factors, placed.order)
    placed, reached = improved(
        problem,
        placed,
        before,
        num_rounds=settings.move_rounds,
        moves_per_round=settings.moves_per_round,
        key=move_key,
    )
    best = jnp.argmin(reached, axis=1, keepdims=True)
    mapping = problem.mapping(starts_at(placed.factors, best), starts_at(placed.order, best))
    price = problem.cost(mapping)[0]
    return MappedLayers(
        mapping=jax.tree.map(lambda leaf: leaf[:, 0], mapping),
        cost=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, best.shape)[:, 0], price),
        rounded=jnp.exp2(before),
        reached=jnp.exp2(reached),
    )
