"""Files of machines with other sizes: the same prices and the same physics as the cost model of resized machines.

`Accelerator` prices sizes as they are trained; this writes what was trained as a file again, which must cost the same.
"""

import math
from collections.abc import Mapping

from codesign.errors import UnknownNameError
from codesign.hw.accelerator import CLOCK, accelerator_from_spec
from codesign.hw.quantities import Quantity
from codesign.hw.spec import AcceleratorSpec
from codesign.hw.spec_tables import Buffer, Module, Unit
from codesign.hw.supply import supply_ratio


def spec_with_sizes(spec: AcceleratorSpec, sizes: Mapping[str, float]) -> AcceleratorSpec:
    """Returns the machine with other sizes, named as in `Accelerator.sizes`.

    Where the switch `buffer_energy_scales` is set, a resized buffer's energy per byte follows the
    square root of its capacity, so the file prices it as the cost model does. Synthesised blocks of a
    lane grow with its width, so that an element's energy and area stay what they are.

    Raises:
      UnknownNameError: If a name is not a size of the machine.
    """
    known = accelerator_from_spec(spec).sizes
    for name in sizes:
        if name not in known:
            raise UnknownNameError(
                f"accelerator `{spec.name}` has no size `{name}`: use one of {', '.join(known)}"
            )
    block = own = spec.pipeline.query_block
    growth_of_block = 1.0
    if own is not None:
        block = _resized(own, sizes.get("query_block"))
        growth_of_block = block.base / own.base
    units, modules = _units(spec, sizes)
    bandwidth = sizes.get("dram.bytes_per_cycle")
    if bandwidth is not None:
        bandwidth *= spec.clock_hz
    elements, host = spec.processing_elements, spec.host
    if elements is not None:
        count = _resized(elements.count, sizes.get("processing_elements"))
        elements = elements.model_copy(update={"count": count})
    if host is not None:
        resized = {
            field: _resized(getattr(host, field), sizes.get(f"host.{key}"))
            for field, key in (("rows", "rows"), ("cols", "cols"), ("sram", "sram_bytes"))
        }
        host = host.model_copy(update=resized)
    with_all = spec.model_copy(
        update={
            "units": units,
            "modules": modules,
            "processing_elements": elements,
            "memories": _memories(spec, sizes, growth_of_block),
            "pipeline": spec.pipeline.model_copy(update={"query_block": block}),
            "dram": spec.dram.model_copy(
                update={"bandwidth": _resized(spec.dram.bandwidth, bandwidth)}
            ),
            "host": host,
        }
    )
    clock = sizes.get(CLOCK, 1.0)
    return with_all if clock == 1.0 else _clocked(with_all, clock)


def _resized(old: Quantity, base: float | None) -> Quantity:
    """Returns a quantity with another value, given in base units; None leaves it."""
    if base is None or base == old.base:
        return old
    value = old.value * (base / old.base)
    return Quantity(value=value, unit=old.unit, source=f"Resized; {old.source}")


def _units(
    spec: AcceleratorSpec, sizes: Mapping[str, float]
) -> tuple[dict[str, Unit], dict[str, Module]]:
    """Returns units with their lanes and widths, and the blocks they consist of, which grow with the width."""
    units, modules = {}, dict(spec.modules)
    for name, unit in spec.units.items():
        width, blocks = unit.width, unit.modules
        if width is not None:
            own = width.value
            width = _resized(width, sizes.get(f"{name}.width"))
            ratio = width.value / own
            if ratio != 1.0 and blocks:
                blocks = tuple(f"{name}.{block}" for block in blocks)
                modules |= {
                    new: spec.modules[old].model_copy(
                        update={
                            field: _resized(part, part.base * ratio)
                            for field in ("area", "dynamic", "leakage")
                            if (part := getattr(spec.modules[old], field)).base
                        }
                    )
                    for new, old in zip(blocks, unit.modules, strict=True)
                }
        lanes = _resized(unit.lanes, sizes.get(f"{name}.lanes"))
        changes = {"lanes": lanes, "width": width, "modules": blocks}
        units[name] = unit.model_copy(update=changes)
    return units, modules


def _memories(
    spec: AcceleratorSpec, sizes: Mapping[str, float], growth_of_block: float
) -> dict[str, Buffer]:
    """Returns memories with their capacities and what a byte then costs."""
    memories = {}
    for name, memory in spec.memories.items():
        target = sizes.get(f"{name}.bytes")
        if memory.sized_by == "query_block":
            target = memory.capacity.base * growth_of_block
        capacity = _resized(memory.capacity, target)
        growth = 1.0
        # Where the file says at which capacity its price holds, the price stays.
        if spec.switches.buffer_energy_scales.value and memory.energy_at is None:
            growth = math.sqrt(capacity.base / memory.capacity.base)
        spent = _resized(memory.energy, memory.energy.base * growth)
        memories[name] = memory.model_copy(update={"capacity": capacity, "energy": spent})
    return memories


def _clocked(spec: AcceleratorSpec, clock: float) -> AcceleratorSpec:
    """Returns the machine at another clock and the supply that it needs; main memory's bytes per second stay.

    Args:
      spec: The machine.
      clock: The clock over its own.
    """
    assert spec.threshold_ratio is not None
    supply = float(supply_ratio(clock, spec.threshold_ratio))
    dynamic = supply * supply

    def scaled(old: Quantity, factor: float) -> Quantity:
        return _resized(old, old.base * factor) if old.base else old

    technology = spec.technology.model_copy(
        update={
            "clock": scaled(spec.technology.clock, clock),
            "supply": scaled(spec.technology.supply, supply),
        }
    )
    modules = {
        name: module.model_copy(
            update={
                # Power of work: every cycle takes the square of the supply.
                "dynamic": scaled(module.dynamic, clock * dynamic),
                "leakage": scaled(module.leakage, supply),
            }
        )
        for name, module in spec.modules.items()
    }
    # What a table prices follows the supply by itself (`energy_scale`).
    priced = dynamic if spec.energy_table is None else 1.0
    unit_changes = {
        name: {"energy": {kind: scaled(one, priced) for kind, one in unit.energy.items()}}
        for name, unit in spec.units.items()
    }
    memories = {}
    for name, memory in spec.memories.items():
        changes: dict[str, Quantity] = {"energy": scaled(memory.energy, priced)}
        if memory.bandwidth is not None:
            changes["bandwidth"] = scaled(memory.bandwidth, clock)
        if memory.leakage is not None:
            changes["leakage"] = scaled(memory.leakage, supply)
        memories[name] = memory.model_copy(update=changes)
    standing = spec.standing_power
    return spec.model_copy(
        update={
            "technology": technology,
            "modules": modules,
            "units": {
                name: unit.model_copy(update=unit_changes[name])
                for name, unit in spec.units.items()
            },
            "memories": memories,
            "standing_power": None if standing is None else scaled(standing, supply),
        }
    )
