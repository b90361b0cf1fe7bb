"""The factors of a mapping that may differ from 1, one array each: what a search for mappings changes.

A slot is a level with a loop dimension, in time or in space. Those of the outermost level in time take what the others
leave of a layer, and come last. Arrays have the slots first, then layers N and starts S.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import NDArray

from codesign.hw.gemm.cost import GemmCost, cost, overuse
from codesign.hw.gemm.layer import Layer
from codesign.hw.gemm.machine import Machine, MachineStructure
from codesign.hw.gemm.mapping import Mapping, spread_allowed, tile_allowed

OBJECTIVES = {"edp": "uJ cycle", "energy": "pJ", "latency": "cycle"}
"""What a search lowers, and its unit."""


@dataclass(frozen=True)
class Slots:
    """Slots of layers of these dimensions on a machine.

    Attributes:
      dims: Names of the loop dimensions.
      num_levels: Levels of the machine.
      places: Level, dimension and whether in space, of each slot; the last `len(dims)` are the outermost in time.
    """

    dims: tuple[str, ...]
    num_levels: int
    places: tuple[tuple[int, int, bool], ...]

    @property
    def num_free(self) -> int:
        """Slots that the outermost level does not have to fill."""
        return len(self.places) - len(self.dims)

    @property
    def dim_of(self) -> NDArray[np.int32]:
        """Dimension of each slot, `[G]`."""
        return np.asarray([dim for _, dim, _ in self.places], np.int32)

    def by_dim(self, values: jax.Array) -> jax.Array:
        """Returns sums over the slots of each dimension, `[D, ...]`, of values of the first slots, `[F, ...]`."""
        sums = [jnp.zeros(values.shape[1:], values.dtype) for _ in self.dims]
        for (_, dim, _), value in zip(self.places, values, strict=False):
            sums[dim] = sums[dim] + value
        return jnp.stack(sums)

    def of_dims(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Returns the slots of each dimension, `[D, M]`, filled up with the outermost, and their number, `[D]`."""
        own = [np.flatnonzero(self.dim_of == dim) for dim in range(len(self.dims))]
        width = max(map(len, own))
        table = [np.pad(slots, (0, width - len(slots)), mode="edge") for slots in own]
        return np.stack(table).astype(np.int32), np.asarray([len(slots) for slots in own], np.int32)


def slots_of(structure: MachineStructure, dims: tuple[str, ...]) -> Slots:
    """Returns the slots that a machine offers; the outermost level takes every dimension."""
    spreads, tiles = spread_allowed(structure, dims), tile_allowed(structure, dims)
    outermost = len(structure.levels) - 1
    places = [
        (level, dim, is_spatial)
        for level in range(outermost + 1)
        for is_spatial, allowed in ((False, tiles), (True, spreads))
        for dim in range(len(dims))
        if allowed[level, dim] and (is_spatial or level < outermost)
    ]
    places += [(outermost, dim, False) for dim in range(len(dims))]
    return Slots(dims=dims, num_levels=outermost + 1, places=tuple(places))


@struct.dataclass
class Problem:
    """Layers and machines as a search takes them.

    Attributes:
      layer: Layers with leading axes `[N, 1]`.
      machine: Sizes are scalars or `[N, 1]`.
      primes: Prime factors of the extents of each layer, the largest first, then ones, `[T, N, 1]`.
      prime_dims: Dimension of each, `[T, N, 1]`.
      num_primes: How many are not ones, `[N, 1]`.
      slots: Where they may go; static.
      objective: What is lowered, a key of `OBJECTIVES`; static.
    """

    layer: Layer
    machine: Machine
    primes: jax.Array
    prime_dims: jax.Array
    num_primes: jax.Array
    slots: Slots = struct.field(pytree_node=False)
    objective: str = struct.field(pytree_node=False)

    def plain_order(self, num_starts: int) -> jax.Array:
        """Returns the loops of every level in the order of `dims`, `[L, D, N, S]`."""
        slots, num_layers = self.slots, self.layer.extents.shape[0]
        dims = jnp.arange(len(slots.dims), dtype=jnp.int32)[None, :, None, None]
        return jnp.broadcast_to(dims, (slots.num_levels, len(slots.dims), num_layers, num_starts))

    def mapping(self, factors: jax.Array, order: jax.Array) -> Mapping:
        """Returns mappings from factors `[G, N, S]` and orders `[L, D, N, S]`."""
        slots = self.slots
        one = jnp.ones(factors.shape[1:], factors.dtype)
        grids = {
            side: [[one] * len(slots.dims) for _ in range(slots.num_levels)]
            for side in (False, True)
        }
        for (level, dim, is_spatial), factor in zip(slots.places, factors, strict=True):
            grids[is_spatial][level][dim] = factor

        def last(by_level: list[list[jax.Array]]) -> jax.Array:
            stacked = jnp.stack([jnp.stack(row) for row in by_level])
            return jnp.moveaxis(stacked, (0, 1), (-2, -1))

        temporal, spatial = last(grids[False]), last(grids[True])
        order = jnp.moveaxis(order, (0, 1), (-2, -1))
        return Mapping(temporal=temporal, spatial=spatial, order=order, dims=slots.dims)

    def cost(
        self, mapping: Mapping, smoothness: jax.Array | float | None = None
    ) -> tuple[GemmCost, jax.Array]:
        """Returns the cost of mappings and log2 of the objective, `[N, S]`."""
        price = cost(self.layer, mapping, self.machine, smoothness=smoothness)
        return price, jnp.log2(objective_value(price, self.objective))

    def excess(self, mapping: Mapping) -> dict[str, jax.Array]:
        """Returns by how many powers of two mappings break each limit of the machine, `[N, S]`."""
        limits = overuse(self.layer, mapping, self.machine)
        return {name: excess for name, excess in limits.items() if name != "factors"}

    def score(self, factors: jax.Array, order: jax.Array) -> jax.Array:
        """Returns log2 of the objective, infinite where a limit is broken, `[N, S]`."""
        mapping = self.mapping(factors, order)
        return jnp.where(self.is_legal(mapping), self.cost(mapping)[1], jnp.inf)

    def is_legal(self, mapping: Mapping) -> jax.Array:
        """Returns whether mappings keep all limits of the machine, `[N, S]`."""
        shape = mapping.temporal.shape[:-2]
        kept = [jnp.broadcast_to(excess <= 0.0, shape) for excess in self.excess(mapping).values()]
        return functools.reduce(jnp.logical_and, kept, jnp.ones(shape, bool))


def objective_value(price: GemmCost, objective: str) -> jax.Array:
    """Returns what a search lowers, in the unit of `OBJECTIVES`."""
    match objective:
        case "edp":
            return price.edp
        case "energy":
            return price.total_pj
        case "latency":
            return price.latency_cycles
        case _:
            raise AssertionError(f"`{objective}` is none of {', '.join(OBJECTIVES)}")
