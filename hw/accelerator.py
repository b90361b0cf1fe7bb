"""An accelerator as a pytree: sizes are leaves to differentiate and batch, structure is static."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from codesign import units
from codesign.errors import UnknownNameError
from codesign.hw import energy
from codesign.hw.spec import AcceleratorSpec, Quantity
from codesign.vocabulary import KINDS, matches


@dataclass(frozen=True, kw_only=True)
class UnitStructure:
    """What a unit does; energies per kind are `(constant, product)` as in `energy.operation_pj`."""

    name: str
    serves: tuple[str, ...]
    paced_by: str
    rule: str
    rows: str | None
    has_width: bool
    slice_a: float | None
    slice_b: float | None
    scales_with_bits: bool
    overhead_cycles: float
    reads_b: str | None
    energy_pj: tuple[tuple[str, tuple[float, float]], ...]
    element_mm2: float

    def price(self, kind: str) -> tuple[float, float]:
        """Returns `(constant, product)` in pJ and pJ/bit^2 of a kind of operation."""
        return dict(self.energy_pj)[kind]


@dataclass(frozen=True, kw_only=True)
class BufferStructure:
    """An on-chip memory: preset capacity in byte, energy there in pJ/B, area in mm2/B."""

    name: str
    capacity_bytes: float
    energy_pj_per_byte: float
    mm2_per_byte: float
    follows_query_block: bool


@dataclass(frozen=True, kw_only=True)
class HostStructure:
    """The host's constants: widths in bit, energies in pJ, areas in mm2."""

    bits: float
    multiply_pj: float
    add_pj: float
    sram_pj_per_byte: float
    sram_reference_bytes: float
    scales_with_bits: bool
    prefetches_weights: bool
    mac_mm2: float
    sram_mm2_per_byte: float


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Everything about a machine that is not a size."""

    name: str
    units: tuple[UnitStructure, ...]
    buffers: tuple[BufferStructure, ...]
    stages: tuple[tuple[str, ...], ...]
    drain_cycles: float
    query_block: float
    clock_hz: float
    dram_pj_per_byte: float
    host: HostStructure
    has_separate_storage: bool
    prices_index_lists: bool
    buffer_energy_scales: bool
    memory_overlaps: bool
    fills_and_drains: bool

    def unit_of(self, key: str) -> UnitStructure:
        """Returns the unit that executes an operation.

        Raises:
          UnknownNameError: If no unit does.
        """
        for unit in self.units:
            if matches(key, unit.serves):
                return unit
        raise UnknownNameError(
            f"accelerator `{self.name}` has no unit for operation `{key}`: add it to a unit's "
            "`serves`, or choose a machine made for this mechanism"
        )


@struct.dataclass
class Accelerator:
    """A machine.

    Attributes:
      sizes: Scalars by name: `<unit>.lanes`, `<unit>.width` (elements), `<buffer>.bytes`,
        `query_block` (rows), `dram.bytes_per_cycle`, `host.rows`, `host.cols` (MACs) and
        `host.sram_bytes`. All are positive and in natural units (an optimiser works on their
        logarithms).
      structure: What runs where, what overlaps, and the price of everything; static.
    """

    sizes: dict[str, jax.Array]
    structure: Structure = struct.field(pytree_node=False)


def accelerator_from_spec(spec: AcceleratorSpec) -> Accelerator:
    """Returns the machine of a preset, sizes in the default float dtype.

    Raises:
      PresetError: If an operation served by a unit has no energy.
    """
    sizes = {
        "query_block": spec.pipeline.query_block.value,
        "dram.bytes_per_cycle": spec.dram_bytes_per_cycle,
        "host.rows": spec.host.rows.value,
        "host.cols": spec.host.cols.value,
        "host.sram_bytes": spec.host.sram.base,
    }
    for name, unit in spec.units.items():
        sizes[f"{name}.lanes"] = unit.lanes.value
        if unit.width is not None:
            sizes[f"{name}.width"] = unit.width.value
    for name, memory in spec.memories.items():
        if memory.sized_by == "capacity":
            sizes[f"{name}.bytes"] = memory.capacity.base
    return Accelerator(
        sizes={name: jnp.asarray(value, float) for name, value in sizes.items()},
        structure=_structure(spec),
    )


def spec_with_sizes(spec: AcceleratorSpec, sizes: Mapping[str, float]) -> AcceleratorSpec:
    """Returns the machine with other sizes, named as in `Accelerator.sizes`.

    Where the switch `buffer_energy_scales` is set, a resized buffer's energy per byte follows the
    square root of its capacity, so the file prices it as the cost model does.

    Raises:
      UnknownNameError: If a name is not a size of the machine.
    """
    known = accelerator_from_spec(spec).sizes
    for name in sizes:
        if name not in known:
            raise UnknownNameError(
                f"accelerator `{spec.name}` has no size `{name}`: use one of {', '.join(known)}"
            )
    scales = spec.switches.buffer_energy_scales.value

    def quantity(old: Quantity, base: float | None) -> Quantity:
        if base is None or base == old.base:
            return old
        value = old.value * (base / old.base)
        return Quantity(value=value, unit=old.unit, source=f"Resized; {old.source}")

    block = quantity(spec.pipeline.query_block, sizes.get("query_block"))
    resized_units, memories = {}, {}
    for name, unit in spec.units.items():
        width = unit.width
        if width is not None:
            width = quantity(width, sizes.get(f"{name}.width"))
        lanes = quantity(unit.lanes, sizes.get(f"{name}.lanes"))
        resized_units[name] = unit.model_copy(update={"lanes": lanes, "width": width})
    for name, memory in spec.memories.items():
        target = sizes.get(f"{name}.bytes")
        if memory.sized_by == "query_block":
            target = memory.capacity.base * block.value / spec.pipeline.query_block.value
        capacity = quantity(memory.capacity, target)
        growth = math.sqrt(capacity.base / memory.capacity.base) if scales else 1.0
        spent = quantity(memory.energy, memory.energy.base * growth)
        memories[name] = memory.model_copy(update={"capacity": capacity, "energy": spent})
    bandwidth = sizes.get("dram.bytes_per_cycle")
    if bandwidth is not None:
        bandwidth *= spec.clock_hz
    host = {
        field: quantity(getattr(spec.host, field), sizes.get(f"host.{key}"))
        for field, key in (("rows", "rows"), ("cols", "cols"), ("sram", "sram_bytes"))
    }
    return spec.model_copy(
        update={
            "units": resized_units,
            "memories": memories,
            "pipeline": spec.pipeline.model_copy(update={"query_block": block}),
            "dram": spec.dram.model_copy(
                update={"bandwidth": quantity(spec.dram.bandwidth, bandwidth)}
            ),
            "host": spec.host.model_copy(update=host),
        }
    )


def _unit(spec: AcceleratorSpec, name: str) -> UnitStructure:
    unit = spec.units[name]
    kinds = [kind for kind in KINDS if any(key.endswith(f".{kind}") for key in unit.serves)]
    return UnitStructure(
        name=name,
        serves=unit.serves,
        paced_by=unit.paced_by,
        rule=unit.rule,
        rows=unit.rows,
        has_width=unit.width is not None,
        slice_a=None if unit.slice_a is None else unit.slice_a.value,
        slice_b=None if unit.slice_b is None else unit.slice_b.value,
        scales_with_bits=unit.scaling == "au_scales" and spec.switches.au_scales.value,
        overhead_cycles=0.0 if unit.overhead is None else unit.overhead.value,
        reads_b=unit.reads_b,
        energy_pj=tuple((kind, energy.operation_pj(spec, name, kind)) for kind in kinds),
        element_mm2=energy.element_mm2(spec, name),
    )


def _structure(spec: AcceleratorSpec) -> Structure:
    table, host, switches = spec.energy_table, spec.host, spec.switches
    return Structure(
        name=spec.name,
        units=tuple(_unit(spec, name) for name in spec.units),
        buffers=tuple(
            BufferStructure(
                name=name,
                capacity_bytes=memory.capacity.base,
                energy_pj_per_byte=energy.buffer_pj_per_byte(spec, name),
                mm2_per_byte=energy.buffer_mm2_per_byte(spec, name),
                follows_query_block=memory.sized_by == "query_block",
            )
            for name, memory in spec.memories.items()
        ),
        stages=spec.pipeline.stages,
        drain_cycles=spec.pipeline.drain.value,
        query_block=spec.pipeline.query_block.value,
        clock_hz=spec.clock_hz,
        dram_pj_per_byte=energy.dram_pj_per_byte(spec),
        host=HostStructure(
            bits=host.bits.value,
            multiply_pj=energy.multiply_pj(spec),
            add_pj=energy.add_pj(spec) * host.accumulator.value,
            sram_pj_per_byte=table.sram.value * spec.energy_scale,
            sram_reference_bytes=table.sram_reference.base,
            scales_with_bits=host.scales_with_bits.value,
            prefetches_weights=host.prefetch_weights.value,
            mac_mm2=host.mac_area.value * spec.area_scale,
            sram_mm2_per_byte=host.sram_area.value / units.BYTES_PER_KIB * spec.area_scale,
        ),
        has_separate_storage=switches.separate_storage.value,
        prices_index_lists=switches.index_lists_priced.value,
        buffer_energy_scales=switches.buffer_energy_scales.value,
        memory_overlaps=switches.memory_overlaps.value,
        fills_and_drains=switches.fill_and_drain.value,
    )
