"""A dense machine with its sizes as pytree leaves and everything else static."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from codesign import units
from codesign.errors import UnknownNameError
from codesign.hw.file_faults import near
from codesign.hw.gemm.machine_file import GemmSwitches, Level, MachineFile

KIB = float(units.BYTES_PER_KIB)


@dataclass(frozen=True, kw_only=True)
class LevelStructure:
    """A memory: what it holds and feeds, and its prices.

    Energy of an access of one word: `base_pj + slope_pj * max(KB of an instance, least_kib) ** exponent`. `rate_per` says
    what its words per cycle are multiplied by: `machine` (1), `instance` (those in use) or `child` (the side it feeds).
    """

    name: str
    holds: tuple[str, ...]
    fanout: str | None
    spreads: tuple[str, ...]
    tiles: tuple[str, ...] | None
    word_bits: float
    rate_per: str | None
    base_pj: float
    slope_pj: float
    exponent: float
    least_kib: float
    block_words: float
    unpriced: tuple[str, ...]
    is_sized: bool
    mm2_per_byte: float


@dataclass(frozen=True, kw_only=True)
class MultiplierStructure:
    """The multipliers: width in bit, energy of an operation `constant_pj + product_pj * bits_a * bits_b`, area in mm2."""

    bits: float
    constant_pj: float
    product_pj: float
    scales_with_bits: bool
    mm2: float


@dataclass(frozen=True, kw_only=True)
class ExchangeStructure:
    """Cycles of an exchange of the stationary tile: a constant, and per element of a side beyond the first."""

    stationary: str
    constant: float
    cycles: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Modelling choices; `codesign.hw.gemm.machine_file.GemmSwitches` says what each means."""

    fill_and_drain: bool
    prefetch_weights: bool
    whole_steps: bool
    whole_blocks: bool
    whole_cycles: bool
    sliding_window: bool
    first_partial_sum_read: bool
    partial_sums_spill_in_full: bool


@dataclass(frozen=True, kw_only=True)
class MachineStructure:
    """Everything about a dense machine that is not a size; levels from the innermost outwards."""

    name: str
    levels: tuple[LevelStructure, ...]
    multiplier: MultiplierStructure
    exchange: ExchangeStructure | None
    least_sides: tuple[tuple[str, float], ...]
    switches: Switches

    def index(self, name: str) -> int:
        """Returns the place of a level."""
        return [level.name for level in self.levels].index(name)

    def holders(self, tensor: str) -> list[int]:
        """Returns the levels that hold a tensor, from the innermost outwards."""
        return [place for place, level in enumerate(self.levels) if tensor in level.holds]


@struct.dataclass
class Machine:
    """A dense machine.

    Attributes:
      sizes: Scalars, or `[...]` of the rank of the layers: sides of the array by name, `<level>.bytes` (all instances
        together) and `<level>.words_per_cycle`. All are positive and in natural units (an optimiser works on logarithms).
      structure: Levels, prices and switches; static.
    """

    sizes: dict[str, jax.Array]
    structure: MachineStructure = struct.field(pytree_node=False)

    def instances(self, place: int) -> jax.Array | float:
        """Returns how many instances of a level there are: the product of all sides fed further out."""
        number: jax.Array | float = 1.0
        for level in self.structure.levels[place + 1 :]:
            if level.fanout is not None:
                number = number * self.sizes[level.fanout]
        return number

    @property
    def num_multipliers(self) -> jax.Array | float:
        """Multipliers of the array."""
        return self.instances(-1)

    def kib_of_instance(self, place: int) -> jax.Array | float:
        """Returns the capacity of one instance of a level, KB; that of an unlimited one is 0."""
        level = self.structure.levels[place]
        if not level.is_sized:
            return 0.0
        return self.sizes[f"{level.name}.bytes"] / (KIB * self.instances(place))

    def access_pj(self, place: int) -> jax.Array | float:
        """Returns the energy of an access of one word of a level, pJ."""
        level = self.structure.levels[place]
        if not level.slope_pj:
            return level.base_pj
        kib = jnp.maximum(self.kib_of_instance(place), level.least_kib)
        return level.base_pj + level.slope_pj * kib**level.exponent


def machine_from_file(file: MachineFile) -> Machine:
    """Returns the machine of a file, sizes in the default float dtype."""
    sizes = {name: mesh.size.value for name, mesh in file.mesh.items()}
    for name, level in file.levels.items():
        if level.capacity is not None:
            sizes[f"{name}.bytes"] = level.capacity.base
        if level.bandwidth is not None:
            sizes[f"{name}.words_per_cycle"] = level.bandwidth.value * _words_of(
                level, level.bandwidth.unit
            )
    multiplier, exchange = file.multiplier, file.exchange
    share = multiplier.multiplier_share.value
    structure = MachineStructure(
        name=file.name,
        levels=tuple(_level(name, level) for name, level in file.levels.items()),
        multiplier=MultiplierStructure(
            bits=multiplier.bits.value,
            constant_pj=multiplier.energy.value * (1.0 - share),
            product_pj=multiplier.energy.value * share / multiplier.bits.value**2,
            scales_with_bits=multiplier.scales_with_bits.value,
            mm2=0.0 if multiplier.area is None else multiplier.area.base,
        ),
        exchange=None
        if exchange is None
        else ExchangeStructure(
            stationary=exchange.stationary,
            constant=exchange.constant.value,
            cycles=tuple((side, cycles.value) for side, cycles in exchange.cycles.items()),
        ),
        least_sides=tuple(
            (name, 1.0 if mesh.least is None else mesh.least.value)
            for name, mesh in file.mesh.items()
        ),
        switches=Switches(
            **{name: getattr(file.switches, name).value for name in GemmSwitches.model_fields}
        ),
    )
    return Machine(
        sizes={name: jnp.asarray(value, float) for name, value in sizes.items()},
        structure=structure,
    )


def _words_of(level: Level, unit: str) -> float:
    """Returns how many words of a level are what a unit counts: words or byte."""
    is_byte = "B" in unit.split("/")
    return units.BITS_PER_BYTE / level.word.value if is_byte else 1.0


def _rate_per(level: Level) -> str | None:
    """Returns what a level's words per cycle are multiplied by."""
    if level.bandwidth is None:
        return None
    last = level.bandwidth.unit.rpartition("/")[2]
    return last if last in ("instance", "child") else "machine"


def _level(name: str, level: Level) -> LevelStructure:
    base, slope = (
        0.0 if price is None else price.value / _words_of(level, price.unit)
        for price in (level.energy, level.energy_slope)
    )
    return LevelStructure(
        name=name,
        holds=level.holds,
        fanout=level.fanout,
        spreads=level.spreads,
        tiles=level.tiles,
        word_bits=level.word.value,
        rate_per=_rate_per(level),
        base_pj=base,
        slope_pj=slope,
        exponent=1.0 if level.energy_exponent is None else level.energy_exponent.value,
        least_kib=0.0 if level.energy_from is None else level.energy_from.base / KIB,
        block_words=1.0 if level.block is None else level.block.value,
        unpriced=level.unpriced,
        is_sized=level.capacity is not None,
        mm2_per_byte=0.0 if level.area is None else level.area.base,
    )


def with_switches(machine: Machine, **choices: bool) -> Machine:
    """Returns the machine with other modelling choices.

    Raises:
      UnknownNameError: If a name is not a switch.
    """
    known = {field.name for field in dataclasses.fields(Switches)}
    for name in choices:
        if name not in known:
            raise UnknownNameError(f"no switch `{name}`: {near(name, sorted(known))}")
    switches = dataclasses.replace(machine.structure.switches, **choices)
    structure = dataclasses.replace(machine.structure, switches=switches)
    changed: Machine = machine.replace(structure=structure)  # type: ignore[attr-defined]
    return changed


def with_sizes(machine: Machine, sizes: dict[str, jax.Array]) -> Machine:
    """Returns the machine with other sizes, scalars or `[...]`.

    Raises:
      UnknownNameError: If a name is not a size of the machine.
    """
    for name in sizes:
        if name not in machine.sizes:
            raise UnknownNameError(
                f"machine `{machine.structure.name}` has no size `{name}`: {near(name, machine.sizes)}"
            )
    changed: Machine = machine.replace(sizes=machine.sizes | sizes)  # type: ignore[attr-defined]
    return changed


def area_mm2(machine: Machine) -> dict[str, jax.Array]:
    """Returns mm2 of the multipliers and of each memory with a known density."""
    areas = {"multipliers": machine.num_multipliers * machine.structure.multiplier.mm2}
    for level in machine.structure.levels:
        if level.mm2_per_byte:
            areas[level.name] = machine.sizes[f"{level.name}.bytes"] * level.mm2_per_byte
    return {name: jnp.asarray(area, float) for name, area in areas.items()}
