"""Loop nests on an array with memories: what crosses each memory's ports, the energy and the cycles of it; NumPy only.

A crossing lies between a memory and what is below it, the array or another memory. Arrays are over candidates `[P]`.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from codesign.hw.loop_nests import CONCERNS, OPERANDS, Cuts, Floats, Mask, Nests, Operand, at
from codesign.hw.nest_search import best_cuts
from codesign.hw.port_timing import Transfer, loading, stall
from codesign.hw.tool_switches import Dataflow, Memory, ToolModel

FILLING_ORDER: tuple[Operand, ...] = ("input", "weight", "output")
"""Operands of a memory as it is filled; of cuts that are equally good, the last one of the first operand is taken."""


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """The values of an operand between two memories, or the array and a memory, `[P]` each.

    Attributes:
      operand: Whose values move.
      level: Memories of the operand below.
      low: The memory below; None: the array.
      high: The memory above.
      alone_bits: Bits of a transfer at one place of the array.
      all_bits: Bits of a transfer in all.
      places: Places that hold different values.
      period: Cycles from one transfer to the next.
      count: Transfers.
      goes_on: Whether sums go on above, so that they come back.
      first: Of the transfers, those of the first sums, which come back as zeros.
    """

    operand: Operand
    level: int
    low: str | None
    high: str
    alone_bits: Floats
    all_bits: Floats
    places: Floats
    period: Floats
    count: Floats
    goes_on: Mask
    first: Floats


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One side of a crossing in one direction.

    Attributes:
      crossing: The crossing.
      memory: Whose port it takes.
      is_read: Whether the memory is read.
      is_return: Whether partial sums go back towards the array.
      bits: Bits of a transfer at one instance of the memory, `[P]`.
      instances: Instances that each move as much, `[P]`.
      count: Transfers; 0 where there are none, `[P]`.
      charged: Transfers that cost energy, `[P]`.
    """

    crossing: Crossing
    memory: str
    is_read: bool
    is_return: bool
    bits: Floats
    instances: Floats
    count: Floats
    charged: Floats

    def port(self, memory: Memory) -> tuple[object, ...]:
        """Returns what names the leg's port."""
        operand = self.crossing.operand
        match memory.ports:
            case "one":
                return (self.memory,)
            case "direction":
                return (self.memory, self.is_read)
            case "operand":
                return (self.memory, self.is_read, operand)
            case "transfer":
                return (self.memory, self.is_read, operand, self.is_return)


@dataclass(frozen=True, kw_only=True)
class MappedNests:
    """Nests with the place of every operand in every memory.

    Attributes:
      model: The tool and its machine.
      dataflow: What stays in the array.
      nests: The loops, `[P, L]`.
      places: Places of the array along M, N and K, on average over its tiles, `[P, 3]`.
      cuts: Cut of each operand in each of its memories but main memory, from the array outwards.
    """

    model: ToolModel
    dataflow: Dataflow
    nests: Nests
    places: Floats
    cuts: dict[Operand, list[Cuts]] = dataclasses.field(default_factory=dict)

    def filled(self) -> tuple["MappedNests", Mask]:
        """Returns the nests with every memory filled so that the least crosses its upper side, and which fit, `[P]`.

        Memories are filled from the array outwards, registers first.
        """
        paths, memories = self.model.paths[self.dataflow], self.model.memories
        cuts: dict[Operand, list[Cuts]] = {operand: [] for operand in OPERANDS}
        first = np.zeros(self.nests.dims.shape[0], int)
        all_fit = np.ones(len(first), bool)
        for name in sorted(memories, key=lambda name: not memories[name].is_register):
            held = [op for op in FILLING_ORDER if name in paths[op][:-1]]
            if not held:
                continue
            starts = {op: cuts[op][-1] if cuts[op] else first for op in held}
            bits: dict[Operand, Floats] = {}
            for op in held:
                width = self._width(op, starts[op])
                share = 1.0 if memories[name].is_register else self._places_of(op, self.places)
                bits[op] = self.nests.values(op) * (width * share)[:, None]
            best, fit = best_cuts(self.nests, starts, bits, memories[name].capacity_bits)
            all_fit &= fit
            for op in held:
                cuts[op].append(best[op])
        return dataclasses.replace(self, cuts=cuts), all_fit

    def fits(self) -> Mask:
        """Returns whether every memory holds what is kept in it, `[P]`."""
        held: dict[str, Floats] = defaultdict(lambda: np.zeros(len(self.places)))
        for operand, path in self.model.paths[self.dataflow].items():
            for name, cut in zip(path, self.cuts[operand], strict=False):
                held[name] = held[name] + self._kept_bits(operand, name, cut, self.places)
        capacities = {name: self.model.memories[name].capacity_bits for name in held}
        fit = [bits <= capacities[name] for name, bits in held.items()]
        return np.asarray(np.all(fit, axis=0))

    def energy_pj(self) -> Floats:
        """Returns the energy of all memories, pJ."""
        total = np.zeros(len(self.places))
        for leg in self._legs(self.places):
            memory = self.model.memories[leg.memory]
            bits = np.ceil(leg.bits / memory.granule_bits) * memory.granule_bits
            bits = bits * leg.charged * leg.instances
            if self.model.switches.whole_words:
                bits = np.floor(bits / memory.port_bits) * memory.port_bits
            total += bits * (memory.read_pj if leg.is_read else memory.write_pj)
        return total

    def cycles(self) -> Floats:
        """Returns the cycles of the run."""
        ports: dict[tuple[object, ...], list[Leg]] = defaultdict(list)
        for leg in self._legs(np.floor(self.places)):
            ports[leg.port(self.model.memories[leg.memory])].append(leg)
        total = self.nests.cycles()[:, -1]
        if self.model.switches.perfect_overlap:
            busy = [self._busy(port) for port in ports.values()]
            return np.asarray(np.max([total, *busy], axis=0))
        doubled = self._double_buffered()
        seen = {name: [self._transfer(leg, doubled) for leg in ports[name]] for name in ports}
        late = [stall(transfers, total) for transfers in seen.values()]
        total = total + np.maximum(0.0, np.max(late, axis=0))
        if not self.model.switches.on_and_off_loading:
            return np.asarray(total)
        outside: dict[tuple[Operand, int], Floats] = defaultdict(lambda: np.zeros_like(total))
        for name, legs in ports.items():
            width = self.model.memories[legs[0].memory].port_bits
            for leg, cycles in zip(legs, loading(seen[name], width, total), strict=True):
                # Both sides of a crossing move the same values at the same time.
                key = leg.crossing.operand, leg.crossing.level
                outside[key] = np.maximum(outside[key], cycles)
        ends = dict.fromkeys(OPERANDS, np.zeros_like(total))
        for (operand, level), cycles in outside.items():
            if level:  # between memories; the array takes and gives in its own cycles
                ends[operand] = ends[operand] + cycles
        return np.asarray(total + np.maximum(ends["input"], ends["weight"]) + ends["output"])

    def _busy(self, port: list[Leg]) -> Floats:
        """Returns the cycles for which a port, of a register: each one, moves bits."""
        bits = np.sum([leg.bits * leg.charged for leg in port], axis=0)
        return np.asarray(bits / self.model.memories[port[0].memory].port_bits)

    def _crossings(self, places: Floats) -> Iterator[Crossing]:
        """Yields every crossing.

        Args:
          places: Places of the array along M, N and K, `[P, 3]`.
        """
        nests, memories = self.nests, self.model.memories
        cycles = nests.cycles()
        array = np.zeros(len(places), int)
        for operand in OPERANDS:
            path = self.model.paths[self.dataflow][operand]
            exact = self._places_of(operand, places)
            whole = np.round(exact)
            values = nests.values(operand)
            cuts = [array, *self.cuts[operand]]
            for level, (cut, high) in enumerate(zip(cuts, path, strict=True)):
                low = path[level - 1] if level else None
                changes = nests.stays(operand, cut)
                is_held = operand != "output" and self.model.switches.holds_last_value
                if low is None and not is_held:
                    changes = array
                period = at(cycles, changes)
                inside = at(values, cut)
                # A tile within one memory has its own number of values; places of the array move one each, all of them.
                is_tile = low is not None and not memories[low].is_register
                width = self._width(operand, changes)
                yield Crossing(
                    operand=operand,
                    level=level,
                    low=low,
                    high=high,
                    alone_bits=inside * width,
                    all_bits=(np.round(inside * exact) if is_tile else inside * whole) * width,
                    places=whole,
                    period=period,
                    count=cycles[:, -1] / period,
                    goes_on=nests.has_inner(changes),
                    first=values[:, -1] / inside,
                )

    def _legs(self, places: Floats) -> Iterator[Leg]:
        """Yields both sides of every crossing in every direction; `places` as in `_crossings`."""
        for crossing in self._crossings(places):
            is_output = crossing.operand == "output"
            skipped = 0.0 if self.model.switches.reads_first_partial_sum else crossing.first
            for is_return in (False, True) if is_output else (False,):
                count = charged = crossing.count
                if is_return:
                    count = np.where(crossing.goes_on, count, 0.0)
                    charged = np.where(crossing.goes_on, charged - skipped, 0.0)
                is_upward = is_output and not is_return
                for name, is_read in ((crossing.low, is_upward), (crossing.high, not is_upward)):
                    if name is None:
                        continue
                    is_alone = self.model.memories[name].is_register
                    yield Leg(
                        crossing=crossing,
                        memory=name,
                        is_read=is_read,
                        is_return=is_return,
                        bits=crossing.alone_bits if is_alone else crossing.all_bits,
                        instances=crossing.places if is_alone else np.ones_like(crossing.places),
                        count=count,
                        charged=charged,
                    )

    def _transfer(self, leg: Leg, doubled: dict[tuple[Operand, int], Mask]) -> Transfer:
        """Returns a leg as its port sees it."""
        crossing, memory = leg.crossing, self.model.memories[leg.memory]
        operand, level = crossing.operand, crossing.level
        window = crossing.period
        if level:
            low, high = self._bounds(operand, level)
            free = self.nests.outermost(operand, low, high, concerned=False)
            window = np.where(doubled[operand, level], window, np.floor(window / free))
        lowest = self.model.paths[self.dataflow][operand][0]
        cut = self.cuts[operand][0]
        least = self._kept_bits(operand, lowest, cut, np.floor(self.places))
        return Transfer(
            needed=np.ceil(leg.bits / memory.port_bits),
            window=window,
            period=crossing.period,
            count=leg.count,
            rate_bits=leg.bits / crossing.period,
            least=np.ceil(least / memory.port_bits),
            is_loading=not leg.is_return,
        )

    def _double_buffered(self) -> dict[tuple[Operand, int], Mask]:
        """Returns whether the memory below a crossing has room for the next contents, by operand and level, `[P]`.

        What is replaced piece by piece, along its outermost loops, needs room for the next piece only. Operands that share
        a memory are taken in turn: each must fit beside what the others and earlier next pieces take.
        """
        share: dict[tuple[Operand, int], Floats] = {}
        used: dict[str, Floats] = defaultdict(lambda: np.zeros(len(self.places)))
        paths = self.model.paths[self.dataflow]
        crossings = [
            (operand, level, paths[operand][level - 1])
            for operand in OPERANDS
            for level in range(1, len(paths[operand]))
        ]
        for operand, level, name in crossings:
            low, high = self._bounds(operand, level)
            bits = self._kept_bits(operand, name, self.cuts[operand][level - 1], self.places)
            piece = bits // self.nests.outermost(operand, low, high, concerned=True)
            share[operand, level] = piece / self.model.memories[name].capacity_bits
            used[name] = used[name] + share[operand, level]
        found = {}
        for operand, level, name in crossings:
            half = used[name] <= 0.5
            beside = ~half & (share[operand, level] <= 1.0 - used[name])
            used[name] = used[name] + np.where(beside, share[operand, level], 0.0)
            found[operand, level] = half | beside
        return found

    def _bounds(self, operand: Operand, level: int) -> tuple[Cuts, Cuts]:
        """Returns between which cuts the loops of the memory below a crossing lie."""
        own = [self.nests.stays(operand, cut) for cut in self.cuts[operand]]
        return (own[level - 2] if level > 1 else np.zeros_like(own[0])), own[level - 1]

    def _kept_bits(self, operand: Operand, name: str, cut: Cuts, places: Floats) -> Floats:
        """Returns the bits of an operand in a memory; of a register, at one place of the array."""
        alone = self.model.memories[name].is_register
        values = at(self.nests.values(operand), cut)
        if not alone:
            values = np.round(values * self._places_of(operand, places))
        return values * self._width(operand, self.nests.stays(operand, cut))

    def _width(self, operand: Operand, cut: Cuts) -> Floats:
        """Returns the bits of a value that leaves a cut."""
        whole = np.full(len(cut), self.model.bits)
        if operand != "output":
            return whole
        return np.where(self.nests.has_inner(cut), self.model.switches.partial_sum_bits, whole)

    @staticmethod
    def _places_of(operand: Operand, places: Floats) -> Floats:
        """Returns the places of the array that hold different values of an operand."""
        return np.asarray(np.prod(places[:, CONCERNS[operand]], axis=1))
