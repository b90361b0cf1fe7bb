"""Latency, energy and area of a workload on an accelerator, differentiable in both.

Equations, switches, limits and sources: docs/cost_model.md. Counts are per example; so is the cost.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from codesign import gates
from codesign.errors import UnknownNameError
from codesign.hw.accelerator import CLOCK, Accelerator
from codesign.hw.clock import Clocked
from codesign.hw.engine import (
    EngineCost,
    add_element_energy,
    add_to,
    area_mm2,
    operation_energy_pj,
    standing_pj_per_cycle,
    unit_cycles,
)
from codesign.hw.host import HostCost, Maximum, host_cost, host_mm2
from codesign.hw.lane_chain import lane_latency
from codesign.hw.linear import block_work, end_cost
from codesign.hw.row_stages import row_stalls
from codesign.hw.tiles import tile_fill
from codesign.hw.traffic import add_transfers, attention_writes, spilled_bytes, stream_bytes
from codesign.hw.windows import window_cycles
from codesign.vocabulary import LINEAR_SITES, LINEAR_STAGES
from codesign.workload import Gemm, Workload

Scope = Literal["attention", "end_to_end"]
SCOPES: tuple[Scope, ...] = ("attention", "end_to_end")
_GENERATION_WEIGHTS = "generate_weights"
"""Stream that a machine with storage writes into its memory of weights."""


@struct.dataclass
class Cost:
    """What a workload takes; energies in pJ, times in cycles, areas in mm2.

    Scope `attention` is the attention alone; `end_to_end` adds the linear layers of the blocks and of
    the two ends, on the host in series, or on the machine's own units, where they overlap.

    Attributes:
      unit_energy_pj: Attention by unit, memory and `dram`, `[B, L]`.
      unit_busy_cycles: The same for time, before any overlap, `[B, L]`.
      attention_cycles: Latency of a layer's attention, `[B, L]`.
      block_host: Linear layers of the blocks on the host, `[B, L]`; zero without a host.
      end_host: Linear layers outside the blocks (embed, head) on the host, `[B, E]`.
      block_own: Linear layers of the blocks on the machine's own units, `[B, L]`, keys and values made on
        demand among them; `cycles` is what they add to the latency. Zero where a host takes all.
      end_own: The same outside the blocks, `[B, E]`.
      standing_pj_per_cycle: Drawn in every cycle that is not the host's, scalar; None if nothing is.
      unit_area_mm2: Area by unit and memory, scalars.
      host_area_mm2: Area by part of the host, scalars.
    """

    unit_energy_pj: dict[str, jax.Array]
    unit_busy_cycles: dict[str, jax.Array]
    attention_cycles: jax.Array
    block_host: HostCost
    end_host: HostCost
    block_own: EngineCost
    end_own: EngineCost
    standing_pj_per_cycle: jax.Array | None
    unit_area_mm2: dict[str, jax.Array]
    host_area_mm2: dict[str, jax.Array]

    def latency_cycles(self, scope: Scope) -> jax.Array:
        """Returns cycles per example, `[B]`."""
        cycles = jnp.sum(self.latency_by_layer(scope), axis=1)
        if _has_linear(scope):
            for end in (self.end_host, self.end_own):
                cycles = cycles + jnp.sum(end.cycles, axis=1)
        return cycles

    def energy_pj(self, scope: Scope) -> jax.Array:
        """Returns pJ per example, `[B]`."""
        return sum(self.energy_by_unit(scope).values(), start=jnp.zeros(()))

    def area_mm2(self, scope: Scope) -> jax.Array:
        """Returns mm2, scalar."""
        return sum(self.area_by_unit(scope).values(), start=jnp.zeros(()))

    def latency_by_layer(self, scope: Scope) -> jax.Array:
        """Returns cycles per block, `[B, L]`; the ends stand outside."""
        if not _has_linear(scope):
            return self.attention_cycles
        return self.attention_cycles + self.block_host.cycles + self.block_own.cycles

    def energy_by_layer(self, scope: Scope) -> jax.Array:
        """Returns pJ per block, `[B, L]`; the ends stand outside."""
        parts = list(self.unit_energy_pj.values())
        if _has_linear(scope):
            parts += _host_energy_pj(self.block_host).values()
            parts += self.block_own.energy_pj.values()
        if self.standing_pj_per_cycle is not None:
            own = self.latency_by_layer(scope)
            if _has_linear(scope):
                own = own - self.block_host.cycles
            parts.append(self.standing_pj_per_cycle * own)
        return functools.reduce(jnp.add, parts)

    def energy_by_unit(self, scope: Scope) -> dict[str, jax.Array]:
        """Returns pJ per example by unit, memory, `dram`, part of the host and `standing`, `[B]` each."""
        by_unit = {name: jnp.sum(value, axis=1) for name, value in self.unit_energy_pj.items()}
        if _has_linear(scope):
            if self.host_area_mm2:
                ends = _host_energy_pj(self.end_host)
                for name, value in _host_energy_pj(self.block_host).items():
                    by_unit[name] = jnp.sum(value, axis=1) + jnp.sum(ends[name], axis=1)
            for part in (self.block_own, self.end_own):
                for name, value in part.energy_pj.items():
                    add_to(by_unit, name, jnp.sum(value, axis=1))
        if self.standing_pj_per_cycle is not None:
            own = self.latency_cycles(scope)
            if _has_linear(scope):
                for host in (self.block_host, self.end_host):
                    own = own - jnp.sum(host.cycles, axis=1)
            by_unit["standing"] = self.standing_pj_per_cycle * own
        return by_unit

    def busy_by_unit(self, scope: Scope) -> dict[str, jax.Array]:
        """Returns cycles per example by unit, memory, `dram` and `host`, before any overlap, `[B]` each."""
        by_unit = {name: jnp.sum(value, axis=1) for name, value in self.unit_busy_cycles.items()}
        if _has_linear(scope):
            if self.host_area_mm2:
                by_unit["host"] = jnp.sum(self.block_host.cycles, axis=1)
                by_unit["host"] = by_unit["host"] + jnp.sum(self.end_host.cycles, axis=1)
            for part in (self.block_own, self.end_own):
                for name, value in part.busy_cycles.items():
                    add_to(by_unit, name, jnp.sum(value, axis=1))
        return by_unit

    def area_by_unit(self, scope: Scope) -> dict[str, jax.Array]:
        """Returns mm2 by unit, memory and part of the host, scalars."""
        return self.unit_area_mm2 | (self.host_area_mm2 if _has_linear(scope) else {})


def _has_linear(scope: Scope) -> bool:
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
      AccelTran: section 5, after arXiv 2302.14705.
    """

    def maximum(values: list[jax.Array]) -> jax.Array:
        if smoothness is None or len(values) == 1:
            return functools.reduce(jnp.maximum, values)
        shape = jnp.broadcast_shapes(*(value.shape for value in values))
        stacked = jnp.stack([jnp.broadcast_to(value, shape) for value in values], axis=-1)
        return gates.smooth_max(stacked, smoothness, axis=-1)

    clocked = None
    if CLOCK in accelerator.sizes:
        clocked = Clocked(accelerator)
        accelerator = clocked.accelerator
    structure = accelerator.structure
    storage = structure.storage
    latency = functools.partial(_layer_cycles, accelerator=accelerator, maximum=maximum)
    attention, generation = split_linear_stages(workload)
    busy, energy = _units_work(attention, accelerator)
    written = None
    if storage is None or storage.activations is None:
        transfers = {"dram": stream_bytes(attention, accelerator)}
    else:
        written = attention_writes(workload, accelerator)
        transfers = {
            "dram": spilled_bytes(written.data, accelerator),
            storage.activations: written.data,
        }
        if storage.masks is not None:
            add_to(transfers, storage.masks, written.masks)
    add_transfers(busy, energy, transfers, accelerator)
    add_element_energy(energy, busy, accelerator)
    lanes = None
    if structure.deals_tiles and structure.fills_and_drains:
        lanes = lane_latency(workload, accelerator)

    def at_least(chained: jax.Array, busy: dict[str, jax.Array]) -> jax.Array:
        """Returns a time that contains those of all units; in training the others get slopes too."""
        if smoothness is None:
            return chained
        return maximum([chained, *(jnp.minimum(value, chained) for value in busy.values())])

    if lanes is None:
        attention_cycles = latency(busy, attention)
    else:
        attention_cycles = at_least(lanes.attention, busy)
    nothing = jnp.zeros((1, 1))
    own_busy: dict[str, jax.Array] = {}
    own_energy: dict[str, jax.Array] = {}
    first_load = nothing
    if generation is not None:
        own_busy, own_energy = _units_work(generation, accelerator)
        transfers = {"dram": stream_bytes(generation, accelerator)}
        if storage is not None and _GENERATION_WEIGHTS in generation.streams:
            own = {_GENERATION_WEIGHTS: generation.streams[_GENERATION_WEIGHTS]}
            weights: Workload = generation.replace(streams=own)  # type: ignore[attr-defined]
            transfers[storage.weights] = stream_bytes(weights, accelerator)
        add_transfers(own_busy, own_energy, transfers, accelerator)
    if storage is not None:
        linear = block_work(workload, accelerator, written)
        for parts, added in (
            (own_busy, linear.busy_cycles),
            (own_energy, linear.energy_pj),
        ):
            for name, value in added.items():
                add_to(parts, name, value)
        overlaps = structure.memory_overlaps and structure.fills_and_drains
        if written is not None and overlaps and lanes is None:
            # Nothing computes before the first weights are there.
            is_first = (jnp.arange(attention_cycles.shape[1]) == 0).astype(nothing.dtype)
            first_load = linear.first_load_cycles[:, None] * is_first[None, :]
    block_own = EngineCost(cycles=nothing, busy_cycles=own_busy, energy_pj=own_energy)
    if own_busy:
        together = dict(busy)
        for name, value in own_busy.items():
            add_to(together, name, value)
        if lanes is None:
            whole_cycles = latency(together, workload) + first_load
        else:
            whole_cycles = at_least(lanes.layers, together)
        added_cycles = whole_cycles - attention_cycles
        block_own = block_own.replace(cycles=added_cycles)  # type: ignore[attr-defined]
    end_own = EngineCost(cycles=nothing[:, :0], busy_cycles={}, energy_pj={})
    if storage is not None:
        end_own = end_cost(workload, accelerator, maximum)
        if lanes is not None:
            end_own = end_own.replace(cycles=at_least(lanes.ends, end_own.busy_cycles))  # type: ignore[attr-defined]
    has_host = structure.host is not None
    price = Cost(
        unit_energy_pj=energy,
        unit_busy_cycles=busy,
        attention_cycles=attention_cycles,
        block_host=jax.tree.map(
            lambda part: jnp.sum(part, axis=2),
            _gemm_cost(workload.block_gemms if has_host else {}, accelerator, maximum),
        ),
        end_host=jax.tree.map(
            lambda part: part[:, 0],
            _gemm_cost(workload.end_gemms if has_host else {}, accelerator, maximum),
        ),
        block_own=block_own,
        end_own=end_own,
        standing_pj_per_cycle=standing_pj_per_cycle(accelerator),
        unit_area_mm2=area_mm2(accelerator),
        host_area_mm2=host_mm2(accelerator),
    )
    return price if clocked is None else _at_clock(price, clocked)


def _at_clock(price: Cost, clocked: Clocked) -> Cost:
    """Returns a cost counted in a machine's own cycles in those of its file's clock, at the supply that its clock needs."""
    result: Cost = price.replace(  # type: ignore[attr-defined]
        unit_energy_pj=clocked.energy(price.unit_energy_pj),
        unit_busy_cycles=clocked.all_cycles(price.unit_busy_cycles),
        attention_cycles=clocked.cycles(price.attention_cycles),
        block_host=clocked.host(price.block_host),
        end_host=clocked.host(price.end_host),
        block_own=clocked.engine(price.block_own),
        end_own=clocked.engine(price.end_own),
        standing_pj_per_cycle=clocked.standing(price.standing_pj_per_cycle),
    )
    return result


def split_linear_stages(workload: Workload) -> tuple[Workload, Workload | None]:
    """Returns the attention alone, and what belongs to the linear layers on the machine's own units; None if nothing does.

    That are the operations of `LINEAR_STAGES`, and streams named after them, `<stage>_...`.
    """
    made = {
        name: value
        for name, value in workload.operations.items()
        if name.partition(".")[0] in LINEAR_STAGES
    }
    streams = {
        name: value
        for name, value in workload.streams.items()
        if name.partition("_")[0] in LINEAR_STAGES
    }
    if not made:
        return workload, None

    def without(parts: dict[str, Any], removed: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in parts.items() if name not in removed}

    attention: Workload = workload.replace(  # type: ignore[attr-defined]
        operations=without(workload.operations, made), streams=without(workload.streams, streams)
    )
    generation: Workload = workload.replace(operations=made, streams=streams)  # type: ignore[attr-defined]
    return attention, generation


def _units_work(
    workload: Workload, accelerator: Accelerator
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns cycles and pJ of a workload's operations by unit, `[B, L]`."""
    busy: dict[str, jax.Array] = {}
    for unit in accelerator.structure.units:
        busy |= unit_cycles(unit, workload, accelerator.sizes)
    return busy, operation_energy_pj(workload, accelerator)


def _layer_cycles(
    busy: dict[str, jax.Array], workload: Workload, accelerator: Accelerator, maximum: Maximum
) -> jax.Array:
    """Returns the latency of a layer, `[B, L]`: stages overlap, units inside a stage are chained.

    Args:
      busy: Time by unit and memory, `[B, L]`.
      workload: What they work on.
      accelerator: The machine.
      maximum: Combines times that overlap.
    """
    structure = accelerator.structure
    if structure.moves_windows and structure.fills_and_drains:
        return window_cycles(busy, workload, accelerator, maximum)
    resources = {unit.name: unit.resources for unit in structure.units}
    in_stages = [
        [name for unit in stage for name in resources[unit] if name in busy]
        for stage in structure.stages
    ]
    stages = [maximum([busy[name] for name in stage]) for stage in in_stages if stage]
    piped = {name for stage in in_stages for name in stage}
    memories = [value for name, value in busy.items() if name not in piped]
    if structure.memory_overlaps:
        cycles = maximum([*stages, *memories])
    else:
        cycles = functools.reduce(jnp.add, memories, maximum(stages))
    if not structure.fills_and_drains:
        return cycles
    if structure.index_queue is not None and stages:
        working = [one for one in in_stages if one]
        cycles = cycles + row_stalls(working, busy["dram"], workload, accelerator)
    if structure.moves_tiles:
        return cycles + tile_fill(workload, accelerator) + structure.drain_cycles
    rows = jnp.sum(workload.rows["attention"].queries, axis=2)
    groups = jnp.maximum(rows / structure.rows_at_once, 1.0)
    return cycles + functools.reduce(jnp.add, stages) / groups + structure.drain_cycles


def _gemm_cost(gemms: dict[str, Gemm], accelerator: Accelerator, maximum: Maximum) -> HostCost:
    """Returns the host's cost of dense products in the order of `LINEAR_SITES`, `[B, L, E]`."""
    present = [gemms[site] for site in LINEAR_SITES if site in gemms]
    if not present:
        none = jnp.zeros((1, 1, 0))
        return HostCost(cycles=none, mac_pj=none, sram_pj=none, dram_pj=none)
    return host_cost(present, accelerator, maximum)
