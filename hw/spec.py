"""Accelerators as data: TOML presets, parsed strictly; every number carries its unit and source.

`load_preset` returns an `AcceleratorSpec`; `json_schema` describes the file. Imports no JAX.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from codesign import units as conversions
from codesign.errors import PresetError, UnknownNameError
from codesign.vocabulary import MECHANISM_OPERATIONS, matches

PRESET_FOLDER = Path(__file__).resolve().parent / "presets"
ROW_SETS = ("filter*", "attention")
"""Row statistics of a workload that may pace a unit; `*` is the round of the operation served."""

# Unit of a file -> factor to the unit the code computes in (named at the end of each line).
_FACTORS = {
    "B": 1.0,
    "KB": float(conversions.BYTES_PER_KIB),  # byte
    "MHz": conversions.HZ_PER_MHZ,
    "GHz": conversions.HZ_PER_GHZ,  # hertz
    "GB/s": 1e9,  # byte per second
    "mW": 1.0 / conversions.MILLIWATT_PER_WATT,
    "W": 1.0,  # watt
}

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Quantity(_Strict):
    """A number with its unit and where it comes from."""

    value: Annotated[float, Field(allow_inf_nan=False)]
    unit: Text
    source: Text

    @property
    def base(self) -> float:
        """The value in the code's own unit: byte, hertz, byte per second, watt; else as written."""
        return self.value * _FACTORS.get(self.unit, 1.0)


class _In:
    """Checks that a quantity is positive (or not negative) and in one of the units of its field."""

    def __init__(self, *units: str, zero: bool = False) -> None:
        self.units = units
        self.zero = zero

    def check(self, quantity: Quantity) -> Quantity:
        if quantity.unit not in self.units:
            choices = " or ".join(f'"{unit}"' for unit in self.units)
            raise ValueError(f'unit "{quantity.unit}" does not fit here: write unit = {choices}')
        if quantity.value < 0 or (quantity.value == 0 and not self.zero):
            bound = "at least 0" if self.zero else "above 0"
            raise ValueError(f"value must be {bound}, got {quantity.value:g}: correct the size")
        return quantity

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return AfterValidator(self.check).__get_pydantic_core_schema__(source, handler)

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {"allOf": [handler(core_schema), {"properties": {"unit": {"enum": self.units}}}]}


Lanes = Annotated[Quantity, _In("lane")]
Elements = Annotated[Quantity, _In("element")]
Rows = Annotated[Quantity, _In("row")]
Count = Annotated[Quantity, _In("1")]
Bits = Annotated[Quantity, _In("bit")]
Cycles = Annotated[Quantity, _In("cycle", zero=True)]
Capacity = Annotated[Quantity, _In("B", "KB")]
Bandwidth = Annotated[Quantity, _In("GB/s")]
Frequency = Annotated[Quantity, _In("MHz", "GHz")]
Length = Annotated[Quantity, _In("nm")]
Voltage = Annotated[Quantity, _In("V")]
Energy = Annotated[Quantity, _In("pJ", zero=True)]
EnergyPerBit = Annotated[Quantity, _In("pJ/bit", zero=True)]
EnergyPerByte = Annotated[Quantity, _In("pJ/B", zero=True)]
Power = Annotated[Quantity, _In("W", "mW")]
Area = Annotated[Quantity, _In("mm2")]
AreaPerLane = Annotated[Quantity, _In("mm2/lane", "mm2/element", zero=True)]
AreaPerKib = Annotated[Quantity, _In("mm2/KB", zero=True)]
Fraction = Annotated[Quantity, _In("1", zero=True)]


class Choice(_Strict):
    """A modelling choice and its reason."""

    value: bool
    source: Text


class Technology(_Strict):
    """Process and clock of the attention engine and its host."""

    node: Length
    supply: Voltage
    clock: Frequency


class Unit(_Strict):
    """A functional unit: what it executes and how long that takes.

    Rule `rows`: for each query row, ceil(keys / lanes) steps, each taking ceil(d / width) *
    ceil(bits_a / slice_a) * ceil(bits_b / slice_b) cycles, plus `overhead` once per row.
    Rule `flat`: count / lanes cycles times the same slices.
    """

    serves: tuple[Text, ...]
    """Operations executed here, `stage.kind`; `*` for any round."""
    paced_by: Text
    """The served operation that takes the unit's time; the others ride along."""
    rule: Literal["rows", "flat"]
    rows: Literal["filter*", "attention"] | None = None
    """Row statistics of rule `rows`."""
    lanes: Lanes
    width: Elements | None = None
    """Elements of a head's width that one lane takes per cycle; absent: lanes take scores."""
    slice_a: Bits | None = None
    slice_b: Bits | None = None
    scaling: Literal["never", "au_scales"] = "never"
    """Switch under which cycles fall with the bits: times bits_a bits_b / (slice_a slice_b)."""
    overhead: Cycles | None = None
    accumulator: Bits
    reads_b: Text | None = None
    """Buffer from which operand b of the pacing operation is read, once per operation."""
    energy: dict[str, Energy] = {}
    """Energy of a kind of operation, where the formula of the energy table is replaced."""
    area: AreaPerLane
    """Per lane, or per element of width of a lane, at the node of the area model."""

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.rule == "rows" and self.rows is None:
            raise ValueError(f"rule `rows` needs `rows`: add one of {', '.join(ROW_SETS)}")
        if self.scaling != "never" and (self.slice_a is None or self.slice_b is None):
            raise ValueError("`scaling` needs `slice_a` and `slice_b`: add both widths")
        if self.area.unit == "mm2/element" and self.width is None:
            raise ValueError('area in "mm2/element" needs `width`: add it, or write "mm2/lane"')
        if self.paced_by not in self.serves:
            raise ValueError(f"`paced_by` must be one of `serves`: {', '.join(self.serves)}")
        return self


class Buffer(_Strict):
    """An on-chip memory."""

    capacity: Capacity
    energy: EnergyPerByte
    area: AreaPerKib
    sized_by: Literal["capacity", "query_block"] = "capacity"
    """`query_block`: the capacity grows in proportion to the query block."""


class Dram(_Strict):
    """Main memory, shared by attention engine and host, one user at a time."""

    bandwidth: Bandwidth
    energy: EnergyPerBit


class Pipeline(_Strict):
    """What is chained, what overlaps, and what sharing of fetches the engine does."""

    stages: tuple[tuple[Text, ...], ...]
    """Units chained on one row form a stage; stages work on different rows at the same time."""
    drain: Cycles
    query_block: Rows
    """Consecutive query rows that share a fetch of keys and values."""
    index_queue: Rows
    """Rows by which a stage may run ahead of the next one."""


class Host(_Strict):
    """Dense array for the linear layers, in series with the attention engine."""

    rows: Count
    cols: Count
    bits: Bits
    accumulator: Bits
    sram: Capacity
    scales_with_bits: Choice
    prefetch_weights: Choice
    mac_area: Area
    sram_area: AreaPerKib


class EnergyTable(_Strict):
    """Operation energies at a reference node; other nodes scale with node and supply squared."""

    node: Length
    supply: Voltage
    multiply_8x8: Energy
    add_per_bit: EnergyPerBit
    exp: Energy
    reciprocal: Energy
    divide: Energy
    sram: EnergyPerByte
    sram_reference: Capacity
    """Capacity up to which `sram` holds; above it the energy grows with the square root."""


class AreaModel(_Strict):
    """Node of the densities, and the one factor fitted to the published area."""

    node: Length
    factor: Count


class Switches(_Strict):
    """Modelling choices by name."""

    au_scales: Choice
    """Cycles of attention arrays fall with their operands' bits."""
    separate_storage: Choice
    """A surviving key is fetched again in full instead of its missing bits only."""
    index_lists_priced: Choice
    """Writing and reading the lists of kept keys costs energy."""
    buffer_energy_scales: Choice
    """Energy per byte of a buffer grows with the square root of its capacity."""
    memory_overlaps: Choice
    """Transfers from main memory hide behind computation."""
    fill_and_drain: Choice
    """One row through every stage and the drain constant add to a layer."""


class OperatingPoint(_Strict):
    """The published point that fixes the fitted factors, and the figures it should give."""

    num_tokens: Count
    head_dim: Count
    num_heads: Count
    kept: tuple[Fraction, ...]
    query_bits: Bits
    key_bits: tuple[Bits, ...]
    qk_bits: Bits
    v_bits: Bits
    union: Fraction
    core_power: Power
    memory_power: Power
    area: Area


class AcceleratorSpec(_Strict):
    """One machine; see the fields."""

    name: Text
    mechanism: Text
    technology: Technology
    units: dict[str, Unit]
    memories: dict[str, Buffer]
    dram: Dram
    pipeline: Pipeline
    host: Host
    energy_table: EnergyTable
    energy_factor: Count
    area: AreaModel
    switches: Switches
    operating_point: OperatingPoint

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.mechanism not in MECHANISM_OPERATIONS:
            known = ", ".join(sorted(MECHANISM_OPERATIONS))
            raise ValueError(f"`mechanism`: unknown `{self.mechanism}`: use one of {known}")
        self._check_served(MECHANISM_OPERATIONS[self.mechanism])
        piped = [name for stage in self.pipeline.stages for name in stage]
        for name in piped:
            if name not in self.units or piped.count(name) > 1:
                raise ValueError(
                    f"`pipeline.stages`: `{name}` must be a unit, named once: {_near(name, self.units)}"
                )
        for name, unit in self.units.items():
            if name not in piped:
                raise ValueError(
                    f"`units.{name}` stands in no stage: add it to `pipeline.stages` or remove it"
                )
            if unit.reads_b is not None and unit.reads_b not in self.memories:
                raise ValueError(
                    f"`units.{name}.reads_b`: unknown memory `{unit.reads_b}`: "
                    f"{_near(unit.reads_b, self.memories)}"
                )
        return self

    def _check_served(self, operations: tuple[str, ...]) -> None:
        """Every unit is fed by the mechanism, and every operation has exactly one unit."""
        for name, unit in self.units.items():
            for pattern in unit.serves:
                if pattern not in operations:
                    raise ValueError(
                        f"`units.{name}.serves`: no stage of `{self.mechanism}` feeds `{pattern}`: "
                        f"{_near(pattern, operations)}"
                    )
        for pattern in operations:
            servers = [name for name, unit in self.units.items() if pattern in unit.serves]
            if len(servers) != 1:
                raise ValueError(
                    f"`units`: `{pattern}` of `{self.mechanism}` must be served by exactly one "
                    f"unit, found {', '.join(servers) or 'none'}: edit `serves`"
                )

    def unit_of(self, key: str) -> str:
        """Returns the name of the unit that executes an operation.

        Raises:
          PresetError: If no unit does.
        """
        for name, unit in self.units.items():
            if matches(key, unit.serves):
                return name
        raise PresetError(
            f"{self.name}: no unit serves `{key}`: add it to a unit's `serves`, or run mechanism "
            f"`{self.mechanism}`, which this machine was made for"
        )

    @property
    def clock_hz(self) -> float:
        """Clock in hertz."""
        return self.technology.clock.base

    @property
    def dram_bytes_per_cycle(self) -> float:
        """Bandwidth of main memory in byte per cycle."""
        return self.dram.bandwidth.base / self.clock_hz

    @property
    def energy_scale(self) -> float:
        """Energy at this node over energy at the table's node, without `energy_factor`."""
        table = self.energy_table
        supply = self.technology.supply.value / table.supply.value
        return self.technology.node.value / table.node.value * supply * supply

    @property
    def area_scale(self) -> float:
        """Area at this node over area at the node of the densities, without the fitted factor."""
        return (self.technology.node.value / self.area.node.value) ** 2


def _near(name: str, choices: Any) -> str:
    """Returns the hint that ends a message about an unknown name."""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f"did you mean `{close[0]}`?" if close else f"use one of {', '.join(choices)}"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Returns the pydantic models inside a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _fields_at(location: tuple[str | int, ...]) -> list[str]:
    """Returns the legal keys of the table at a location of the file."""
    models: list[type[BaseModel]] = [AcceleratorSpec]
    for key in location:
        found = [model.model_fields[key] for model in models if key in model.model_fields]
        if found:
            models = [model for field in found for model in _models(field.annotation)]
    return sorted({name for model in models for name in model.model_fields})


def _one_line(error: ValidationError) -> str:
    """Returns the first fault of a file: key path, what is wrong, how to mend it."""
    faults = error.errors(include_url=False, include_context=False)
    # A misspelt key shows up twice: name the stray key rather than the missing one.
    fault = min(faults, key=lambda entry: entry["type"] != "extra_forbidden")
    location = tuple(key for key in fault["loc"] if not str(key).startswith("function-after["))
    path = ".".join(str(key) for key in location)
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = f"unknown key: {_near(str(location[-1]), _fields_at(location[:-1]))}"
    elif fault["type"] == "missing":
        kind = location[-1]
        message = f"`{kind}` is missing: every number is written {{ value, unit, source }}"
        if kind not in Quantity.model_fields:
            message = f"missing: add `{kind}`"
    elif fault["type"] == "model_type":
        message = "a bare number has no unit: write { value = ..., unit = ..., source = ... }"
    elif fault["type"] == "string_too_short":
        message = "is empty: say where the number comes from, or what it means"
    elif not location:
        return message
    else:
        message = f"{message[0].lower()}{message[1:]}"
    return f"`{path}`: {message}"


def parse_preset(text: str, *, origin: str) -> AcceleratorSpec:
    """Returns the machine that a TOML text describes.

    Args:
      text: The file's text.
      origin: Name of the file, for messages.

    Raises:
      PresetError: If the text is not TOML or not a consistent machine; one line.
    """
    try:
        return AcceleratorSpec.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise PresetError(f"{origin}: not valid TOML: {error}; correct that place") from error
    except ValidationError as error:
        raise PresetError(f"{origin}: {_one_line(error)}") from error


def preset_names() -> list[str]:
    """Returns the names of the presets that ship with the package."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.toml"))


def load_preset(name_or_path: str | Path) -> AcceleratorSpec:
    """Returns a machine by the name of a shipped preset or the path of a TOML file.

    Raises:
      UnknownNameError: If there is no such preset or file.
      PresetError: If the file is malformed, incomplete or inconsistent; one line.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        if str(name_or_path) not in preset_names():
            raise UnknownNameError(
                f"unknown accelerator preset `{name_or_path}`: "
                f"{_near(str(name_or_path), preset_names())} (or give the path of a .toml file)"
            )
        path = PRESET_FOLDER / f"{name_or_path}.toml"
    if not path.is_file():
        raise UnknownNameError(f"accelerator file `{path}` does not exist: check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PresetError(f"{path.name}: not UTF-8 text: save it as UTF-8 TOML") from error
    return parse_preset(text, origin=path.name)


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of an accelerator file."""
    return AcceleratorSpec.model_json_schema()
