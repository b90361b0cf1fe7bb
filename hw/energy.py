"""Energy and area per operation, byte and element, from an accelerator's tables; plain floats.

Every energy of an operation on operands of `bits_a` and `bits_b` is `constant + product * bits_a *
bits_b`, in pJ: multipliers grow with the product of their operands' widths, adders with their own
width (Horowitz, "Computing's energy problem", ISSCC 2014).
"""

from codesign import units
from codesign.errors import PresetError
from codesign.hw.spec import AcceleratorSpec

# The table's multiply is of 8 by 8 bits.
_TABLE_PRODUCT = 64.0


def multiply_pj(spec: AcceleratorSpec) -> float:
    """Returns the energy of a multiplier per product of operand widths, pJ/bit^2, at the node."""
    return spec.energy_table.multiply_8x8.value / _TABLE_PRODUCT * spec.energy_scale


def add_pj(spec: AcceleratorSpec) -> float:
    """Returns the energy of an adder per bit of its width, pJ/bit, at the node."""
    return spec.energy_table.add_per_bit.value * spec.energy_scale


def operation_pj(spec: AcceleratorSpec, unit_name: str, kind: str) -> tuple[float, float]:
    """Returns `(constant, product)` in pJ and pJ/bit^2 of one operation, fitted factor included.

    Raises:
      PresetError: If neither the energy table nor the unit prices this kind of operation.
    """
    unit = spec.units[unit_name]
    table = spec.energy_table
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
    constant, product = prices[kind]
    factor = spec.energy_factor.value
    return constant * factor, product * factor


def buffer_pj_per_byte(spec: AcceleratorSpec, name: str) -> float:
    """Returns the energy of a byte read from a buffer of the preset's capacity, pJ/B, as fitted."""
    return spec.memories[name].energy.value * spec.energy_scale * spec.energy_factor.value


def dram_pj_per_byte(spec: AcceleratorSpec) -> float:
    """Returns the energy of a byte moved from or to main memory, pJ/B."""
    return spec.dram.energy.value * units.BITS_PER_BYTE


def element_mm2(spec: AcceleratorSpec, unit_name: str) -> float:
    """Returns the area of one element (lane where lanes have no width) of a unit, mm2, as fitted."""
    return spec.units[unit_name].area.value * spec.area_scale * spec.area.factor.value


def buffer_mm2_per_byte(spec: AcceleratorSpec, name: str) -> float:
    """Returns the area of a byte of a buffer, mm2/B, as fitted."""
    density = spec.memories[name].area.value / units.BYTES_PER_KIB
    return density * spec.area_scale * spec.area.factor.value
