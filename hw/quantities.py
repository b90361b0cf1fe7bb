"""Numbers of an accelerator file: value, unit and source, each field with the units it takes.

Imports no JAX.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from codesign import units as conversions

# Unit of a file -> factor to the unit the code computes in (named at the end of each line).
_FACTORS = {
    "B": 1.0,
    "KB": float(conversions.BYTES_PER_KIB),
    "MB": float(conversions.BYTES_PER_MIB),  # byte
    "MHz": conversions.HZ_PER_MHZ,
    "GHz": conversions.HZ_PER_GHZ,  # hertz
    "GB/s": 1e9,  # byte per second
    "mW": 1.0 / conversions.MILLIWATT_PER_WATT,
    "W": 1.0,  # watt
    "um2": 1.0 / conversions.UM2_PER_MM2,  # square millimetre
    "mm2/KB": 1.0 / conversions.BYTES_PER_KIB,
    "um2/MB": 1.0
    / conversions.UM2_PER_MM2
    / conversions.BYTES_PER_MIB,  # square millimetre per byte
    "nJ/64B": conversions.PJ_PER_NJ / 64.0,  # picojoule per byte
    "mW/MB": 1.0 / conversions.MILLIWATT_PER_WATT / conversions.BYTES_PER_MIB,  # watt per byte
}

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Quantity(Strict):
    """A number with its unit and where it comes from."""

    value: Annotated[float, Field(allow_inf_nan=False)]
    unit: Text
    source: Text

    @property
    def base(self) -> float:
        """The value in the code's own unit (byte, hertz, watt, mm2, pJ and their ratios), else as written."""
        return self.value * _FACTORS.get(self.unit, 1.0)


class In:
    """Checks that a quantity is positive (or not negative) and in one of the units of its field."""

    def __init__(self, *units: str, zero: bool = False) -> None:
        self.units = units
        self.zero = zero

    def check(self, quantity: Quantity) -> Quantity:
        """Returns the quantity if it fits."""
        if quantity.unit not in self.units:
            choices = " or ".join(f'"{unit}"' for unit in self.units)
            raise ValueError(f'unit "{quantity.unit}" does not fit here: write unit = {choices}')
        if quantity.value < 0 or (quantity.value == 0 and not self.zero):
            bound = "at least 0" if self.zero else "above 0"
            raise ValueError(f"value must be {bound}, got {quantity.value:g}: correct the size")
        return quantity

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Returns the validation of a field annotated with this."""
        return AfterValidator(self.check).__get_pydantic_core_schema__(source, handler)

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """Returns the JSON Schema of such a field, its units listed."""
        return {"allOf": [handler(core_schema), {"properties": {"unit": {"enum": self.units}}}]}


Lanes = Annotated[Quantity, In("lane")]
Elements = Annotated[Quantity, In("element")]
Rows = Annotated[Quantity, In("row")]
Count = Annotated[Quantity, In("1")]
Bits = Annotated[Quantity, In("bit")]
Cycles = Annotated[Quantity, In("cycle", zero=True)]
Capacity = Annotated[Quantity, In("B", "KB", "MB")]
Bandwidth = Annotated[Quantity, In("GB/s")]
Frequency = Annotated[Quantity, In("MHz", "GHz")]
Length = Annotated[Quantity, In("nm")]
Voltage = Annotated[Quantity, In("V")]
Energy = Annotated[Quantity, In("pJ", zero=True)]
EnergyPerBit = Annotated[Quantity, In("pJ/bit", zero=True)]
EnergyPerByte = Annotated[Quantity, In("pJ/B", "nJ/64B", zero=True)]
TransferEnergy = Annotated[Quantity, In("pJ/bit", "nJ/64B", zero=True)]
Power = Annotated[Quantity, In("W", "mW")]
Leakage = Annotated[Quantity, In("W", "mW", zero=True)]
LeakagePerByte = Annotated[Quantity, In("mW/MB", zero=True)]
Area = Annotated[Quantity, In("mm2", "um2")]
AreaPerLane = Annotated[Quantity, In("mm2/lane", "mm2/element", zero=True)]
AreaPerByte = Annotated[Quantity, In("mm2/KB", "um2/MB", zero=True)]
Fraction = Annotated[Quantity, In("1", zero=True)]
Examples = Annotated[Quantity, In("example")]
EnergyPerBlock = Annotated[Quantity, In("nJ/block")]
BitsPerCycle = Annotated[Quantity, In("bit/cycle")]
