"""Accelerators as data: TOML presets, parsed strictly; every number carries its unit and source.

`load_preset` returns an `AcceleratorSpec`; `json_schema` describes the file. Imports no JAX.
"""

import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, model_validator

from codesign.errors import PresetError, UnknownNameError
from codesign.hw.file_faults import near, one_line
from codesign.hw.quantities import Count, Leakage, Strict, Text
from codesign.hw.spec_tables import (
    AreaModel,
    Buffer,
    Dram,
    EnergyTable,
    Estimator,
    Host,
    Module,
    OperatingPoint,
    Pipeline,
    ProcessingElements,
    SizeBounds,
    Storage,
    Switches,
    Technology,
    Unit,
)
from codesign.vocabulary import LINEAR_OPERATIONS, MECHANISM_OPERATIONS, matches

PRESET_FOLDER = Path(__file__).resolve().parent / "presets"


class AcceleratorSpec(Strict):
    """One machine; see the tables. Linear layers run on a `host`, or on its own units with `storage`."""

    name: Text
    mechanism: Text
    technology: Technology
    modules: dict[str, Module] = {}
    """Synthesised blocks by name, of which units consist."""
    processing_elements: ProcessingElements | None = None
    units: dict[str, Unit]
    memories: dict[str, Buffer]
    dram: Dram
    pipeline: Pipeline
    host: Host | None = None
    storage: Storage | None = None
    energy_table: EnergyTable | None = None
    """Prices of units without `modules`; node of the memories' energies, else they hold as written."""
    energy_factor: Count
    standing_power: Leakage | None = None
    """Drawn all the time, besides the leakage of modules and memories."""
    area: AreaModel
    switches: Switches
    operating_point: OperatingPoint
    sizes: dict[str, SizeBounds] = {}
    """Legal ranges of sizes that are trained (`codesign.hw.sizing`); those not named have the default."""
    estimator: Estimator | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.mechanism not in MECHANISM_OPERATIONS:
            known = ", ".join(sorted(MECHANISM_OPERATIONS))
            raise ValueError(f"`mechanism`: unknown `{self.mechanism}`: use one of {known}")
        if (self.host is None) == (self.storage is None):
            raise ValueError(
                "linear layers need `host` (an array in series) or `storage` (the machine's own units): "
                "give one of the two"
            )
        self._check_served(MECHANISM_OPERATIONS[self.mechanism], self._linear_operations())
        self._check_stages()
        self._check_references()
        for name, unit in self.units.items():
            if not unit.modules and self.energy_table is None:
                raise ValueError(f"`units.{name}` has no `modules`: add `energy_table` to price it")
        if self.host is not None and self.energy_table is None:
            raise ValueError("`host` is priced by `energy_table`: add it")
        if self.pipeline.query_block is None:
            for name, memory in self.memories.items():
                if memory.sized_by == "query_block":
                    raise ValueError(
                        f"`memories.{name}.sized_by` needs `pipeline.query_block`: add it, or write "
                        '"capacity"'
                    )
        return self

    def _linear_operations(self) -> tuple[str, ...]:
        """Returns the operations of linear layers that the machine's own units execute.

        Norms and non-linearities are free where activations pass through: nobody says where they run.
        """
        if self.storage is None:
            return ()
        return LINEAR_OPERATIONS[: None if self.storage.activations is not None else 1]

    def _check_stages(self) -> None:
        """Every unit stands in exactly one stage, and rows never go back to an earlier one."""
        piped = [name for stage in self.pipeline.stages for name in stage]
        for name in piped:
            if name not in self.units:
                raise ValueError(
                    f"`pipeline.stages`: `{name}` must be a unit: {near(name, self.units)}"
                )
            if piped.count(name) > 1:
                raise ValueError(
                    f"`pipeline.stages`: `{name}` stands in it twice, so that rows would go round in a cycle: "
                    "name it once"
                )
        for name in self.units:
            if name not in piped:
                raise ValueError(
                    f"`units.{name}` stands in no stage: add it to `pipeline.stages` or remove it"
                )
        if self.processing_elements is not None:
            return  # Their units take work in any order.
        stage_of = {
            name: place for place, stage in enumerate(self.pipeline.stages) for name in stage
        }
        served = MECHANISM_OPERATIONS[self.mechanism]
        order = [self.unit_of(key) for key in ("qk.mac", "softmax.exp", "pv.mac") if key in served]
        deciding = next((key for key in served if key.startswith(("predict.", "filter*."))), None)
        if deciding is not None:
            order.insert(0, next(n for n, unit in self.units.items() if deciding in unit.serves))
        # One unit for scores and attention takes the row again, inside its stage.
        for before, after in zip(order, order[1:], strict=False):
            if stage_of[before] > stage_of[after]:
                raise ValueError(
                    f"`pipeline.stages`: `{after}` stands before `{before}`, whose results it needs, so that rows would go "
                    "round in a cycle: change their order"
                )

    def _check_references(self) -> None:
        """Every module, memory and unit that a table names exists."""
        named: list[tuple[str, str, Any]] = []
        for name, unit in self.units.items():
            for key, read in unit.reads.items():
                named.append((f"units.{name}.reads.{key}.buffer", read.buffer, self.memories))
                if not any(matches(served, (key,)) for served in unit.serves):
                    raise ValueError(
                        f"`units.{name}.reads`: `{key}` is not among what the unit serves: "
                        f"{near(key, unit.serves)}"
                    )
            named += [(f"units.{name}.modules", module, self.modules) for module in unit.modules]
        if self.processing_elements is not None:
            elements = self.processing_elements
            named.append(("processing_elements.driven_by", elements.driven_by, self.units))
            named += [
                ("processing_elements.modules", one, self.modules) for one in elements.modules
            ]
        if self.storage is not None:
            for field in ("weights", "activations", "masks"):
                memory = getattr(self.storage, field)
                if memory is not None:
                    named.append((f"storage.{field}", memory, self.memories))
        if self.estimator is not None:
            memory = self.estimator.memory
            named.append(("estimator.memory", memory, self.estimator.memories))
        for path, name, known in named:
            if name not in known:
                kind = {id(self.memories): "memory", id(self.modules): "module"}.get(
                    id(known), "name"
                )
                raise ValueError(f"`{path}`: unknown {kind} `{name}`: {near(name, known)}")

    def _check_served(self, own: tuple[str, ...], linear: tuple[str, ...]) -> None:
        """Every unit is fed by the mechanism or the linear layers, and every operation has exactly one unit."""
        operations = own + linear
        for name, unit in self.units.items():
            for pattern in unit.serves:
                if pattern not in operations:
                    raise ValueError(
                        f"`units.{name}.serves`: no stage of `{self.mechanism}` feeds `{pattern}`: "
                        f"{near(pattern, operations)}"
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
    def threshold_ratio(self) -> float | None:
        """Threshold voltage over the supply; None without one."""
        threshold = self.technology.threshold
        return None if threshold is None else threshold.value / self.technology.supply.value

    @property
    def dram_bytes_per_cycle(self) -> float:
        """Bandwidth of main memory in byte per cycle."""
        return self.dram.bandwidth.base / self.clock_hz

    @property
    def energy_scale(self) -> float:
        """Energy at this node over energy at the table's node (1 without one), without `energy_factor`."""
        table = self.energy_table
        if table is None:
            return 1.0
        supply = self.technology.supply.value / table.supply.value
        return self.technology.node.value / table.node.value * supply * supply

    @property
    def area_scale(self) -> float:
        """Area at this node over area at the node of the densities, without the fitted factor."""
        return (self.technology.node.value / self.area.node.value) ** 2


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns `base` with the tables of `changes` merged into its own; a number is replaced as a whole."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        # A memory may be called `value`: a number's `value` is no table.
        is_number = isinstance(old, dict) and not isinstance(old.get("value", {}), dict)
        is_table = isinstance(old, dict) and isinstance(value, dict) and not is_number
        result[key] = _merged(old, value) if is_table else value  # type: ignore[arg-type]
    return result


def parse_preset(text: str, *, origin: str) -> AcceleratorSpec:
    """Returns the machine that a TOML text describes.

    With `extends = "<preset>"` the text need only say what differs from that shipped preset; its name is that of the file
    unless it gives one.

    Args:
      text: The file's text.
      origin: Name of the file, for messages.

    Raises:
      PresetError: If the text is not TOML or not a consistent machine; one line.
    """
    try:
        return AcceleratorSpec.model_validate(_resolved(tomllib.loads(text), origin))
    except tomllib.TOMLDecodeError as error:
        raise PresetError(f"{origin}: not valid TOML: {error}; correct that place") from error
    except ValidationError as error:
        raise PresetError(f"{origin}: {one_line(error, AcceleratorSpec)}") from error


def _resolved(tables: dict[str, Any], origin: str) -> dict[str, Any]:
    """Returns the tables with those of the preset they extend, if any."""
    if "extends" not in tables:
        return tables
    base = tables.pop("extends")
    choices = preset_names()
    if base not in choices:
        raise PresetError(
            f"{origin}: `extends`: unknown preset `{base}`: {near(str(base), choices)}"
        )
    text = (PRESET_FOLDER / f"{base}.toml").read_text(encoding="utf-8")
    tables.setdefault("name", Path(origin).stem)
    return _merged(_resolved(tomllib.loads(text), f"{base}.toml"), tables)


def preset_names() -> list[str]:
    """Returns the names of the presets that ship with the package."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.toml"))


def load_preset(name_or_path: str | Path) -> AcceleratorSpec:
    """Returns a machine by the name of a shipped preset or the path of a TOML (or JSON) file.

    Raises:
      UnknownNameError: If there is no such preset or file.
      PresetError: If the file is malformed, incomplete or inconsistent; one line.
    """
    path = Path(name_or_path)
    if path.suffix not in (".toml", ".json"):
        if str(name_or_path) not in preset_names():
            raise UnknownNameError(
                f"unknown accelerator preset `{name_or_path}`: "
                f"{near(str(name_or_path), preset_names())} (or give the path of a .toml file)"
            )
        path = PRESET_FOLDER / f"{name_or_path}.toml"
    if not path.is_file():
        raise UnknownNameError(f"accelerator file `{path}` does not exist: check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PresetError(f"{path.name}: not UTF-8 text: save it as UTF-8 TOML") from error
    if path.suffix == ".json":
        return _parse_json(text, origin=path.name)
    return parse_preset(text, origin=path.name)


def _parse_json(text: str, *, origin: str) -> AcceleratorSpec:
    """Returns the machine that a JSON text describes: the same tables, as `AcceleratorSpec.model_dump_json` writes them."""
    try:
        return AcceleratorSpec.model_validate_json(text)
    except ValidationError as error:
        raise PresetError(f"{origin}: {one_line(error, AcceleratorSpec)}") from error


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of an accelerator file, what it extends included."""
    return AcceleratorSpec.model_json_schema()
