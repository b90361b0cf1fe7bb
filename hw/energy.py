"""Energy and area per operation, byte and element, from an accelerator's tables; plain floats.

Every energy of an operation on operands of `bits_a` and `bits_b` is `constant + product * bits_a *
bits_b`, in pJ: multipliers grow with the product of their operands' widths, adders with their own
width (Horowitz, "Computing's energy problem", ISSCC 2014).
"""

import math

from codesign import units
from codesign.errors import PresetError
from codesign.hw.spec import AcceleratorSpec
from codesign.hw.spec_tables import EnergyTable
from codesign.vocabulary import matches

# The table's multiply is of 8 by 8 bits.
_TABLE_PRODUCT = 64.0


def _table(spec: AcceleratorSpec) -> EnergyTable:
    """Returns the energy table; files that need one were checked to have it."""
    assert spec.energy_table is not None
    return spec.energy_table


def multiply_pj(spec: AcceleratorSpec) -> float:
    """Returns the energy of a multiplier per product of operand widths, pJ/bit^2, at the node."""
    return _table(spec).multiply_8x8.value / _TABLE_PRODUCT * spec.energy_scale


def add_pj(spec: AcceleratorSpec) -> float:
    """Returns the energy of an adder per bit of its width, pJ/bit, at the node."""
    return _table(spec).add_per_bit.value * spec.energy_scale


def pj_per_cycle(spec: AcceleratorSpec, watts: float) -> float:
    """Returns the energy of a power in one cycle, pJ."""
    return watts * units.PJ_PER_J / spec.clock_hz


def modules_dynamic_pj(spec: AcceleratorSpec, names: tuple[str, ...]) -> float:
    """Returns what one each of some blocks draws in a cycle of work, pJ."""
    return sum(pj_per_cycle(spec, spec.modules[name].dynamic.base) for name in names)


def modules_leakage_pj(spec: AcceleratorSpec, names: tuple[str, ...]) -> float:
    """Returns what one each of some blocks leaks in a cycle, pJ."""
    return sum(pj_per_cycle(spec, spec.modules[name].leakage.base) for name in names)


def operation_pj(spec: AcceleratorSpec, unit_name: str, kind: str) -> tuple[float, float]:
    """Returns `(constant, product)` in pJ and pJ/bit^2 of one operation, fitted factor included.

    Units of synthesised blocks share their energy of a cycle among the operations finished in it;
    the others are priced by the energy table.

    Raises:
      PresetError: If the file does not price this kind of operation.
    """
    price = _module_price if spec.units[unit_name].modules else _table_price
    constant, product = price(spec, unit_name, kind)
    factor = spec.energy_factor.value
    return constant * factor, product * factor


def _module_price(spec: AcceleratorSpec, unit_name: str, kind: str) -> tuple[float, float]:
    unit = spec.units[unit_name]
    if kind in unit.energy:
        return unit.energy[kind].value, 0.0
    if kind not in {key.partition(".")[2] for key in unit.paces}:
        raise PresetError(
            f"{spec.name}: `units.{unit_name}.energy.{kind}` is missing: `{kind}` takes none of the "
            "unit's time, so give its energy there (0 if the modules include it)"
        )
    constant, product = modules_dynamic_pj(spec, unit.modules), 0.0
    if kind in ("mac", "shift_add"):
        for name in unit.modules:
            module = spec.modules[name]
            if module.multiplier_share is not None and module.native_bits is not None:
                share = module.multiplier_share.value * pj_per_cycle(spec, module.dynamic.base)
                constant -= share
                product += share / module.native_bits.value**2
    width = 1.0 if unit.width is None else unit.width.value
    finished = width if unit.per_lane is None else width * unit.per_lane.value
    return constant / finished, product / finished


def _table_price(spec: AcceleratorSpec, unit_name: str, kind: str) -> tuple[float, float]:
    unit = spec.units[unit_name]
    table = _table(spec)
    assert unit.accumulator is not None
    adder = add_pj(spec) * unit.accumulator.value
    prices = {
        "mac": (adder, multiply_pj(spec)),
        "multiply": (0.0, multiply_pj(spec)),
        "add": (adder, 0.0),
        "shift_add": (adder, 0.0),
        "compare": (adder, 0.0),
        "statistic": (3.0 * adder, 0.0),
        "exp": (table.exp.value * spec.energy_scale, 0.0),
        "reciprocal": (table.reciprocal.value * spec.energy_scale, 0.0),
        "divide": (table.divide.value * spec.energy_scale, 0.0),
        # Written once and read once.
        "bits": (2.0 * table.sram.value / units.BITS_PER_BYTE * spec.energy_scale, 0.0),
    }
    if kind in unit.energy:
        prices[kind] = (unit.energy[kind].value * spec.energy_scale, 0.0)
    if kind not in prices:
        raise PresetError(
            f"{spec.name}: `units.{unit_name}.energy.{kind}` is missing: the energy table has no "
            f"formula for `{kind}`, so give its energy there"
        )
    return prices[kind]


def reads_pj_per_bit(spec: AcceleratorSpec, unit_name: str, key: str) -> dict[str, float]:
    """Returns the price of operand b of an operation by the memory it is read from, pJ per bit and operation.

    Nothing where the unit names no read of it, or its own energies have that read.
    """
    return {
        read.buffer: stored_pj_per_byte(spec, read.buffer) / (units.BITS_PER_BYTE * read.sharing)
        for pattern, read in spec.units[unit_name].priced_reads.items()
        if matches(key, (pattern,))
    }


def buffer_pj_per_byte(spec: AcceleratorSpec, name: str) -> float:
    """Returns the energy of a byte read from or written to a memory, pJ/B, as fitted.

    It holds at the capacity that the file names, or else at the memory's own.
    """
    return spec.memories[name].energy.base * spec.energy_scale * spec.energy_factor.value


def stored_pj_per_byte(spec: AcceleratorSpec, name: str) -> float:
    """Returns the energy of a byte read from or written to a memory at its own capacity, pJ/B, as fitted."""
    memory, growth = spec.memories[name], 1.0
    if memory.energy_at is not None and spec.switches.buffer_energy_scales.value:
        growth = math.sqrt(memory.capacity.base / memory.energy_at.base)
    return buffer_pj_per_byte(spec, name) * growth


def dram_pj_per_byte(spec: AcceleratorSpec) -> float:
    """Returns the energy of a byte moved from or to main memory, pJ/B."""
    energy = spec.dram.energy
    return energy.value * units.BITS_PER_BYTE if energy.unit == "pJ/bit" else energy.base


def unit_mm2(spec: AcceleratorSpec, unit_name: str) -> float:
    """Returns the area of one lane of a unit, or of one element of a lane's width, mm2, as fitted.

    Which of the two: `is_area_per_element`. Areas of synthesised blocks hold as published; a lane of another width has
    as much more or less of them.
    """
    unit = spec.units[unit_name]
    if unit.area is None:
        width = 1.0 if unit.width is None else unit.width.value
        return sum(spec.modules[name].area.base for name in unit.modules) / width
    return unit.area.value * spec.area_scale * spec.area.factor.value


def is_area_per_element(spec: AcceleratorSpec, unit_name: str) -> bool:
    """Whether a unit's area and leakage are those of an element of a lane's width, else those of a lane."""
    unit = spec.units[unit_name]
    return unit.width is not None and (unit.area is None or unit.area.unit == "mm2/element")


def buffer_mm2_per_byte(spec: AcceleratorSpec, name: str) -> float:
    """Returns the area of a byte of a memory, mm2/B, as fitted."""
    return spec.memories[name].area.base * spec.area_scale * spec.area.factor.value
