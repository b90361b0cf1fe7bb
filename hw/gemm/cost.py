"""Accesses, latency and energy of dense layers with given mappings, differentiable in factors, sizes and widths.

Equations, switches and a worked example: docs/dense_layers.md.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from codesign import gates, units
from codesign.hw.gemm import counting
from codesign.hw.gemm.layer import Layer
from codesign.hw.gemm.machine import KIB, Machine, MachineStructure
from codesign.hw.gemm.mapping import Mapping
from codesign.hw.gemm.names import (
    ACCUMULATE,
    DRAIN,
    INPUTS,
    OUTPUTS,
    PARTIAL,
    READ,
    UPDATE,
    WEIGHTS,
    WRITE,
)
from codesign.hw.gemm.reuse import (
    Nest,
    exchanged_tiles,
    filled_words,
    instances_in_use,
    multicast,
    nest_of,
    product,
    tile_words,
)

MULTIPLIERS = "multipliers"
"""Name of the array among the levels of times and energies."""


@struct.dataclass
class GemmCost:
    """What layers take, `[...]` each, by level and, of the array, `multipliers`.

    Attributes:
      accesses: Words of a level by `tensor.kind` (`codesign.hw.gemm.names.ACCESSES`).
      busy_cycles: Time of each, all else being free.
      energy_pj: Energy of each.
      latency_cycles: They all overlap: the largest time, smooth in training.
    """

    accesses: dict[str, dict[str, jax.Array]]
    busy_cycles: dict[str, jax.Array]
    energy_pj: dict[str, jax.Array]
    latency_cycles: jax.Array

    @property
    def total_pj(self) -> jax.Array:
        """Energy, pJ, `[...]`."""
        return functools.reduce(jnp.add, self.energy_pj.values())

    @property
    def edp(self) -> jax.Array:
        """Energy times latency, uJ cycle, `[...]`."""
        return self.total_pj / units.PJ_PER_UJ * self.latency_cycles


def cost(
    layer: Layer,
    mapping: Mapping,
    machine: Machine,
    *,
    smoothness: jax.Array | float | None = None,
) -> GemmCost:
    """Returns the cost of layers with their mappings.

    Args:
      layer: Layers `[...]`.
      mapping: Their mappings, with the same leading axes.
      machine: Its sizes are scalars or have the rank of the leading axes.
      smoothness: Exponent p of the smooth maximum over levels and array, scalar, > 1; None takes the maximum itself, for
        figures that are reported.

    References:
      Hong et al., "DOSA", MICRO 2023, arXiv 2509.10702. Differs: widths of operands and sums, any number of levels, smooth
      maximum, partial tiles, sliding windows.
    """
    structure = machine.structure
    switches = structure.switches
    nest = nest_of(layer, mapping, whole=switches.whole_steps, slides=switches.sliding_window)
    accesses = _accesses(nest, structure)
    busy = {MULTIPLIERS: _array_cycles(nest, machine)}
    energy = {MULTIPLIERS: layer.macs * _mac_pj(layer, structure)}
    for place, level in enumerate(structure.levels):
        priced = {
            name: words
            for name, words in accesses[level.name].items()
            if name not in level.unpriced
        }
        if not priced:
            continue
        rate = _words_per_cycle(nest, machine, place)
        if rate is not None:
            busy[level.name] = functools.reduce(jnp.add, priced.values()) / rate
        if switches.whole_blocks and level.block_words > 1.0:
            block = level.block_words
            priced = {name: counting.ceil(words / block) * block for name, words in priced.items()}
        energy[level.name] = functools.reduce(jnp.add, priced.values()) * machine.access_pj(place)
    latency = _maximum(list(busy.values()), smoothness)
    if switches.whole_cycles:
        latency = counting.ceil(latency)
    return GemmCost(accesses=accesses, busy_cycles=busy, energy_pj=energy, latency_cycles=latency)


def _maximum(values: list[jax.Array], smoothness: jax.Array | float | None) -> jax.Array:
    if smoothness is None:
        return functools.reduce(jnp.maximum, values)
    stacked = jnp.stack(jnp.broadcast_arrays(*values), axis=-1)
    return gates.smooth_max(stacked, smoothness, axis=-1)


def _accesses(nest: Nest, structure: MachineStructure) -> dict[str, dict[str, jax.Array]]:
    """Returns words of each level by `tensor.kind`."""
    slots = product([nest.repeats(t) for times in nest.temporal for t in times])
    slots = slots * instances_in_use(nest, -1)
    words: dict[str, dict[str, jax.Array]] = {level.name: {} for level in structure.levels}
    for tensor in (WEIGHTS, INPUTS):
        bits, filled, below = nest.layer.bits[tensor], slots, -1
        places = structure.holders(tensor)
        for place in places:
            level = structure.levels[place]
            per_word = bits / level.word_bits
            served = filled / multicast(nest, tensor, below, place)
            words[level.name][f"{tensor}.{READ}"] = served * per_word
            if place != places[-1]:
                filled = filled_words(nest, tensor, place)
                words[level.name][f"{tensor}.{WRITE}"] = filled * per_word
            below = place
    for name, kinds in _result_accesses(nest, structure, slots).items():
        words[name] |= kinds
    return words


def _result_accesses(
    nest: Nest, structure: MachineStructure, slots: jax.Array
) -> dict[str, dict[str, jax.Array]]:
    """Returns words of the results and their partial sums by level and kind.

    Each level adds what comes from below to what it has, the first time to nothing. The outermost one keeps the finished
    results, which have a width of their own.
    """
    switches, bits = structure.switches, nest.layer.bits
    finished = nest.layer.num_outputs
    places = structure.holders(OUTPUTS)
    leaving, below = slots, -1
    words = {}
    for place in places:
        level = structure.levels[place]
        is_innermost, is_outermost = place == places[0], place == places[-1]
        keeps_width = is_innermost or switches.partial_sums_spill_in_full
        per_sum = bits[PARTIAL if keeps_width else OUTPUTS] / level.word_bits
        updates = leaving / multicast(nest, OUTPUTS, below, place)
        added = updates if switches.first_partial_sum_read else updates - finished
        kinds = {UPDATE: updates * per_sum, ACCUMULATE: added * per_sum}
        if is_outermost:
            kinds[UPDATE] = (updates - finished) * per_sum
            kinds[UPDATE] += finished * (bits[OUTPUTS] / level.word_bits)
        else:
            leaving = filled_words(nest, OUTPUTS, place)
            kinds[DRAIN] = leaving * per_sum
        words[level.name] = {f"{OUTPUTS}.{kind}": value for kind, value in kinds.items()}
        below = place
    return words


def _words_per_cycle(nest: Nest, machine: Machine, place: int) -> jax.Array | None:
    """Returns the bandwidth of a level, words per cycle; None without a limit."""
    level = machine.structure.levels[place]
    if level.rate_per is None:
        return None
    rate = machine.sizes[f"{level.name}.words_per_cycle"]
    if level.rate_per == "instance":
        return rate * instances_in_use(nest, place)
    if level.rate_per == "child" and level.fanout is not None:
        return rate * machine.sizes[level.fanout]
    return rate


def _mac_pj(layer: Layer, structure: MachineStructure) -> jax.Array:
    """Returns the energy of a multiplication with its addition, pJ."""
    multiplier = structure.multiplier
    return multiplier.constant_pj + multiplier.product_pj * (
        layer.bits[WEIGHTS] * layer.bits[INPUTS]
    )


def _array_cycles(nest: Nest, machine: Machine) -> jax.Array:
    """Returns the cycles of the array: one step each, times the passes of wide operands, and fill and drain."""
    structure, bits = machine.structure, nest.layer.bits
    multiplier, switches = structure.multiplier, structure.switches
    steps = product([nest.repeats(t) for times in nest.temporal for t in times])
    passes = counting.operand_passes(bits[INPUTS], bits[WEIGHTS], multiplier.bits)
    if switches.fill_and_drain and structure.exchange is not None:
        exchange = structure.exchange
        cycles = exchange.constant + sum(
            per * (machine.sizes[side] - 1.0) for side, per in exchange.cycles
        )
        tiles = exchanged_tiles(
            nest, exchange.stationary, structure.holders(exchange.stationary)[0]
        )
        busy = counting.systolic_cycles(
            tiles, steps / tiles, passes, cycles, prefetches=switches.prefetch_weights
        )
    else:
        busy = steps * passes
    if multiplier.scales_with_bits:
        busy = counting.narrowed(busy, passes, bits[INPUTS], bits[WEIGHTS], multiplier.bits)
    return busy


def used_bytes(layer: Layer, mapping: Mapping, structure: MachineStructure) -> dict[str, jax.Array]:
    """Returns what an instance of each sized level must hold, byte, `[...]`."""
    nest = nest_of(layer, mapping, whole=False, slides=False)
    used = {}
    for place, level in enumerate(structure.levels):
        if level.is_sized:
            bits = [
                tile_words(nest, tensor, place) * _held_bits(layer, structure, tensor, place)
                for tensor in level.holds
            ]
            used[level.name] = functools.reduce(jnp.add, bits) / units.BITS_PER_BYTE
    return used


def _held_bits(layer: Layer, structure: MachineStructure, tensor: str, place: int) -> jax.Array:
    """Returns the width at which a level holds a tensor, bit."""
    if tensor != OUTPUTS:
        return layer.bits[tensor]
    is_innermost = place == structure.holders(OUTPUTS)[0]
    keeps_width = is_innermost or structure.switches.partial_sums_spill_in_full
    return layer.bits[PARTIAL if keeps_width else OUTPUTS]


def required_sizes(
    layer: Layer, mapping: Mapping, structure: MachineStructure
) -> dict[str, jax.Array]:
    """Returns the smallest sides and memories that hold every layer of the last leading axis, `[...]` without it.

    References:
      Hong et al., "DOSA", MICRO 2023, arXiv 2509.10702 (hardware derived from mappings).
    """
    sizes = dict[str, jax.Array]()
    for side, least in structure.least_sides:
        fed = [
            jnp.max(jnp.prod(mapping.spatial[..., place, :], axis=-1), axis=-1)
            for place, level in enumerate(structure.levels)
            if level.fanout == side
        ]
        sizes[side] = functools.reduce(jnp.maximum, fed, jnp.asarray(least, float))
    machine = Machine(sizes=sizes, structure=structure)
    for name, used in used_bytes(layer, mapping, structure).items():
        sizes[f"{name}.bytes"] = jnp.max(used, axis=-1) * machine.instances(structure.index(name))
    return sizes


def overuse(layer: Layer, mapping: Mapping, machine: Machine) -> dict[str, jax.Array]:
    """Returns by how many powers of two a mapping breaks each limit, `[...]`, at most 0 where it keeps it.

    Limits: bytes of a memory, the side that a level feeds, and factors of at least 1 (`factors`).
    """
    structure = machine.structure
    excess = {}
    for name, used in used_bytes(layer, mapping, structure).items():
        capacity = machine.kib_of_instance(structure.index(name)) * KIB
        excess[f"{name}.bytes"] = jnp.log2(used / capacity)
    for place, level in enumerate(structure.levels):
        if level.fanout is not None:
            sides = jnp.prod(mapping.spatial[..., place, :], axis=-1)
            excess[f"{level.name}.{level.fanout}"] = jnp.log2(sides / machine.sizes[level.fanout])
    smallest = jnp.minimum(mapping.temporal, mapping.spatial)
    excess["factors"] = -jnp.log2(jnp.min(smallest, axis=(-2, -1)))
    return excess
