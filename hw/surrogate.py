"""Latency, energy and area of a workload on an accelerator, differentiable in both.

Equations, switches, limits and sources: docs/cost_model.md. Counts are per example; so is the cost.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from codesign import gates, units
from codesign.errors import UnknownNameError
from codesign.hw.accelerator import Accelerator, Structure, UnitStructure
from codesign.hw.host import HostCost, Maximum, ceil, host_cost, host_mm2
from codesign.workload import LINEAR_SITES, Gemm, Operation, RowStatistics, Workload

Scope = Literal["attention", "end_to_end"]
SCOPES: tuple[Scope, ...] = ("attention", "end_to_end")

# How steeply the derivative of "the whole head fits its buffers" falls off around the threshold.
_FIT_EXPONENT = 4


@struct.dataclass
class Cost:
    """What a workload takes; energies in pJ, times in cycles, areas in mm2.

    Scope `attention` is the attention engine alone; `end_to_end` adds the host, in series, with the
    linear layers of the blocks and the two ends.

    Attributes:
      unit_energy_pj: Attention engine by unit, buffer and `dram`, `[B, L]`.
      unit_busy_cycles: The same for time, before any overlap, `[B, L]`.
      attention_cycles: Latency of a layer's attention, `[B, L]`.
      block_host: Linear layers of the blocks, `[B, L]`.
      end_host: Linear layers outside the blocks (embed, head), `[B, E]`.
      unit_area_mm2: Area by unit and buffer, scalars.
      host_area_mm2: Area by part of the host, scalars.
    """

    unit_energy_pj: dict[str, jax.Array]
    unit_busy_cycles: dict[str, jax.Array]
    attention_cycles: jax.Array
    block_host: HostCost
    end_host: HostCost
    unit_area_mm2: dict[str, jax.Array]
    host_area_mm2: dict[str, jax.Array]

    def latency_cycles(self, scope: Scope) -> jax.Array:
        """Returns cycles per example, `[B]`."""
        ends = jnp.sum(self.end_host.cycles, axis=1) if _has_host(scope) else 0.0
        return jnp.sum(self.latency_by_layer(scope), axis=1) + ends

    def energy_pj(self, scope: Scope) -> jax.Array:
        """Returns pJ per example, `[B]`."""
        return sum(self.energy_by_unit(scope).values(), start=jnp.zeros(()))

    def area_mm2(self, scope: Scope) -> jax.Array:
        """Returns mm2, scalar."""
        return sum(self.area_by_unit(scope).values(), start=jnp.zeros(()))

    def latency_by_layer(self, scope: Scope) -> jax.Array:
        """Returns cycles per block, `[B, L]`; the ends stand outside."""
        if not _has_host(scope):
            return self.attention_cycles
        return self.attention_cycles + self.block_host.cycles

    def energy_by_layer(self, scope: Scope) -> jax.Array:
        """Returns pJ per block, `[B, L]`; the ends stand outside."""
        parts = list(self.unit_energy_pj.values())
        if _has_host(scope):
            parts += _host_energy_pj(self.block_host).values()
        return functools.reduce(jnp.add, parts)

    def energy_by_unit(self, scope: Scope) -> dict[str, jax.Array]:
        """Returns pJ per example by unit, buffer, `dram` and part of the host, `[B]` each."""
        by_unit = {name: jnp.sum(value, axis=1) for name, value in self.unit_energy_pj.items()}
        if _has_host(scope):
            ends = _host_energy_pj(self.end_host)
            for name, value in _host_energy_pj(self.block_host).items():
                by_unit[name] = jnp.sum(value, axis=1) + jnp.sum(ends[name], axis=1)
        return by_unit

    def area_by_unit(self, scope: Scope) -> dict[str, jax.Array]:
        """Returns mm2 by unit, buffer and part of the host, scalars."""
        return self.unit_area_mm2 | (self.host_area_mm2 if _has_host(scope) else {})


def _has_host(scope: Scope) -> bool:
    """Whether a scope counts the linear layers."""
    if scope not in SCOPES:
        raise UnknownNameError(f"unknown scope `{scope}`: use one of {', '.join(SCOPES)}")
    return scope == "end_to_end"


def _host_energy_pj(host: HostCost) -> dict[str, jax.Array]:
    return {"host.mac": host.mac_pj, "host.sram": host.sram_pj, "host.dram": host.dram_pj}


def cost(
    workload: Workload, accelerator: Accelerator, *, smoothness: jax.Array | float | None = None
) -> Cost:
    """Returns the cost of a workload.

    Args:
      workload: Counts per example and layer.
      accelerator: The machine; its sizes are differentiable.
      smoothness: Exponent p of the smooth maximum over things that overlap, scalar, > 1; None takes
        the maximum itself, for figures that are reported.

    Raises:
      UnknownNameError: If the machine has no unit or buffer for something in the workload.

    References:
      Energon: docs/cost_model.md, sections 2 and 3, after arXiv 2110.09310 and arXiv 2407.10416.
    """

    def maximum(values: list[jax.Array]) -> jax.Array:
        if smoothness is None or len(values) == 1:
            return functools.reduce(jnp.maximum, values)
        shape = jnp.broadcast_shapes(*(value.shape for value in values))
        stacked = jnp.stack([jnp.broadcast_to(value, shape) for value in values], axis=-1)
        return gates.smooth_max(stacked, smoothness, axis=-1)

    busy = {
        unit.name: cycles
        for unit in accelerator.structure.units
        if (cycles := _unit_cycles(unit, workload, accelerator.sizes)) is not None
    }
    moved_bytes = _stream_bytes(workload, accelerator)
    dram_cycles = moved_bytes / accelerator.sizes["dram.bytes_per_cycle"]
    energy_pj = _operation_energy_pj(workload, accelerator)
    energy_pj["dram"] = moved_bytes * accelerator.structure.dram_pj_per_byte
    return Cost(
        unit_energy_pj=energy_pj,
        unit_busy_cycles=busy | {"dram": dram_cycles},
        attention_cycles=_layer_cycles(busy, dram_cycles, workload, accelerator.structure, maximum),
        block_host=jax.tree.map(
            lambda part: jnp.sum(part, axis=2),
            _gemm_cost(workload.block_gemms, accelerator, maximum),
        ),
        end_host=jax.tree.map(
            lambda part: part[:, 0], _gemm_cost(workload.end_gemms, accelerator, maximum)
        ),
        unit_area_mm2=_unit_mm2(accelerator),
        host_area_mm2=host_mm2(accelerator),
    )


def _floor(x: jax.Array) -> jax.Array:
    """Rounds down; true derivative zero almost everywhere, substituted: 1."""
    return gates.straight_through(jnp.floor(x), x)


def _interpolate(values: list[jax.Array], size: jax.Array) -> jax.Array:
    """Interpolates values given at sizes 1, 2, 4, ... linearly at `size`; 0 at size 0.

    `size` must not exceed the last size given.
    """
    terms = []
    for level, value in enumerate(values):
        ratio = size * 0.5**level
        rising = 2.0 * ratio - 1.0 if level else ratio
        terms.append(value * jnp.maximum(jnp.minimum(2.0 - ratio, rising), 0.0))
    return functools.reduce(jnp.add, terms)


def _segments(rows: RowStatistics, lanes: jax.Array) -> jax.Array:
    """Returns the steps of all rows of a layer, sum of ceil(keys / lanes), `[B, L]`.

    Steps times lanes are interpolated between powers of two, where the result is exact. Rows nearly
    all as long as the longest share one remainder, which interpolation cannot see: they take the
    steps of the longest row, as far as the mean row stays within half a step of it.
    """
    levels = rows.segments.shape[-1]
    lanes = jnp.minimum(lanes, 2.0 ** (levels - 1))
    short = rows.maximum - rows.segments[..., 0] / jnp.maximum(rows.queries, 1.0)
    alike = jnp.maximum(1.0 - 2.0 * short / lanes, 0.0) * rows.queries
    uneven = [
        (rows.segments[..., level] - alike * ceil(rows.maximum * 0.5**level)) * 2.0**level
        for level in range(levels)
    ]
    # Below one lane a key takes several cycles.
    steps = _interpolate(uneven, jnp.maximum(lanes, 1.0)) / lanes
    return jnp.sum(steps + alike * ceil(rows.maximum / lanes), axis=2)


def _shared_fetches(given: jax.Array, queries: jax.Array, block: jax.Array) -> jax.Array:
    """Returns what blocks of `block` queries fetch, `[B, L]`, from what 1, 2, 4, ... do `[B, L, H, G]`.

    Whole blocks fetch the union of `block` queries each, the last one that of the queries left.
    The union of n queries is linear in n between powers of two, where it is chosen such that the
    result is the given one.
    """
    levels = given.shape[-1]
    block = jnp.minimum(block, 2.0 ** (levels - 1))
    queries = jnp.maximum(queries, 1.0)
    unions = [given[..., 0] / queries]
    whole, rest_union = queries, jnp.zeros_like(queries)
    for level in range(1, levels):
        size = 2.0**level
        next_whole = _floor(queries / size)
        # Whether half a block is left over, and how far the rest reaches beyond that half.
        is_odd = whole - 2.0 * next_whole > 0.5
        beyond = (queries - next_whole * size) * (2.0 / size) - 1.0
        share = jnp.where(is_odd, beyond, 0.0)
        below = jnp.where(is_odd, (1.0 - share) * unions[-1], rest_union)
        number = next_whole + share
        has_any = number > 0.0
        union = (given[..., level] - below) / jnp.where(has_any, number, 1.0)
        unions.append(jnp.where(has_any, union, given[..., level]))
        rest_union = below + share * unions[-1]
        whole = next_whole
    blocks = _floor(queries / block)
    rest = jnp.clip(queries - blocks * block, 0.0, 2.0 ** (levels - 1))
    fetched = blocks * _interpolate(unions, block) + _interpolate(unions, rest)
    return jnp.sum(fetched, axis=2)


def _passes(operation: Operation, unit: UnitStructure) -> jax.Array | float:
    """Returns the passes of an operation through sliced multipliers, `[1, L]`."""
    passes: jax.Array | float = 1.0
    for bits, width in (
        (operation.bits_a, unit.slice_a),
        (operation.bits_b, unit.slice_b),
    ):
        if width is not None:
            passes = passes * ceil(bits[..., 0] / width)
            if unit.scales_with_bits:
                passes = passes * (bits[..., 0] / width)
    return passes


def _unit_cycles(
    unit: UnitStructure, workload: Workload, sizes: dict[str, jax.Array]
) -> jax.Array | None:
    """Returns the cycles a unit works on a layer, `[B, L]`; None where the workload feeds it nothing."""
    lanes = sizes[f"{unit.name}.lanes"]
    steps_per_key = ceil(workload.head_dim / sizes[f"{unit.name}.width"]) if unit.has_width else 1.0
    cycles, queries = [], None
    for key, operation in workload.operations.items():
        if not _matches(key, unit.paced_by):
            continue
        if unit.rule == "flat":
            cycles.append(jnp.sum(operation.count, axis=2) / lanes * _passes(operation, unit))
            continue
        rows = workload.rows[key.partition(".")[0] if unit.rows == "filter*" else str(unit.rows)]
        cycles.append(_segments(rows, lanes) * (_passes(operation, unit) * steps_per_key))
        queries = jnp.sum(rows.queries, axis=2)
    if queries is not None and unit.overhead_cycles:
        cycles.append(queries * unit.overhead_cycles)
    return functools.reduce(jnp.add, cycles) if cycles else None


def _matches(key: str, pattern: str) -> bool:
    """Whether `filter0.mac` matches `filter*.mac`."""
    head, star, tail = pattern.partition("*")
    return key == pattern or (bool(star) and key.startswith(head) and key.endswith(tail))


def _layer_cycles(
    busy: dict[str, jax.Array],
    dram_cycles: jax.Array,
    workload: Workload,
    structure: Structure,
    maximum: Maximum,
) -> jax.Array:
    """Returns the latency of attention, `[B, L]`: stages overlap, units inside a stage are chained."""
    stages = [
        maximum([busy[name] for name in stage if name in busy])
        for stage in structure.stages
        if any(name in busy for name in stage)
    ]
    if structure.memory_overlaps:
        cycles = maximum([*stages, dram_cycles])
    else:
        cycles = maximum(stages) + dram_cycles
    if structure.fills_and_drains:
        queries = jnp.maximum(jnp.sum(workload.rows["attention"].queries, axis=2), 1.0)
        cycles = cycles + functools.reduce(jnp.add, stages) / queries + structure.drain_cycles
    return cycles


def _stream_bits(name: str, workload: Workload, structure: Structure) -> jax.Array:
    """Returns bits per element of a stream, `[1, L]`; separate storage fetches kept keys in full."""
    bits = workload.streams[name].bits[..., 0]
    if name == "key_rest" and structure.has_separate_storage:
        for other, stream in workload.streams.items():
            if other.removeprefix("key").isdigit():
                bits = bits + stream.bits[..., 0]
    return bits


def _fits(workload: Workload, accelerator: Accelerator) -> jax.Array | float:
    """Returns 1 where every buffer holds its whole head, else 0, `[B, L]`.

    True derivative zero; substituted: that of 1 / (1 + (needed / capacity)^4), so that a buffer
    just too small is worth enlarging.
    """
    needed: dict[str, jax.Array] = {}
    for stream in workload.streams.values():
        if stream.buffer:
            resident = stream.resident_bits[..., 0] / units.BITS_PER_BYTE
            present = needed.get(stream.buffer)
            needed[stream.buffer] = resident if present is None else jnp.maximum(present, resident)
    fits: jax.Array | float = 1.0
    for name, resident in needed.items():
        if f"{name}.bytes" not in accelerator.sizes:
            raise UnknownNameError(
                f"accelerator `{accelerator.structure.name}` has no buffer `{name}`: add it to "
                "`memories`, or choose a machine made for this mechanism"
            )
        ratio = resident / accelerator.sizes[f"{name}.bytes"]
        square = ratio * ratio
        soft = 1.0 / (1.0 + square * square)
        fits = fits * gates.straight_through(ratio <= 1.0, soft)
    return fits


def _stream_bytes(workload: Workload, accelerator: Accelerator) -> jax.Array:
    """Returns bytes moved from and to main memory, `[B, L]`."""
    moved, by_block = [], []
    for name, stream in workload.streams.items():
        element = _stream_bits(name, workload, accelerator.structure) / units.BITS_PER_BYTE
        sent = stream.vectors * (element * stream.width)[..., None, None]
        if sent.shape[-1] == 1:
            moved.append(jnp.sum(sent[..., 0], axis=2))
        else:
            by_block.append(sent)
    if by_block:
        # Sharing is linear in what is fetched, so all streams are shared at once.
        fetched = functools.reduce(jnp.add, by_block)
        queries = workload.rows["attention"].queries
        shared = _shared_fetches(fetched, queries, accelerator.sizes["query_block"])
        whole_head = jnp.sum(fetched[..., -1], axis=2)
        moved.append(shared + _fits(workload, accelerator) * (whole_head - shared))
    return functools.reduce(jnp.add, moved)


def _operation_energy_pj(workload: Workload, accelerator: Accelerator) -> dict[str, jax.Array]:
    """Returns energy by unit and by the buffer its operands come from, `[B, L]` each."""
    structure = accelerator.structure
    per_byte = {}
    for buffer in structure.buffers:
        per_byte[buffer.name] = jnp.asarray(buffer.energy_pj_per_byte)
        if structure.buffer_energy_scales:
            growth = _buffer_bytes(accelerator)[buffer.name] / buffer.capacity_bytes
            per_byte[buffer.name] = per_byte[buffer.name] * jnp.sqrt(growth)
    energy: dict[str, list[jax.Array]] = {}
    for key, operation in workload.operations.items():
        kind = key.partition(".")[2]
        if kind == "bits" and not structure.prices_index_lists:
            continue
        unit = structure.unit_of(key)
        constant, product = unit.price(kind)
        count = jnp.sum(operation.count, axis=2)
        bits_a, bits_b = operation.bits_a[..., 0], operation.bits_b[..., 0]
        each = constant + product * (bits_a * bits_b) if product else constant
        energy.setdefault(unit.name, []).append(count * each)
        if unit.reads_b is not None and _matches(key, unit.paced_by):
            read_bytes = count * (bits_b / units.BITS_PER_BYTE)
            energy.setdefault(unit.reads_b, []).append(read_bytes * per_byte[unit.reads_b])
    return {name: functools.reduce(jnp.add, parts) for name, parts in energy.items()}


def _buffer_bytes(accelerator: Accelerator) -> dict[str, jax.Array]:
    """Returns the capacity of every buffer, byte."""
    structure, sizes = accelerator.structure, accelerator.sizes
    return {
        buffer.name: sizes["query_block"] * (buffer.capacity_bytes / structure.query_block)
        if buffer.follows_query_block
        else sizes[f"{buffer.name}.bytes"]
        for buffer in structure.buffers
    }


def _gemm_cost(gemms: dict[str, Gemm], accelerator: Accelerator, maximum: Maximum) -> HostCost:
    """Returns the cost of dense products in the order of `LINEAR_SITES`, `[B, L, E]`."""
    present = [gemms[site] for site in LINEAR_SITES if site in gemms]
    if not present:
        none = jnp.zeros((1, 1, 0))
        return HostCost(cycles=none, mac_pj=none, sram_pj=none, dram_pj=none)
    return host_cost(present, accelerator, maximum)


def _unit_mm2(accelerator: Accelerator) -> dict[str, jax.Array]:
    """Returns the area of units and buffers, mm2."""
    sizes = accelerator.sizes
    area = {}
    for unit in accelerator.structure.units:
        elements = sizes[f"{unit.name}.lanes"]
        if unit.has_width:
            elements = elements * sizes[f"{unit.name}.width"]
        area[unit.name] = elements * unit.element_mm2
    capacity = _buffer_bytes(accelerator)
    for buffer in accelerator.structure.buffers:
        area[buffer.name] = capacity[buffer.name] * buffer.mm2_per_byte
    return area
