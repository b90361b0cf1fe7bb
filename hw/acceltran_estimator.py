"""AccelTran's published closed form: cycles, area and twelve energies of a batch; NumPy only.

It reproduces the public estimator with its quirks, which the cost model corrects (docs/cost_model.md,
section 9): weights are loaded again for every example of a batch, the inner tiles of a product count
twice, activation sparsity alone shortens computation, and masks, biases and residuals cost nothing.

References:
  Tuli, Jha, "AccelTran", arXiv 2302.14705; estimator of the repositories jha-lab/acceltran and
  jha-lab/transcode (arXiv 2303.14882). All constants come from an accelerator file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

from codesign import units
from codesign.errors import CodesignError, PresetError, UnknownNameError
from codesign.hw.spec import AcceleratorSpec
from codesign.hw.spec_tables import Buffer, Estimator, MainMemoryOption, Module

Slot = Literal["mac", "softmax"]
ENERGY_COLUMNS = ("buffer", "main_memory") + tuple(
    f"{part}_{kind}"
    for part in ("mac", "softmax", "norm", "sparsity", "others")
    for kind in ("dynamic", "leakage")
)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One encoder layer: model width h, operators of its heads, inner widths f of its dense layers.

    Operators are `sa_sdp_<d>`, `sa_wma_<d>` (self-attention, width d per head; scaled or weighted
    product), `l_dft_<d>`, `l_dct_<d>` (transforms) and `c_<k>_<d>` (convolution of k tokens).
    """

    width: int
    heads: tuple[str, ...]
    hidden: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Sizes of a machine; memories in MB. `spec` holds the constants.

    Attributes:
      issue_group: Tile operations that a head starts in a cycle of the cycle-level simulator; None: not known.
      bandwidth: Of main memory, bit/cycle; None: that of `memory`.
    """

    spec: AcceleratorSpec = field(repr=False)
    processing_elements: int
    lanes: int
    multipliers: int
    softmax_units: int
    tile_b: int
    tile_x: int
    tile_y: int
    batch: int
    activation_mb: float
    weight_mb: float
    mask_mb: float
    memory: str
    issue_group: int | None
    non_linearity: Literal["gelu", "relu"] = "gelu"
    bandwidth: float | None = None

    @classmethod
    def from_spec(cls, spec: AcceleratorSpec) -> Self:
        """Returns the machine of a preset.

        Raises:
          PresetError: If the file lacks what the closed form needs.
        """
        table, elements, storage = spec.estimator, spec.processing_elements, spec.storage
        lane, softmax = spec.units.get("lane"), spec.units.get("softmax")
        if (
            table is None
            or elements is None
            or storage is None
            or storage.masks is None
            or storage.activations is None
        ):
            raise PresetError(
                f"{spec.name}: the closed form needs the tables `estimator`, `processing_elements` and "
                "`storage` with masks: add them, or use the preset `acceltran-edge`"
            )
        if lane is None or softmax is None or lane.per_lane is None:
            raise PresetError(
                f"{spec.name}: the closed form needs `units.lane` with `per_lane` and `units.softmax`: "
                "add them, or use the preset `acceltran-edge`"
            )
        activation, weight, mask = (
            spec.memories[name].capacity.base / units.BYTES_PER_MIB
            for name in (storage.activations, storage.weights, storage.masks)
        )
        return cls(
            spec=spec,
            processing_elements=int(elements.count.value),
            lanes=int(lane.lanes.value),
            multipliers=int(lane.per_lane.value),
            softmax_units=int(softmax.lanes.value),
            tile_b=int(table.tile_b.value),
            tile_x=int(table.tile_x.value),
            tile_y=int(table.tile_y.value),
            batch=int(storage.batch.value),
            activation_mb=activation,
            weight_mb=weight,
            mask_mb=mask,
            memory=table.memory,
            issue_group=None if table.issue_group is None else int(table.issue_group.value),
        )

    @property
    def constants(self) -> Estimator:
        """The closed form's own constants."""
        assert self.spec.estimator is not None
        return self.spec.estimator

    def module(self, name: str) -> Module:
        """Returns a synthesised block.

        Raises:
          UnknownNameError: If the file has none of this name, so that a size was never synthesised.
        """
        if name not in self.spec.modules:
            raise UnknownNameError(
                f"{self.spec.name}: no module `{name}`: choose a size that was synthesised, "
                f"{', '.join(self.spec.modules)}"
            )
        return self.spec.modules[name]

    @property
    def lane(self) -> Module:
        """A lane with its multipliers and non-linearity."""
        suffix = "" if self.non_linearity == "gelu" else f"_{self.non_linearity}"
        return self.module(f"lane_{self.multipliers}{suffix}")

    @property
    def main_memory(self) -> MainMemoryOption:
        """The main memory.

        Raises:
          UnknownNameError: If the file has none of this name.
        """
        memories = self.constants.memories
        if self.memory not in memories:
            known = ", ".join(memories)
            raise UnknownNameError(f"unknown main memory `{self.memory}`: use one of {known}")
        return memories[self.memory]

    @property
    def main_bandwidth(self) -> float:
        """Bits that main memory delivers per cycle."""
        return self.main_memory.bandwidth.value if self.bandwidth is None else self.bandwidth

    @property
    def softmax(self) -> Module:
        """A softmax unit for this tile."""
        return self.module(f"softmax_tile_{self.tile_x}")

    @property
    def norm(self) -> Module:
        """A layer-norm unit for this tile."""
        return self.module(f"layer_norm_tile_{self.tile_x}")

    @property
    def buffers(self) -> dict[str, tuple[Buffer, float]]:
        """Constants and size in MB of the buffers of activations, weights and masks."""
        storage = self.spec.storage
        assert storage is not None and storage.masks is not None and storage.activations is not None
        return {
            role: (self.spec.memories[name], megabytes)
            for role, name, megabytes in (
                ("activation", storage.activations, self.activation_mb),
                ("weight", storage.weights, self.weight_mb),
                ("mask", storage.masks, self.mask_mb),
            )
        }

    def tiles(self, rows: int, cols: int) -> int:
        """Returns the two-dimensional tiles of a batch of `rows` by `cols`."""
        return (
            math.ceil(self.batch / self.tile_b)
            * math.ceil(rows / self.tile_x)
            * math.ceil(cols / self.tile_y)
        )

    def product_tiles(self, rows: int, inner: int, cols: int) -> int:
        """Returns the tile operations of a product; the inner tiles count twice, as published."""
        inner_tiles = math.ceil(inner / self.tile_y) * math.ceil(inner / self.tile_x)
        return self.tiles(rows, cols) * inner_tiles


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Cycles of a batch, area in mm2, energies in nJ by `ENERGY_COLUMNS`."""

    cycles: int
    area_mm2: float
    energy_nj: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class _Operation:
    slot: Slot
    cycles: int
    tiles: int


def area_mm2(machine: Machine) -> float:
    """Returns the area of a machine, mm2."""
    blocks = {
        "lane": machine.lane,
        "softmax": machine.softmax,
        "norm": machine.norm,
        **{
            name: machine.module(name)
            for name in ("pre_sparsity", "post_sparsity", "fifo", "dataflow", "dma")
        },
    }
    um2 = {name: block.area.value for name, block in blocks.items()}
    of_lane = um2["lane"] + um2["pre_sparsity"] + um2["post_sparsity"] + um2["fifo"]
    element = machine.lanes * of_lane + machine.softmax_units * um2["softmax"]
    element += um2["dataflow"] + um2["dma"] + um2["norm"]
    total = machine.processing_elements * element
    for memory, megabytes in machine.buffers.values():
        total += megabytes * memory.area.value
    return total / units.UM2_PER_MM2


def estimate(
    layers: Sequence[Layer],
    machine: Machine,
    *,
    num_tokens: int,
    activation_sparsity: float,
    weight_sparsity: float,
) -> Estimate:
    """Returns what a batch takes by the published closed form.

    Args:
      layers: The encoder.
      machine: The machine and its constants.
      num_tokens: Tokens s of an example.
      activation_sparsity: Fraction of zeros in activations, in [0, 1).
      weight_sparsity: Fraction of zeros in weights, in [0, 1).

    Raises:
      UnknownNameError: If an operator, a memory or a module does not exist.
      CodesignError: If the embedding does not fit the weight buffer, where the published runs end too.
    """
    table = machine.constants
    embedding = (table.vocabulary.value + num_tokens) * layers[0].width
    weight_bits = table.word.value * (1.0 - weight_sparsity)
    capacity_bits = machine.weight_mb * units.BYTES_PER_MIB * units.BITS_PER_BYTE
    if embedding * weight_bits > capacity_bits:
        raise CodesignError(
            f"the embedding of {embedding * weight_bits / units.BITS_PER_BYTE:,.0f} bytes does not fit "
            f"the weight buffer of {machine.weight_mb:g} MB: enlarge it"
        )
    run = _Run(machine, num_tokens, 1.0 - activation_sparsity, weight_bits)
    cycles = run.load_cycles(embedding)
    for index, layer in enumerate(layers):
        after = layers[index + 1] if index + 1 < len(layers) else layer
        cycles += run.layer_cycles(layer, after)
    return Estimate(
        cycles=cycles, area_mm2=area_mm2(machine), energy_nj=run.energy_nj(1.0 - weight_sparsity)
    )


class _Run:
    """One estimate: cycles are returned step by step, work is added up for the energies."""

    def __init__(
        self, machine: Machine, num_tokens: int, activation_density: float, weight_bits: float
    ) -> None:
        self.machine = machine
        self.num_tokens = num_tokens
        self.density = activation_density
        self.weight_bits = weight_bits
        self.bandwidth = machine.main_bandwidth
        self.mac_cycles = 0
        self.softmax_cycles = 0
        self.norm_cycles = 0
        self.head_tiles = 0
        self.loaded = 0
        self.stored = 0

    def load_cycles(self, elements: float) -> int:
        """Returns the cycles in which main memory delivers weights."""
        return math.ceil(elements * self.weight_bits / self.bandwidth)

    def layer_cycles(self, layer: Layer, after: Layer) -> int:
        """Returns the cycles of a layer, with the step to the next one's width."""
        cycles = self._head_cycles(layer) + self._norm(layer.width)
        width = layer.width
        for out in (*layer.hidden, layer.width):
            cycles += self._dense(width, out, layer.width)
            width = out
        cycles += self._norm(layer.width)
        if after.width != layer.width:
            cycles += self._dense(layer.width, after.width, layer.width)
        return cycles

    def energy_nj(self, weight_density: float) -> dict[str, float]:
        """Returns the energies of everything run so far, nJ."""
        machine = self.machine
        table = machine.constants
        elements = machine.processing_elements
        lanes = elements * machine.lanes
        activation, megabytes = machine.buffers["activation"]
        blocks = self.loaded * weight_density / table.block.value
        result = {
            "buffer": activation.energy.value
            * math.sqrt(megabytes)
            * self.stored
            / table.block.value,
            "main_memory": machine.main_memory.energy.value * blocks,
        }
        # Milliwatt by megahertz is nanojoule per cycle.
        megahertz = machine.spec.clock_hz / units.HZ_PER_MHZ
        names = ("pre_sparsity", "post_sparsity", "dma", "fifo", "dataflow")
        pre, post, *others = (machine.module(name) for name in names)
        for part, modules, count in (
            ("mac", [machine.lane], lanes * self.mac_cycles),
            ("softmax", [machine.softmax], elements * machine.softmax_units * self.softmax_cycles),
            ("norm", [machine.norm], elements * self.norm_cycles),
            ("sparsity", [pre, post], lanes * self.head_tiles),
            ("others", others, elements * self.head_tiles),
        ):
            for kind in ("dynamic", "leakage"):
                power = sum(getattr(module, kind).value for module in modules)
                result[f"{part}_{kind}"] = power * count / megahertz
        return result

    def _product(self, rows: int, inner: int, cols: int) -> _Operation:
        machine = self.machine
        tiles = machine.product_tiles(rows, inner, cols)
        return self._on_lanes(tiles, machine.tile_y**2)

    def _on_lanes(self, tiles: int, macs_per_row: int) -> _Operation:
        machine = self.machine
        macs = tiles * machine.tile_b * machine.tile_x * macs_per_row
        parallel = machine.processing_elements * machine.lanes * machine.multipliers
        return _Operation(slot="mac", cycles=math.ceil(macs / parallel * self.density), tiles=tiles)

    def _rowwise(self, tiles: int, parallel: int) -> int:
        machine = self.machine
        service = machine.tile_b * (machine.tile_x + machine.tile_y)
        return math.ceil(tiles * service * self.density / parallel)

    def _norm(self, width: int) -> int:
        tiles = self.machine.tiles(self.num_tokens, width)
        cycles = self._rowwise(tiles, self.machine.processing_elements)
        self.norm_cycles += cycles
        return cycles

    def _dense(self, inner: int, out: int, layer_width: int) -> int:
        """A dense layer with its non-linearity, whose cycles are the tiles of a layer norm."""
        machine, tokens = self.machine, self.num_tokens
        product = self._product(tokens, inner, out).cycles
        activation_bits = machine.constants.word.value * self.density
        stored = machine.batch * tokens * out
        store = math.ceil(stored * activation_bits / machine.constants.buffer_bandwidth.value)
        nonlinearity = machine.tiles(tokens, layer_width)
        self.mac_cycles += product + nonlinearity
        self.loaded += machine.batch * inner * out
        self.stored += stored
        return self.load_cycles(machine.batch * inner * out) + product + store + nonlinearity

    def _head_cycles(self, layer: Layer) -> int:
        """Issues the heads' operations to two slots; what is left in the other slot at the end is dropped."""
        waiting = [list(self._head(name, layer.width)) for name in layer.heads]
        for operation in (operation for head in waiting for operation in head):
            if operation.slot == "mac":
                self.mac_cycles += operation.cycles
                self.head_tiles += operation.tiles
            else:
                self.softmax_cycles += operation.cycles
        cycles = 0
        running: dict[Slot, int] = {}
        while any(waiting):
            for head in waiting:
                if head and head[0].slot not in running:
                    operation = head.pop(0)
                    running[operation.slot] = operation.cycles
            # A convolution wider than a tile takes no cycles or fewer, and occupies its slot all the same.
            advance = min(running.values())
            cycles += advance
            running = {slot: rest - advance for slot, rest in running.items() if rest > advance}
        return cycles

    def _head(self, name: str, width: int) -> list[_Operation]:
        """Returns a head's operations in order and adds its loads and stores."""
        machine, tokens = self.machine, self.num_tokens
        batch = machine.batch
        kind, _, number = name.rpartition("_")
        if not number.isdigit() or int(number) < 1:
            kind = ""
        match kind:
            case "sa_sdp" | "sa_wma":
                head = int(number)
                self.loaded += batch * 4 * width * head
                self.stored += batch * (4 * tokens * head + 2 * tokens**2 + tokens * width)
                projection = self._product(tokens, width, head)
                operations = [projection] * 3
                if kind == "sa_wma":
                    self.loaded += batch * head**2
                    self.stored += batch * tokens * head
                    operations.append(self._product(head, head, tokens))
                tiles = machine.tiles(tokens, tokens)
                softmax = self._rowwise(tiles, machine.processing_elements * machine.softmax_units)
                return [
                    *operations,
                    self._product(tokens, head, tokens),
                    _Operation(slot="softmax", cycles=softmax, tiles=0),
                    self._product(tokens, tokens, head),
                    self._product(tokens, head, width),
                ]
            case "l_dft" | "l_dct":
                self.loaded += batch * tokens**2
                self.stored += batch * tokens * width
                return [self._product(tokens, tokens, width)]
            case "c_5" | "c_9" | "c_13":
                taps = int(kind.removeprefix("c_"))
                self.loaded += batch * taps * width
                self.stored += batch * tokens * width
                return [self._on_lanes(machine.tiles(tokens, width), machine.tile_y - taps)]
        raise UnknownNameError(
            f"unknown operator `{name}`: use sa_sdp_<d>, sa_wma_<d>, l_dft_<d>, l_dct_<d> or c_<k>_<d> "
            "with k of 5, 9, 13"
        )
