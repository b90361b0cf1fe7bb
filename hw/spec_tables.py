"""Tables of an accelerator file; `codesign.hw.spec` puts them together. Imports no JAX."""

from typing import Literal, Self

from pydantic import model_validator

from codesign.hw.quantities import (
    Area,
    AreaPerByte,
    AreaPerLane,
    Bandwidth,
    Bits,
    BitsPerCycle,
    Capacity,
    Count,
    Cycles,
    Elements,
    Energy,
    EnergyPerBit,
    EnergyPerBlock,
    EnergyPerByte,
    Examples,
    Fraction,
    Frequency,
    Lanes,
    Leakage,
    LeakagePerByte,
    Length,
    Power,
    Rows,
    Strict,
    Text,
    TransferEnergy,
    Voltage,
)
from codesign.hw.supply import LEAST_OVER_THRESHOLD

ROW_SETS = ("filter*", "all", "searched", "scored", "attention", "used", "packed")
"""Row statistics of a workload that may pace a unit: `*` is the served operation's round, `all` existing keys, `searched`
the steps of a search, `scored` keys whose exact score is found, `attention` kept keys, `used` keys whose value is read,
`packed` kept keys in pieces of 64."""


class Choice(Strict):
    """A modelling choice and its reason."""

    value: bool
    source: Text


class Technology(Strict):
    """Process and clock of the attention engine and its host."""

    node: Length
    supply: Voltage
    clock: Frequency
    threshold: Voltage | None = None
    """Threshold of its transistors; with it the clock is a size, and the supply follows it. Absent: the clock stays."""

    @model_validator(mode="after")
    def _is_above_threshold(self) -> Self:
        if self.threshold is None:
            return self
        most = self.supply.value / LEAST_OVER_THRESHOLD
        if self.threshold.value > most * (1.0 + 1e-9):
            raise ValueError(
                f"`technology.threshold` must be at most `technology.supply` / {LEAST_OVER_THRESHOLD:g} ({most:.3g} V), "
                f"got {self.threshold.value:g} V: lower it"
            )
        return self


class Module(Strict):
    """A synthesised block: what one instance takes, as published (no node or factor is applied)."""

    area: Area
    dynamic: Leakage
    """Power while it works."""
    leakage: Leakage
    native_bits: Bits | None = None
    """Operand width of its multipliers (or shifters); below it `multiplier_share` of the power falls with bits_a bits_b."""
    multiplier_share: Fraction | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if (self.native_bits is None) != (self.multiplier_share is None):
            raise ValueError("`native_bits` and `multiplier_share` belong together: add the other")
        if self.multiplier_share is not None and self.multiplier_share.value > 1.0:
            raise ValueError("`multiplier_share` must lie in [0, 1]: write a fraction of the power")
        return self


class Read(Strict):
    """How an operation reads its operand b from a memory, once each time or once for several rows."""

    buffer: Text
    rows: Rows | None = None
    """Rows of queries or tokens that share a read, as arrays pass operands on; absent: 1."""

    @property
    def sharing(self) -> float:
        """Rows that share a read."""
        return 1.0 if self.rows is None else self.rows.value


class Unit(Strict):
    """A functional unit: what it executes and how long that takes.

    Rule `rows`: for each query row, ceil(keys / lanes) steps, each taking ceil(d / width) *
    ceil(bits_a / slice_a) * ceil(bits_b / slice_b) cycles, plus `overhead` once per row.
    Rule `flat`: count / (lanes * width * per_lane) cycles times the same slices. Linear layers are
    always `flat`. Rule `blocks`: as `flat`, but each lane takes a query row, so that the rows of a head
    count as a multiple of the lanes. Rule `groups`: as `flat`, but groups of lanes take windows of `rows_at_once`
    rows of a head, and some wait for the last. Any time is divided by the utilisation.
    """

    serves: tuple[Text, ...]
    """Operations executed here, `stage.kind`; `*` for any round."""
    paced_by: Text | tuple[Text, ...]
    """The served operations that take the unit's time, one after the other; the rest ride along."""
    rule: Literal["rows", "flat", "blocks", "groups"]
    rows: Literal["filter*", "all", "searched", "scored", "attention", "used", "packed"] | None = (
        None
    )
    """Row statistics of rule `rows`."""
    lanes: Lanes
    """Lanes of the unit, or of each processing element where the machine has them."""
    width: Elements | None = None
    """Elements of a head's width that one lane takes per cycle; absent: lanes take scores."""
    per_lane: Count | None = None
    """Operations that a lane of rule `flat` finishes per cycle; absent: 1."""
    groups: Count | None = None
    """Groups of lanes of rule `groups`, each on a head of its own."""
    shares_heads: Choice | None = None
    """Whether a group that has ended its heads takes over windows of others; needed by rule `groups`."""
    utilisation: Fraction | None = None
    """Fraction of its time in which a busy unit does work; absent: 1."""
    skips_zeros: Choice | None = None
    """Whether products with a zero operand take neither time nor energy."""
    issue_rate: Count | None = None
    """Most operations started per cycle and slot, skipped ones included; absent: no bound."""
    slice_a: Bits | None = None
    slice_b: Bits | None = None
    scaling: Literal["never", "au_scales"] = "never"
    """Switch under which cycles fall with the bits: times bits_a bits_b / (slice_a slice_b)."""
    overhead: Cycles | None = None
    modules: tuple[Text, ...] = ()
    """Synthesised blocks of which each lane has one; they replace `accumulator`, `area` and the table."""
    accumulator: Bits | None = None
    reads: dict[Text, Read] = {}
    """Where operand b of an operation comes from, by operation; one that is not named costs no read."""
    reads_absorbed: Choice | None = None
    """Whether the unit's own energies have these reads already, so that only the common frame prices them; absent: no."""
    energy: dict[str, Energy] = {}
    """Energy of a kind of operation, where the formula of the energy table is replaced."""
    area: AreaPerLane | None = None
    """Per lane, or per element of width of a lane, at the node of the area model."""

    @property
    def paces(self) -> tuple[str, ...]:
        """The operations that take the unit's time."""
        return (self.paced_by,) if isinstance(self.paced_by, str) else self.paced_by

    @property
    def priced_reads(self) -> dict[str, Read]:
        """The reads that cost energy of their own."""
        absorbed = self.reads_absorbed is not None and self.reads_absorbed.value
        return {} if absorbed else self.reads

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.rule == "rows" and self.rows is None:
            raise ValueError(f"rule `rows` needs `rows`: add one of {', '.join(ROW_SETS)}")
        if (self.rule == "groups") != (self.groups is not None and self.shares_heads is not None):
            raise ValueError("`groups` and `shares_heads` belong to rule `groups`: add or remove")
        for name in ("per_lane", "skips_zeros", "issue_rate"):
            if self.rule == "rows" and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` needs another rule than `rows`, whose lanes move in lock step: change it"
                )
        if self.utilisation is not None and not 0.0 < self.utilisation.value <= 1.0:
            raise ValueError("`utilisation` must lie in (0, 1]: write the busy fraction")
        if self.scaling != "never" and (self.slice_a is None or self.slice_b is None):
            raise ValueError("`scaling` needs `slice_a` and `slice_b`: add both widths")
        if self.modules and not (self.accumulator is None and self.area is None):
            raise ValueError("`modules` bring energy and area: remove `accumulator` and `area`")
        if not self.modules and (self.accumulator is None or self.area is None):
            raise ValueError("needs `accumulator` and `area`, or `modules`: add them")
        if self.area is not None and self.area.unit == "mm2/element" and self.width is None:
            raise ValueError('area in "mm2/element" needs `width`: add it, or write "mm2/lane"')
        for pattern in self.paces:
            if pattern not in self.serves:
                raise ValueError(f"`paced_by` must be one of `serves`: {', '.join(self.serves)}")
        return self


class ProcessingElements(Strict):
    """Identical elements, each with all units of the file."""

    count: Count
    modules: tuple[Text, ...] = ()
    """Further blocks of which each element has one."""
    driven_by: Text
    """Unit during whose work these blocks draw their dynamic power."""
    tile: Elements | None = None
    """Side of the tiles that lanes take: products of tile x tile x tile pairs, else tile x tile elements; absent: work is
    dealt without tiles."""


class Buffer(Strict):
    """An on-chip memory."""

    capacity: Capacity
    energy: EnergyPerByte
    energy_at: Capacity | None = None
    """Capacity at which `energy` holds; absent: the memory's own."""
    bandwidth: Bandwidth | None = None
    """Of what is written into it; absent: never a limit."""
    area: AreaPerByte
    leakage: LeakagePerByte | None = None
    sized_by: Literal["capacity", "query_block", "fixed"] = "capacity"
    """`query_block`: the capacity grows in proportion to the query block; `fixed`: not a size to optimise."""


class Dram(Strict):
    """Main memory, shared by attention engine and host, one user at a time."""

    bandwidth: Bandwidth
    energy: TransferEnergy


class Storage(Strict):
    """Where operands live on a machine whose own units run the linear layers.

    Weights come from main memory once per batch; activations stay on chip as far as they fit.
    """

    weights: Text
    activations: Text | None = None
    """Absent: a layer's tokens come from main memory and its output goes there; nothing between them leaves the chip."""
    masks: Text | None = None
    """Memory of one mask bit per element; with it only elements that are not zero are stored."""
    batch: Examples
    """Examples that share a load of weights."""
    stores_scores: Choice
    """Scores and probabilities are written to the memory of the activations."""


class Pipeline(Strict):
    """What is chained, what overlaps, and what sharing of fetches the engine does."""

    stages: tuple[tuple[Text, ...], ...]
    """Units chained on one row form a stage; stages work on different rows at the same time."""
    drain: Cycles
    query_block: Rows | None = None
    """Consecutive query rows that share a fetch of keys and values; absent: all of a head."""
    index_queue: Rows | None = None
    """Rows by which a stage may run ahead of the next one; the simulator needs it."""
    rows_at_once: Rows | None = None
    """Rows that move through the stages together; absent: one."""


class Host(Strict):
    """Dense array for the linear layers, in series with the attention engine."""

    rows: Count
    cols: Count
    bits: Bits
    accumulator: Bits
    sram: Capacity
    scales_with_bits: Choice
    prefetch_weights: Choice
    mac_area: Area
    sram_area: AreaPerByte


class EnergyTable(Strict):
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


class AreaModel(Strict):
    """Node of the densities, and the one factor fitted to the published area."""

    node: Length
    factor: Count
    rest: Area | None = None
    """Area of what belongs to no unit and no memory, as published; absent: none."""


class Switches(Strict):
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


class OperatingPoint(Strict):
    """The published point, and the figures that the machine should give there."""

    num_tokens: Count
    head_dim: Count
    num_heads: Count
    kept: tuple[Fraction, ...] = ()
    query_bits: Bits | None = None
    key_bits: tuple[Bits, ...] = ()
    tile_bits: Bits | None = None
    """Bits of a key's place in its segment."""
    search_bits: Bits | None = None
    """Logarithm of the steps of a search for candidates."""
    qk_bits: Bits
    v_bits: Bits
    union: Fraction | None = None
    generation_bits: Bits | None = None
    """Tokens and weights from which keys and values are made on demand; absent: `linear_bits`."""
    linear_bits: Bits | None = None
    """Weights and activations of linear layers; absent: 8 bit."""
    activation_density: Fraction | None = None
    """Elements that are not zero; absent: all. So for the weights."""
    weight_density: Fraction | None = None
    core_power: Power | None = None
    memory_power: Power | None = None
    area: Area


class SizeBounds(Strict):
    """Legal range of a size that is trained, as factors of the file's own."""

    least: Count
    most: Count

    @model_validator(mode="after")
    def _holds_the_own_size(self) -> Self:
        if not 0.0 < self.least.value <= 1.0 <= self.most.value:
            raise ValueError("`least` must lie in (0, 1] and `most` be at least 1: correct them")
        return self


class MainMemoryOption(Strict):
    """A main memory as the closed-form estimator prices it."""

    energy: EnergyPerBlock
    bandwidth: BitsPerCycle


class Estimator(Strict):
    """Constants of AccelTran's published closed form (`codesign.hw.acceltran_estimator`), as it uses them."""

    word: Bits
    vocabulary: Count
    """Rows of the embedding table, positions apart."""
    block: Elements
    """Elements in a priced block of memory."""
    tile_b: Elements
    tile_x: Elements
    tile_y: Elements
    memory: Text
    """The machine's main memory, a key of `memories`."""
    buffer_bandwidth: BitsPerCycle
    memories: dict[str, MainMemoryOption]
    """In the order of the published index."""
    issue_group: Count | None = None
    """Tile operations that a head starts in a cycle of the cycle-level simulator (`codesign.hw.acceltran_cycle`)."""
