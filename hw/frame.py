"""One frame in which machines of different papers can be compared: node, clock, area, main memory, one table of energies.

A paper's own numbers hold in its own node, with its own fitted factor, and are never mixed with these.

References:
  Rule of the specification of hardware models, section 8.2: energies of Horowitz, "Computing's energy problem", ISSCC 2014
  (recalled), scaled to 28 nm and 1 V; area and bandwidth of SOFA, arXiv 2407.10416, Tables II and IV.
"""

import math

from codesign.hw.quantities import Quantity
from codesign.hw.spec import AcceleratorSpec, load_preset
from codesign.hw.spec_tables import Buffer, Unit

AREA_MM2 = 5.69
"""Core area of every machine, at 28 nm (SOFA, arXiv 2407.10416, Table II)."""
NODE_NM = 28.0
SOURCE = "Rule: common frame"
ADDER_BITS = 16.0
"""Width of the adder that compares or shifts and adds where a file names none: 0.0272 pJ at 28 nm."""
SRAM_BASE_BYTES = 8 * 1024.0
"""Capacity up to which a byte costs the same, 1.25 pJ at the table's node; above, its square root."""
SRAM_PJ = 1.25
TABLE_KINDS = (
    *("mac", "multiply", "add", "shift_add", "compare", "statistic"),
    *("exp", "reciprocal", "divide", "bits"),
)
"""Kinds of operations that the energy table prices."""
OTHER_PJ = {"encode": 0.0264, "evaluate": 0.297, "bytes": 0.0, "element": 0.0528}
"""Prices at the table's node of kinds that it does not: an 8-bit addition, three of 30 bits, a move, one of 16 bits."""


def frame_factor(spec: AcceleratorSpec, *, with_host: bool = True) -> float:
    """Returns by how much a machine's units and memories grow so that it fills the frame's area.

    `k = (5.69 mm2 - host) / A28`, `A28` being the published area over `(node / 28)^2`.

    Args:
      spec: The machine.
      with_host: Whether the host, where the machine has one, is part of the area.
    """
    scaled = spec.operating_point.area.base / (spec.technology.node.value / NODE_NM) ** 2
    return _own_mm2(spec if with_host else None) / scaled


def _own_mm2(spec: AcceleratorSpec | None) -> float:
    """Returns what the default host at 28 nm, where a machine has one, leaves of the area, mm2."""
    host = load_preset("topk").host
    if spec is None or spec.host is None or host is None:
        return AREA_MM2
    macs = host.rows.value * host.cols.value * host.mac_area.base
    return AREA_MM2 - macs - host.sram.base * host.sram_area.base


def multipliers(spec: AcceleratorSpec) -> float:
    """Returns the multipliers in the arrays of a machine's own units; a host's are not among them."""
    elements = spec.processing_elements
    total = 0.0
    for unit in spec.units.values():
        if any(key.endswith(".mac") for key in unit.paces):
            sizes = (unit.lanes, unit.width, unit.per_lane)
            total += math.prod(1.0 if size is None else size.value for size in sizes)
    return total * (1.0 if elements is None else elements.count.value)


def equal_multipliers(spec: AcceleratorSpec) -> AcceleratorSpec:
    """Returns a machine in the common frame but its area: with as many multipliers as SOFA has there."""
    wanted = multipliers(common_frame(load_preset("sofa")))
    return common_frame(spec, factor=wanted / multipliers(spec))


def common_frame(spec: AcceleratorSpec, *, factor: float | None = None) -> AcceleratorSpec:
    """Returns a machine in the common frame.

    Lanes and memories are multiplied by a factor and not rounded; bandwidth is the same for all. Units of
    synthesised blocks are priced by the table, with adders as wide as a product of their operands and eight bits more.
    Reads of operands are priced even where a machine's own figures have absorbed them. Nothing leaks.

    Args:
      spec: The machine.
      factor: By how much it grows; None: `frame_factor`.
    """
    base = load_preset("topk")
    own_mm2 = _own_mm2(spec)
    if factor is None:
        factor = frame_factor(spec)
    else:
        own_mm2 *= factor / frame_factor(spec)
    elements = spec.processing_elements
    growth = 1.0 if elements is not None else factor
    units = {name: _unit(unit, growth) for name, unit in spec.units.items()}
    memories = {name: _memory(memory, factor) for name, memory in spec.memories.items()}
    if elements is not None:
        count = _scaled(elements.count, factor)
        elements = elements.model_copy(update={"count": count, "modules": ()})
    rest = _quantity(base.operating_point.area, own_mm2)
    area = base.area.model_copy(update={"factor": _quantity(base.area.factor, 1.0), "rest": rest})
    frame = spec.model_copy(
        update={
            "name": f"{spec.name} in the common frame",
            "technology": base.technology,
            "modules": {},
            "processing_elements": elements,
            "units": units,
            "memories": memories,
            "dram": base.dram,
            "host": base.host if spec.host is not None else None,
            "energy_table": base.energy_table,
            "energy_factor": _quantity(spec.energy_factor, 1.0),
            "standing_power": None,
            "area": area,
            "estimator": None,
        }
    )
    # A copy is not checked; this is.
    return AcceleratorSpec.model_validate(frame.model_dump())


def _quantity(like: Quantity, value: float) -> Quantity:
    """Returns a number of the frame, in the unit of another one."""
    return like.model_copy(update={"value": value, "source": SOURCE})


def _scaled(old: Quantity, factor: float) -> Quantity:
    return old.model_copy(update={"value": old.value * factor, "source": f"{SOURCE}; {old.source}"})


def _unit(unit: Unit, factor: float) -> Unit:
    """Returns a unit with as many times the lanes, priced by the table; its area is in the machine's."""
    kinds = {key.partition(".")[2] for key in unit.serves}
    prices = {
        kind: price
        for kind, price in unit.energy.items()
        if not unit.modules and kind not in OTHER_PJ
    }
    like = load_preset("energon").units["filter_statistics"].energy["statistic"]
    prices |= {
        kind: _quantity(like, OTHER_PJ[kind])
        for kind in kinds - set(TABLE_KINDS)
        if kind in OTHER_PJ
    }
    accumulator = unit.accumulator
    if accumulator is None:
        width = ADDER_BITS
        if "mac" in kinds:
            slices = [
                16.0 if piece is None else piece.value for piece in (unit.slice_a, unit.slice_b)
            ]
            width = sum(slices) + 8.0
        base = load_preset("topk").units["qk"].accumulator
        assert base is not None
        accumulator = _quantity(base, width)
    area = load_preset("topk").units["softmax"].area
    assert area is not None
    return unit.model_copy(
        update={
            "lanes": _scaled(unit.lanes, factor),
            "modules": (),
            "accumulator": accumulator,
            "reads_absorbed": None,
            "energy": prices,
            "area": _quantity(area, 0.0),
        }
    )


def _memory(memory: Buffer, factor: float) -> Buffer:
    """Returns a memory of as many times the capacity, priced by the table; its area is in the machine's."""
    like = load_preset("topk").memories["key"]
    capacity = _scaled(memory.capacity, factor)
    price = SRAM_PJ * max(1.0, math.sqrt(capacity.base / SRAM_BASE_BYTES))
    return memory.model_copy(
        update={
            "capacity": capacity,
            "energy": _quantity(like.energy, price),
            "energy_at": None,
            "area": _quantity(like.area, 0.0),
            "leakage": None,
        }
    )
