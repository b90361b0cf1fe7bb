"""An accelerator as a pytree: sizes are leaves to differentiate and batch, structure is static."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from codesign.errors import UnknownNameError
from codesign.hw import energy
from codesign.hw.spec import AcceleratorSpec
from codesign.vocabulary import matches


@dataclass(frozen=True, kw_only=True)
class UnitStructure:
    """What a unit does; energies per kind are `(constant, product)` as in `energy.operation_pj`.

    A group of rule `groups` takes `group_rows` rows of a head at a time.
    `per_lane` is the work of a lane per cycle, utilisation included; `issue_rate` what it may start
    in that time, infinite without a bound. `mm2` and leakage are per lane, or per element of its width.
    """

    name: str
    serves: tuple[str, ...]
    paces: tuple[str, ...]
    rule: str
    rows: str | None
    has_width: bool
    per_lane: float
    issue_rate: float
    skips_zeros: bool
    slice_a: float | None
    slice_b: float | None
    scales_with_bits: bool
    overhead_cycles: float
    reads: tuple[tuple[str, str, float], ...]
    groups: int
    group_rows: float
    shares_heads: bool
    energy_pj: tuple[tuple[str, tuple[float, float]], ...]
    leakage_pj_per_cycle: float
    mm2: float
    is_area_per_element: bool

    @property
    def resources(self) -> tuple[str, str]:
        """Names of what takes time in it: executing operations, and starting them."""
        return self.name, f"{self.name}.issue"

    def price(self, kind: str) -> tuple[float, float]:
        """Returns `(constant, product)` in pJ and pJ/bit^2 of a kind of operation."""
        return dict(self.energy_pj)[kind]

    def reads_of(self, key: str) -> list[tuple[str, float]]:
        """Returns from where an operation reads operand b, and how many rows share a read; at most one entry."""
        return [(buffer, rows) for name, buffer, rows in self.reads if matches(key, (name,))]


@dataclass(frozen=True, kw_only=True)
class BufferStructure:
    """An on-chip memory: preset capacity in byte, energy in pJ/B at `energy_at_bytes`, area in mm2/B.

    `bytes_per_cycle` bounds what is written into it, infinite without a bound; leakage is in pJ per
    cycle and byte.
    """

    name: str
    capacity_bytes: float
    energy_at_bytes: float
    energy_pj_per_byte: float
    bytes_per_cycle: float
    leakage_pj_per_cycle: float
    mm2_per_byte: float
    is_sized: bool
    follows_query_block: bool


@dataclass(frozen=True, kw_only=True)
class ElementStructure:
    """Blocks that each processing element has besides its units: pJ per cycle, mm2; and the side of the tiles it takes.

    `tile` is 0 where work is dealt without tiles.
    """

    driven_by: str
    tile: float
    dynamic_pj_per_cycle: float
    leakage_pj_per_cycle: float
    mm2: float


@dataclass(frozen=True, kw_only=True)
class StorageStructure:
    """Names of the memories of a machine that runs the linear layers itself, and its batch."""

    weights: str
    activations: str | None
    masks: str | None
    batch: float
    stores_scores: bool

    @property
    def mask_bits(self) -> float:
        """Mask bits per stored element."""
        return 0.0 if self.masks is None else 1.0


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
    rows_at_once: float
    index_queue: float | None
    query_block: float | None
    clock_hz: float
    threshold_ratio: float | None
    dram_pj_per_byte: float
    standing_pj_per_cycle: float
    rest_mm2: float
    elements: ElementStructure | None
    host: HostStructure | None
    storage: StorageStructure | None
    has_separate_storage: bool
    prices_index_lists: bool
    buffer_energy_scales: bool
    memory_overlaps: bool
    fills_and_drains: bool

    @property
    def moves_tiles(self) -> bool:
        """Whether lanes take a query each, so that tiles of keys move through the stages rather than rows."""
        return any(unit.rule == "blocks" for unit in self.units)

    @property
    def deals_tiles(self) -> bool:
        """Whether lanes of processing elements take tiles of every product, from a memory of the activations."""
        has_memory = self.storage is not None and self.storage.activations is not None
        return has_memory and self.elements is not None and self.elements.tile > 0.0

    @property
    def moves_windows(self) -> bool:
        """Whether groups of lanes take windows of rows, which move through the stages with all their heads."""
        return any(unit.rule == "groups" for unit in self.units)

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
        `dram.bytes_per_cycle`, and what the machine has of `query_block` (rows),
        `processing_elements`, `host.rows`, `host.cols` (MACs) and `host.sram_bytes`. All are
        positive and in natural units (an optimiser works on their logarithms). `clock`, if the file has a threshold
        voltage: over the file's own clock, in whose cycles all times stay.
      structure: What runs where, what overlaps, and the price of everything; static.
    """

    sizes: dict[str, jax.Array]
    structure: Structure = struct.field(pytree_node=False)


CLOCK = "clock"
"""Name of the clock among sizes."""


def accelerator_from_spec(spec: AcceleratorSpec) -> Accelerator:
    """Returns the machine of a preset, sizes in the default float dtype.

    Raises:
      PresetError: If an operation served by a unit has no energy.
    """
    sizes = {"dram.bytes_per_cycle": spec.dram_bytes_per_cycle}
    if spec.technology.threshold is not None:
        sizes[CLOCK] = 1.0
    if spec.pipeline.query_block is not None:
        sizes["query_block"] = spec.pipeline.query_block.value
    if spec.processing_elements is not None:
        sizes["processing_elements"] = spec.processing_elements.count.value
    if spec.host is not None:
        sizes |= {
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


def _unit(spec: AcceleratorSpec, name: str) -> UnitStructure:
    unit = spec.units[name]
    kinds = dict.fromkeys(key.partition(".")[2] for key in unit.serves)
    per_lane = 1.0 if unit.per_lane is None else unit.per_lane.value
    if unit.utilisation is not None:
        per_lane *= unit.utilisation.value
    elements = 1.0 if unit.width is None else unit.width.value
    return UnitStructure(
        name=name,
        serves=unit.serves,
        paces=unit.paces,
        rule=unit.rule,
        rows=unit.rows,
        has_width=unit.width is not None,
        per_lane=per_lane,
        issue_rate=math.inf if unit.issue_rate is None else unit.issue_rate.value,
        skips_zeros=unit.skips_zeros is not None and unit.skips_zeros.value,
        slice_a=None if unit.slice_a is None else unit.slice_a.value,
        slice_b=None if unit.slice_b is None else unit.slice_b.value,
        scales_with_bits=unit.scaling == "au_scales" and spec.switches.au_scales.value,
        overhead_cycles=0.0 if unit.overhead is None else unit.overhead.value,
        reads=tuple((key, read.buffer, read.sharing) for key, read in unit.priced_reads.items()),
        groups=1 if unit.groups is None else int(unit.groups.value),
        group_rows=1.0 if spec.pipeline.rows_at_once is None else spec.pipeline.rows_at_once.value,
        shares_heads=unit.shares_heads is not None and unit.shares_heads.value,
        energy_pj=tuple((kind, energy.operation_pj(spec, name, kind)) for kind in kinds),
        leakage_pj_per_cycle=energy.modules_leakage_pj(spec, unit.modules) / elements,
        mm2=energy.unit_mm2(spec, name),
        is_area_per_element=energy.is_area_per_element(spec, name),
    )


def _buffer(spec: AcceleratorSpec, name: str) -> BufferStructure:
    memory = spec.memories[name]
    leakage = 0.0 if memory.leakage is None else memory.leakage.base
    bandwidth = math.inf if memory.bandwidth is None else memory.bandwidth.base
    return BufferStructure(
        name=name,
        capacity_bytes=memory.capacity.base,
        energy_at_bytes=(memory.energy_at or memory.capacity).base,
        energy_pj_per_byte=energy.buffer_pj_per_byte(spec, name),
        bytes_per_cycle=bandwidth / spec.clock_hz,
        leakage_pj_per_cycle=energy.pj_per_cycle(spec, leakage),
        mm2_per_byte=energy.buffer_mm2_per_byte(spec, name),
        is_sized=memory.sized_by == "capacity",
        follows_query_block=memory.sized_by == "query_block",
    )


def _elements(spec: AcceleratorSpec) -> ElementStructure | None:
    elements = spec.processing_elements
    if elements is None:
        return None
    return ElementStructure(
        driven_by=elements.driven_by,
        tile=0.0 if elements.tile is None else elements.tile.value,
        dynamic_pj_per_cycle=energy.modules_dynamic_pj(spec, elements.modules),
        leakage_pj_per_cycle=energy.modules_leakage_pj(spec, elements.modules),
        mm2=sum(spec.modules[name].area.base for name in elements.modules),
    )


def _host(spec: AcceleratorSpec) -> HostStructure | None:
    host, table = spec.host, spec.energy_table
    if host is None or table is None:
        return None
    return HostStructure(
        bits=host.bits.value,
        multiply_pj=energy.multiply_pj(spec),
        add_pj=energy.add_pj(spec) * host.accumulator.value,
        sram_pj_per_byte=table.sram.value * spec.energy_scale,
        sram_reference_bytes=table.sram_reference.base,
        scales_with_bits=host.scales_with_bits.value,
        prefetches_weights=host.prefetch_weights.value,
        mac_mm2=host.mac_area.base * spec.area_scale,
        sram_mm2_per_byte=host.sram_area.base * spec.area_scale,
    )


def _storage(spec: AcceleratorSpec) -> StorageStructure | None:
    storage = spec.storage
    if storage is None:
        return None
    return StorageStructure(
        weights=storage.weights,
        activations=storage.activations,
        masks=storage.masks,
        batch=storage.batch.value,
        stores_scores=storage.stores_scores.value,
    )


def _structure(spec: AcceleratorSpec) -> Structure:
    switches, block, at_once = spec.switches, spec.pipeline.query_block, spec.pipeline.rows_at_once
    queue = spec.pipeline.index_queue
    standing = 0.0 if spec.standing_power is None else spec.standing_power.base
    return Structure(
        name=spec.name,
        units=tuple(_unit(spec, name) for name in spec.units),
        buffers=tuple(_buffer(spec, name) for name in spec.memories),
        stages=spec.pipeline.stages,
        drain_cycles=spec.pipeline.drain.value,
        rows_at_once=1.0 if at_once is None else at_once.value,
        index_queue=None if queue is None else queue.value,
        query_block=None if block is None else block.value,
        clock_hz=spec.clock_hz,
        threshold_ratio=spec.threshold_ratio,
        dram_pj_per_byte=energy.dram_pj_per_byte(spec),
        standing_pj_per_cycle=energy.pj_per_cycle(spec, standing),
        rest_mm2=0.0 if spec.area.rest is None else spec.area.rest.base,
        elements=_elements(spec),
        host=_host(spec),
        storage=_storage(spec),
        has_separate_storage=switches.separate_storage.value,
        prices_index_lists=switches.index_lists_priced.value,
        buffer_energy_scales=switches.buffer_energy_scales.value,
        memory_overlaps=switches.memory_overlaps.value,
        fills_and_drains=switches.fill_and_drain.value,
    )
