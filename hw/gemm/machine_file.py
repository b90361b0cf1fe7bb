"""Dense machines as data: a TOML file per machine, parsed strictly; every number carries its unit and source.

They stand apart from `codesign.hw.spec`: an accelerator there serves the stages of a mechanism, of which a dense array has
none. Imports no JAX.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ValidationError, model_validator

from codesign.errors import PresetError, UnknownNameError
from codesign.hw.file_faults import near, one_line
from codesign.hw.gemm.names import ACCESSES, CONVOLUTION, TENSORS
from codesign.hw.quantities import (
    Area,
    AreaPerByte,
    Bits,
    Capacity,
    Count,
    Cycles,
    Energy,
    Fraction,
    In,
    Quantity,
    Strict,
    Text,
)
from codesign.hw.spec_tables import Choice

MACHINE_FOLDER = Path(__file__).resolve().parent / "machines"
Words = Annotated[Quantity, In("word")]
WordsPerCycle = Annotated[
    Quantity, In("word/cycle", "word/cycle/instance", "word/cycle/child", "B/cycle")
]
EnergyPerWord = Annotated[Quantity, In("pJ/word", "pJ/B", zero=True)]
EnergySlope = Annotated[Quantity, In("pJ/word/KB", "pJ/B/KB", zero=True)]


class Mesh(Strict):
    """A side of the array."""

    size: Count
    least: Count | None = None
    """Smallest size that is derived from a mapping; absent: 1."""


class Multiplier(Strict):
    """One multiply-accumulate unit."""

    bits: Bits
    """Width of both operands that it takes in a pass."""
    energy: Energy
    """Of one operation on operands of that width, the addition included."""
    multiplier_share: Fraction
    """Part of the energy that grows with the product of the widths."""
    scales_with_bits: Choice
    area: Area | None = None

    @model_validator(mode="after")
    def _is_a_share(self) -> Self:
        if self.multiplier_share.value > 1.0:
            raise ValueError(
                "`multiplier_share` must lie in [0, 1]: write a fraction of the energy"
            )
        return self


class Level(Strict):
    """A memory; all its instances together where it says nothing else."""

    holds: tuple[Text, ...]
    """Tensors that stop here on their way."""
    fanout: Text | None = None
    """Side of the array along which one instance feeds several of the next inner level; absent: one."""
    spreads: tuple[Text, ...] = ()
    """Loop dimensions that may run along that side."""
    tiles: tuple[Text, ...] | None = None
    """Loop dimensions that may be tiled here; absent: all."""
    word: Bits
    bandwidth: WordsPerCycle | None = None
    """Of the level, of each instance in use, or times the side that it feeds; absent: never a limit."""
    capacity: Capacity | None = None
    """Of all instances; absent: not limited, and not a size."""
    energy: EnergyPerWord
    """Of an access at no capacity."""
    energy_slope: EnergySlope | None = None
    """Energy per capacity of an instance to the power `energy_exponent`; absent: 0."""
    energy_exponent: Fraction | None = None
    """Absent: 1."""
    energy_from: Capacity | None = None
    """Capacity of an instance below which the energy grows no smaller; absent: none."""
    block: Words | None = None
    """Words that move together; absent: 1."""
    unpriced: tuple[Text, ...] = ()
    """Accesses, `tensor.kind`, that take neither time nor energy here."""
    area: AreaPerByte | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        for field, known in (("holds", TENSORS), ("spreads", CONVOLUTION)):
            _check(field, getattr(self, field), known)
        _check("tiles", self.tiles or (), CONVOLUTION)
        accesses = [f"{name}.{kind}" for name, kinds in ACCESSES.items() for kind in kinds]
        _check("unpriced", self.unpriced, tuple(accesses))
        if (self.fanout is None) != (not self.spreads):
            raise ValueError("`fanout` and `spreads` belong together: add the other")
        if self.capacity is None and (self.energy_slope or self.area):
            raise ValueError("`energy_slope` and `area` need `capacity`: add it")
        return self


def _check(field: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"`{field}`: unknown name `{name}`: {near(name, known)}")


class Exchange(Strict):
    """What exchanging the tile that stays in the array takes beside the computation."""

    stationary: Text
    constant: Cycles
    cycles: dict[Text, Cycles]
    """Per element of a side beyond the first."""

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        _check("stationary", (self.stationary,), TENSORS)
        return self


class GemmSwitches(Strict):
    """Modelling choices by name."""

    fill_and_drain: Choice
    """The array is filled and drained with every tile that it exchanges."""
    prefetch_weights: Choice
    """With `fill_and_drain`: once per layer, since the next tile arrives during the computation."""
    whole_steps: Choice
    """Factors may not divide their dimension: the last, partial tile takes a whole step, yet moves only what exists."""
    whole_blocks: Choice
    """Energy of a memory's accesses is that of whole blocks, by tensor and kind."""
    whole_cycles: Choice
    """A layer takes whole cycles."""
    sliding_window: Choice
    """Inputs that the innermost moving loop leaves in place are kept; else every move fetches the whole tile."""
    first_partial_sum_read: Choice
    """The first product is added to a zero that is read, instead of written."""
    partial_sums_spill_in_full: Choice
    """Unfinished sums leave the innermost memory of the results at their own width, else at that of the results."""


class MachineFile(Strict):
    """A dense machine: an array, its memories from the innermost outwards, how they are counted."""

    name: Text
    mesh: dict[Text, Mesh]
    multiplier: Multiplier
    levels: dict[Text, Level]
    exchange: Exchange | None = None
    switches: GemmSwitches

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for name, level in self.levels.items():
            if level.fanout is not None and level.fanout not in self.mesh:
                raise ValueError(
                    f"`levels.{name}.fanout`: unknown side `{level.fanout}`: {near(level.fanout, self.mesh)}"
                )
            clash = {name, f"{name}.bytes"} & self.mesh.keys()
            if clash:
                raise ValueError(f"`mesh.{clash.pop()}` has the name of a level: rename it")
        outermost = list(self.levels.values())[-1] if self.levels else None
        if outermost is None or set(outermost.holds) != set(TENSORS):
            raise ValueError("`levels`: the last one is main memory: let it hold all tensors")
        if outermost.capacity is not None:
            raise ValueError("`levels`: the last one is main memory: remove its `capacity`")
        if self.exchange is None and self.switches.fill_and_drain.value:
            raise ValueError("`switches.fill_and_drain` needs `exchange`: add it")
        for side in self.exchange.cycles if self.exchange is not None else ():
            if side not in self.mesh:
                raise ValueError(
                    f"`exchange.cycles`: unknown side `{side}`: {near(side, self.mesh)}"
                )
        return self


def parse_machine(text: str, *, origin: str) -> MachineFile:
    """Returns the machine that a TOML text describes.

    Args:
      text: The file's text.
      origin: Name of the file, for messages.

    Raises:
      PresetError: If the text is not TOML or not a consistent machine; one line.
    """
    try:
        return MachineFile.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise PresetError(f"{origin}: not valid TOML: {error}; correct that place") from error
    except ValidationError as error:
        raise PresetError(f"{origin}: {one_line(error, MachineFile)}") from error


def machine_names() -> list[str]:
    """Returns the names of the dense machines that ship with the package."""
    return sorted(path.stem for path in MACHINE_FOLDER.glob("*.toml"))


def load_machine(name_or_path: str | Path) -> MachineFile:
    """Returns a dense machine by the name of a shipped file or the path of a TOML file.

    Raises:
      UnknownNameError: If there is no such machine or file.
      PresetError: If the file is malformed, incomplete or inconsistent; one line.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        if str(name_or_path) not in machine_names():
            raise UnknownNameError(
                f"unknown dense machine `{name_or_path}`: {near(str(name_or_path), machine_names())} "
                "(or give the path of a .toml file)"
            )
        path = MACHINE_FOLDER / f"{name_or_path}.toml"
    if not path.is_file():
        raise UnknownNameError(f"machine file `{path}` does not exist: check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PresetError(f"{path.name}: not UTF-8 text: save it as UTF-8 TOML") from error
    return parse_machine(text, origin=path.name)


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a dense machine's file."""
    return MachineFile.model_json_schema()
