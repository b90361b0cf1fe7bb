"""What another tool assumes about a dense product, by name: switches, memories, and the two together."""

from dataclasses import dataclass
from typing import Literal

from codesign.hw.loop_nests import Operand

Dataflow = Literal["weight_stationary", "output_stationary", "input_stationary"]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """A memory between the array and main memory, or main memory.

    Attributes:
      read_pj, write_pj: Energy of a bit.
      capacity_bits: What it holds; of a register, at one place of the array.
      port_bits: Bits that a port moves in a cycle.
      granule_bits: An access is charged a multiple of this; at most the port's width.
      is_register: Whether every place of the array has one.
      ports: What shares a port: everything (`one`), reads or writes of an operand (`operand`), nothing (`transfer`), or
        reads or writes of all operands (`direction`).
    """

    read_pj: float
    write_pj: float
    capacity_bits: float
    port_bits: float
    granule_bits: float
    is_register: bool = False
    ports: Literal["one", "operand", "transfer", "direction"] = "operand"


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What a tool assumes.

    Attributes:
      mapping: How loops are chosen: `fixed` (tiles of the array, one after another), `orders` (all orders of at most six
        factors, memories filled greedily), `divisors` (all exact tilings).
      objective: What the chosen nest minimises: energy, then cycles; or energy times cycles.
      fill_and_drain: Whether each tile of the array waits for its operands to enter and its results to leave.
      weights_prefetched: Whether the next tile's weights enter behind the present ones.
      exact_divisors: Whether a side of the array is cut to a divisor of its dimension; else its last tile is partly idle.
      perfect_overlap: Whether the slowest of array and ports sets the time; else ports stall the array as
        `codesign.hw.port_timing` says.
      on_and_off_loading: Whether the first operands and the last results take time besides.
      partial_sum_bits: Width of sums that go on.
      reads_first_partial_sum: Whether the first partial sum, zero, is read too.
      holds_last_value: Whether an input that the next cycle wants again is not read again.
      whole_words: Whether a part of a port word, summed over a run, is not charged.
    """

    mapping: Literal["fixed", "orders", "divisors"]
    objective: Literal["energy", "energy_delay"] = "energy"
    fill_and_drain: bool = False
    weights_prefetched: bool = False
    exact_divisors: bool = False
    perfect_overlap: bool = False
    on_and_off_loading: bool = False
    partial_sum_bits: float = 32.0
    reads_first_partial_sum: bool = False
    holds_last_value: bool = False
    whole_words: bool = False


@dataclass(frozen=True, kw_only=True)
class ToolModel:
    """A tool and the machine that it was given.

    Attributes:
      name: Package and version.
      switches: What it assumes.
      dataflows: Those it was run with.
      bits: Width of operands and results.
      mac_pj: Energy of a multiplication with its addition.
      memories: By name.
      paths: Memories of each operand from the array outwards, by dataflow.
    """

    name: str
    switches: Switches
    dataflows: tuple[Dataflow, ...]
    bits: float = 8.0
    mac_pj: float = 0.0
    memories: dict[str, Memory]
    paths: dict[Dataflow, dict[Operand, tuple[str, ...]]]
