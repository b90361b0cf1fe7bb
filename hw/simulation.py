"""What every simulator reads and returns, and the parts they share; NumPy only.

A simulator takes the masks of a batch through one kind of machine. All price their own counts by the tables of
the machine's file, and run the host's linear layers in series.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from codesign import units
from codesign.errors import UnknownNameError
from codesign.hw import energy
from codesign.hw.spec import AcceleratorSpec
from codesign.hw.spec_tables import EnergyTable, Host
from codesign.hw.timeline import HOST, Span, Watched
from codesign.vocabulary import LINEAR_SITES

BLOCK_SITES = ("qkv", "out", "up", "down")
END_SITES = tuple(site for site in LINEAR_SITES if site not in BLOCK_SITES)
HOST_PARTS = ("host.mac", "host.sram", "host.dram")


class NonZero(Protocol):
    """What is read of a `codesign.workload.NonZero`."""

    def layer(self, index: int) -> np.ndarray:
        """Returns which elements of one layer are not zero, bool."""


class Trace(Protocol):
    """What is read of a `codesign.workload.Trace`, which needs JAX to be imported."""

    @property
    def valid(self) -> np.ndarray:
        """Tokens that exist, bool `[B, S]`."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""

    @property
    def bits(self) -> dict[str, np.ndarray]:
        """Deployed widths by knob or site, bit."""

    @property
    def packed(self) -> np.ndarray:
        """Packed masks; the leading axis is the layers."""

    @property
    def source(self) -> np.ndarray | None:
        """The row whose attention each row takes, `[L, B, H, T]`; None where every row has its own."""

    @property
    def ffn_source(self) -> np.ndarray | None:
        """The token whose feed-forward branch each token takes, `[L, B, T]`; None where every token has its own."""

    @property
    def compares(self) -> np.ndarray | None:
        """Whether a head predicts at all (compares rows, searches), bool `[L, H]`; None where all do."""

    @property
    def one_hot(self) -> np.ndarray | None:
        """Rows that copy a value instead of being computed, bool `[L, B, H, T]`; None where none does."""

    @property
    def ffn_full(self) -> np.ndarray | None:
        """Tokens whose feed-forward branch has all its bits, bool `[L, B, T]`; None where all have."""

    @property
    def mechanism(self) -> str:
        """Name of what decided, which says what the rounds are."""

    @property
    def nonzero(self) -> Mapping[str, "NonZero"]:
        """Elements that are not zero, by site and, of weights, `<site>.weight`; empty where no zeros are skipped."""

    def keep(self, layer: int) -> np.ndarray:
        """Returns one layer's masks after each round, bool `[B, H, R, T, S]`."""


@dataclass(frozen=True, kw_only=True)
class GemmShape:
    """Sizes of a linear layer, out[M, N] = x[M, K] w[K, N]: `inner` K, `outer` N.

    `rows` is M; None stands for the valid tokens of each example.
    """

    inner: int
    outer: int
    rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class HostRun:
    """What the host did; `[B, L]` in the blocks, `[B, E]` in linear layers outside them."""

    cycles: np.ndarray
    energy_pj: dict[str, np.ndarray]
    end_cycles: np.ndarray
    end_energy_pj: dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What the machine did; axes B examples, L layers, E linear layers outside the blocks.

    Scopes are those of the cost model: `attention` is the attention alone; `end_to_end` adds the keys and values
    that the machine makes itself, and the host.

    Attributes:
      operations: Counts by `stage.kind`, heads summed, `[B, L]`.
      stream_bytes: Bytes moved by stream, `[B, L]`.
      busy_cycles: Working time of the attention by unit and `dram`, `[B, L]`.
      attention_cycles: Latency of a layer's attention, `[B, L]`.
      unit_energy_pj: Energy of the attention by unit, buffer and `dram`, `[B, L]`.
      own_busy_cycles: Working time of making keys and values by unit and `dram`, `[B, L]`.
      own_cycles: What making them adds to the latency, `[B, L]`.
      own_energy_pj: Its energy by unit and `dram`, `[B, L]`.
      standing_pj_per_cycle: Drawn in every cycle that is not the host's.
      host: The linear layers on the host.
      own_end_cycles: Latency of linear layers outside the blocks on the machine's own units, `[B, E]`; E is 0 if none are.
      own_end_energy_pj: Their energy by unit, memory and `dram`, `[B, E]`.
      timeline: What its parts do in the layer that is watched, end to end; empty if none is. Of a whole batch where the
        machine deals out tiles; what comes before the layer begins has times below 0.
    """

    operations: dict[str, np.ndarray]
    stream_bytes: dict[str, np.ndarray]
    busy_cycles: dict[str, np.ndarray]
    attention_cycles: np.ndarray
    unit_energy_pj: dict[str, np.ndarray]
    own_busy_cycles: dict[str, np.ndarray]
    own_cycles: np.ndarray
    own_energy_pj: dict[str, np.ndarray]
    standing_pj_per_cycle: float
    host: HostRun
    own_end_cycles: np.ndarray = field(default_factory=lambda: np.zeros((1, 0)))
    own_end_energy_pj: dict[str, np.ndarray] = field(default_factory=dict)
    timeline: list[Span] = field(default_factory=list)

    def latency_cycles(self, scope: str) -> np.ndarray:
        """Returns cycles per example, `[B]`, of scope `attention` or `end_to_end`."""
        cycles = self._own_latency_cycles(scope)
        if _has_linear(scope):
            cycles = cycles + self.host.cycles.sum(axis=1) + self.host.end_cycles.sum(axis=1)
        return cycles

    def energy_pj(self, scope: str) -> np.ndarray:
        """Returns pJ per example, `[B]`, of scope `attention` or `end_to_end`."""
        total = self.standing_pj_per_cycle * self._own_latency_cycles(scope)
        parts = list(self.unit_energy_pj.values())
        if _has_linear(scope):
            parts += self.own_energy_pj.values()
            parts += [*self.host.energy_pj.values(), *self.host.end_energy_pj.values()]
            parts += self.own_end_energy_pj.values()
        for part in parts:
            total = total + part.sum(axis=1)
        return total

    def _own_latency_cycles(self, scope: str) -> np.ndarray:
        """Returns the cycles that are not the host's, `[B]`."""
        cycles: np.ndarray = self.attention_cycles.sum(axis=1)
        if _has_linear(scope):
            cycles = cycles + self.own_cycles.sum(axis=1) + self.own_end_cycles.sum(axis=1)
        return cycles


def _has_linear(scope: str) -> bool:
    if scope not in ("attention", "end_to_end"):
        raise UnknownNameError(f"unknown scope `{scope}`: use one of attention, end_to_end")
    return scope == "end_to_end"


def check_sites(gemm_shapes: Mapping[str, GemmShape]) -> None:
    """Checks the names of linear layers.

    Raises:
      UnknownNameError: If a linear site does not exist.
    """
    for site in gemm_shapes:
        if site not in LINEAR_SITES:
            raise UnknownNameError(
                f"unknown linear site `{site}`: use one of {', '.join(LINEAR_SITES)}"
            )


def standing_pj_per_cycle(spec: AcceleratorSpec) -> float:
    """Returns what a machine draws in every cycle, working or not, pJ."""
    watts = 0.0 if spec.standing_power is None else spec.standing_power.base
    elements, number = spec.processing_elements, 1.0
    if elements is not None:
        number = elements.count.value
        watts += number * sum(spec.modules[name].leakage.base for name in elements.modules)
    for unit in spec.units.values():
        leaking = sum(spec.modules[name].leakage.base for name in unit.modules)
        watts += number * unit.lanes.value * leaking
    for memory in spec.memories.values():
        if memory.leakage is not None:
            watts += memory.leakage.base * memory.capacity.base
    return energy.pj_per_cycle(spec, watts)


def operation_energy(
    counts: Mapping[str, np.ndarray],
    widths: Mapping[str, tuple[np.ndarray, ...]],
    spec: AcceleratorSpec,
) -> dict[str, np.ndarray]:
    """Returns energy by unit and by the buffer its operands come from, pJ, `[B, L]`.

    Args:
      counts: Operations by `stage.kind`, `[B, L]`.
      widths: Bits of both operands, `[L]`, by operation.
      spec: The machine.
    """
    total: dict[str, np.ndarray] = {}
    for key, count in counts.items():
        kind = key.partition(".")[2]
        if kind == "bits" and not spec.switches.index_lists_priced.value:
            continue
        name = spec.unit_of(key)
        constant, product = energy.operation_pj(spec, name, kind)
        bits_a, bits_b = widths[key]
        spent = count * (constant + product * bits_a * bits_b)[None, :]
        total[name] = total.get(name, 0.0) + spent
        for buffer, price in energy.reads_pj_per_bit(spec, name, key).items():
            total[buffer] = total.get(buffer, 0.0) + count * (bits_b * price)[None, :]
    return total


class Counted(Protocol):
    """Counts of one layer of one example: operations, bits of both operands, and bytes moved by stream."""

    @property
    def operations(self) -> Mapping[str, float]:
        """Operations by `stage.kind`, heads summed."""

    @property
    def widths(self) -> Mapping[str, tuple[int, int]]:
        """Bits of both operands by operation."""

    @property
    def stream_bytes(self) -> Mapping[str, float]:
        """Bytes moved by stream."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a batch executes and moves; operations and bytes `[B, L]`, bits of both operands `[2, L]`."""

    operations: dict[str, np.ndarray]
    widths: dict[str, np.ndarray]
    stream_bytes: dict[str, np.ndarray]

    def split(self, operations: Collection[str], streams: Collection[str]) -> tuple["Work", "Work"]:
        """Returns the work without the named operations and streams, and that of these alone."""

        def part(is_named: bool) -> Work:
            kept = {
                key: value
                for key, value in self.operations.items()
                if (key in operations) == is_named
            }
            moved = {
                key: value
                for key, value in self.stream_bytes.items()
                if (key in streams) == is_named
            }
            return Work(operations=kept, widths=self.widths, stream_bytes=moved)

        return part(False), part(True)

    @property
    def moved_bytes(self) -> np.ndarray:
        """Bytes of all streams, `[B, L]`."""
        total: np.ndarray = np.sum(list(self.stream_bytes.values()), axis=0)
        return total

    def energy_pj(self, spec: AcceleratorSpec) -> dict[str, np.ndarray]:
        """Returns energy by unit and by the buffer its operands come from, pJ, `[B, L]`; without main memory."""
        widths = {key: (*self.widths[key],) for key in self.operations}
        return operation_energy(self.operations, widths, spec)


def by_example(layers: Sequence[Sequence[float]]) -> np.ndarray:
    """Returns figures of layers and examples, `[L][B]`, as `[B, L]`."""
    return np.asarray(layers, np.float64).T


def collected(counts: Sequence[Sequence[Counted]]) -> Work:
    """Returns the counts of layers and examples, `[L][B]`, as one."""
    first = [examples[0] for examples in counts]
    return Work(
        operations={
            key: by_example([[one.operations[key] for one in examples] for examples in counts])
            for key in first[0].operations
        },
        widths={
            key: np.asarray([one.widths[key] for one in first]).T for key in first[0].operations
        },
        stream_bytes={
            key: by_example([[one.stream_bytes[key] for one in examples] for examples in counts])
            for key in first[0].stream_bytes
        },
    )


def run_host(
    gemm_shapes: Mapping[str, GemmShape],
    bits: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    num_layers: int,
    spec: AcceleratorSpec,
    host: Host,
    table: EnergyTable,
    *,
    rows: Mapping[str, np.ndarray] | None = None,
) -> HostRun:
    """Returns what the linear layers take on the host, one after the other.

    Args:
      gemm_shapes: Linear layers by site.
      bits: Widths, `<site>.weight_bits` and `<site>.activation_bits`, `[L]` (`[1]` outside the blocks).
      tokens: Tokens of each example, `[B]`.
      num_layers: L.
      spec: The machine.
      host: Its dense array.
      table: Prices.
      rows: Rows by site of a block, `[B, L]`, where they are not all tokens.
    """
    block_costs, end_costs = (
        [
            _host(gemm_shapes[site], site, bits, (rows or {}).get(site, tokens), spec, host, table)
            for site in sites
            if site in gemm_shapes
        ]
        for sites in (BLOCK_SITES, END_SITES)
    )
    none = np.zeros((len(tokens), num_layers))

    def side_by_side(name: str) -> np.ndarray:
        return np.concatenate([none[:, :0], *(cost[name] for cost in end_costs)], axis=1)

    return HostRun(
        cycles=sum((cost["cycles"] for cost in block_costs), start=none),
        energy_pj={
            part: sum((cost[part] for cost in block_costs), start=none) for part in HOST_PARTS
        },
        end_cycles=side_by_side("cycles"),
        end_energy_pj={part: side_by_side(part) for part in HOST_PARTS},
    )


def host_span(host: HostRun, watched: Watched, start: float) -> list[Span]:
    """Returns when the host runs the linear layers of a layer, which follow what the machine does itself."""
    cycles = float(host.cycles[watched.example, watched.layer])
    span = Span(part=HOST, name="linear layers", start=start, end=start + cycles)
    return [span] if cycles > 0.0 else []


def no_host(batch: int, num_layers: int) -> HostRun:
    """Returns what a machine without a host does on it."""
    none = np.zeros((batch, num_layers))
    return HostRun(cycles=none, energy_pj={}, end_cycles=none[:, :0], end_energy_pj={})


def _host(
    shape: GemmShape,
    site: str,
    bits: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    spec: AcceleratorSpec,
    host: Host,
    table: EnergyTable,
) -> dict[str, np.ndarray]:
    """Returns cycles and energy of one linear layer of `tokens` rows, `[B]` or `[B, L]`, on the host, `[B, L]`."""
    rows, cols = int(host.rows.value), int(host.cols.value)
    b_x = bits[f"{site}.activation_bits"][None, :]
    b_w = bits[f"{site}.weight_bits"][None, :]
    m = tokens if shape.rows is None else np.full_like(tokens, shape.rows)
    m = m[:, None] if m.ndim == 1 else m
    tiles = -(-shape.inner // rows) * -(-shape.outer // cols)
    passes = np.ceil(b_x / host.bits.value) * np.ceil(b_w / host.bits.value)
    fill = 2 * rows + cols - 2
    cycles = tiles * (fill + m) * passes - 1
    if host.prefetch_weights.value:
        cycles = tiles * m * passes + fill
    if host.scales_with_bits.value:
        cycles = cycles * b_x * b_w / (passes * host.bits.value**2)
    half_bits = host.sram.base * units.BITS_PER_BYTE / 2
    resident_rows = np.maximum(half_bits // (shape.inner * b_x), 1)
    resident_cols = np.maximum(half_bits // (shape.inner * b_w), 1)
    weights = shape.inner * shape.outer * b_w
    inputs = m * shape.inner * b_x
    moved = np.minimum(
        weights * np.maximum(np.ceil(m / resident_rows), 1) + inputs,
        weights + inputs * np.ceil(shape.outer / resident_cols),
    )
    moved_bytes = (moved + m * shape.outer * b_x) / units.BITS_PER_BYTE
    growth = np.sqrt(max(host.sram.base / table.sram_reference.base, 1.0))
    read_bytes = m * tiles * rows * b_x / units.BITS_PER_BYTE
    mac_pj = energy.multiply_pj(spec) * b_x * b_w + energy.add_pj(spec) * host.accumulator.value
    return {
        "cycles": np.maximum(cycles, moved_bytes / spec.dram_bytes_per_cycle),
        "host.mac": m * shape.inner * shape.outer * mac_pj,
        "host.sram": read_bytes * (table.sram.value * spec.energy_scale * growth),
        "host.dram": moved_bytes * energy.dram_pj_per_byte(spec),
    }
