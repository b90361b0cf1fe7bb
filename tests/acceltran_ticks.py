"""AccelTran's simulator as it is written, cycle by cycle and tile by tile: what the event-driven one must equal."""

import math
from dataclasses import dataclass, field

from codesign.hw.acceltran_cycle import POOLS
from codesign.hw.acceltran_estimator import Machine
from codesign.hw.acceltran_program import EMBEDDING, Program, Transfer

PATIENCE = 3
"""Cycles in which nothing goes on, after which a run is taken to be without end."""


class Stuck(Exception):
    """The run stops or never ends."""


@dataclass
class Tile:
    kind: str
    service: int
    needs: tuple[str, ...]
    is_done: bool = False


@dataclass
class Unit:
    left: int = 0
    is_ready: bool = True
    tile: Tile | None = None
    busy: int = 0

    def tick(self) -> None:
        self.is_ready = self.left == 0
        if self.is_ready and self.tile is not None:
            self.tile.is_done = True
        if not self.is_ready:
            self.left -= 1
            self.busy += 1


@dataclass
class Datum:
    name: str
    elements: int
    is_required: bool


@dataclass
class Store:
    capacity: float
    bits: float
    load: float
    store: float
    held: list[Datum] = field(default_factory=list)
    arriving: str = ""
    left: int = 0
    moved: int = 0

    def used(self) -> float:
        return sum(one.elements for one in self.held) * self.bits

    def holds(self, name: str) -> bool:
        return name != self.arriving and any(one.name == name for one in self.held)

    def has_room(self, elements: int) -> bool:
        if elements * self.bits > self.capacity:
            raise Stuck("too large")
        if self.used() + elements * self.bits <= self.capacity:
            return True
        required = sum(one.elements for one in self.held if one.is_required)
        return self.capacity - required * self.bits > self.held[-1].elements * self.bits

    def enter(self, datum: Datum, is_load: bool) -> None:
        if self.holds(datum.name):
            return
        for old in list(self.held):
            if self.used() + datum.elements * self.bits > self.capacity and not old.is_required:
                self.held.remove(old)
        if self.used() + datum.elements * self.bits > self.capacity:
            raise Stuck("no room")
        self.held.append(datum)
        self.arriving = datum.name
        self.left = math.ceil(datum.elements * self.bits / (self.load if is_load else self.store))
        self.moved += self.left

    def tick(self, cycles: int = 1) -> None:
        self.left = max(self.left - cycles, 0)
        if self.left == 0:
            self.arriving = ""


class Ticks:
    """A run; `cycles`, `busy` and `moved` are what it took."""

    def __init__(
        self, program: Program, machine: Machine, activation_bits: float, weight_bits: float
    ) -> None:
        assert machine.issue_group is not None
        self.group = machine.issue_group
        bandwidths = (machine.main_bandwidth, machine.constants.buffer_bandwidth.value)
        self.stores = {
            name: Store(megabytes * 2**23, bits, *bandwidths)
            for name, megabytes, bits in (
                ("weight", machine.weight_mb, weight_bits),
                ("activation", machine.activation_mb, activation_bits),
                ("mask", machine.mask_mb, 1.0),
            )
        }
        counts = {"lane": machine.lanes, "softmax": machine.softmax_units, "norm": 1}
        self.elements = [
            {name: [Unit() for _ in range(count)] for name, count in counts.items()}
            for _ in range(machine.processing_elements)
        ]
        self.tiles: list[list[list[Tile]]] = []
        self.last: dict[tuple[int, int, int], Tile] = {}
        for index, block in enumerate(program.blocks):
            self.tiles.append([])
            for head, stream in enumerate(block):
                tiles: list[Tile] = []
                for number, one in enumerate(stream.operations):
                    tiles += [Tile(one.kind, one.service, one.needs) for _ in range(one.count)]
                    self.last[index, head, number] = tiles[-1]
                self.tiles[-1].append(tiles)
        self.moves: list[list[tuple[Transfer, ...]]] = [
            [(program.embedding,)],
            *([stream.transfers for stream in block] for block in program.blocks),
        ]
        self.block, self.at = 0, [0] * len(self.tiles[0])
        self.memory_block, self.memory_at = 0, [0]
        self.cycles = 0
        self.run()
        self.busy = {
            name: sum(unit.busy for element in self.elements for unit in element[name])
            for name in counts
        }
        self.moved = {name: one.moved for name, one in self.stores.items()}

    def units(self, kind: str) -> list[Unit]:
        return [unit for element in self.elements for unit in element[POOLS[kind]]]  # type: ignore[index]

    def groups(self) -> list[list[Tile]]:
        if self.block == len(self.tiles):
            return []
        size, block = self.group, self.tiles[self.block]
        found = []
        for tiles, start in zip(block, self.at, strict=True):
            window = tiles[start : start + size + (len(block) == 1 < size)]
            if len(block) == 1:
                other = [index for index, one in enumerate(window) if one.kind != window[0].kind]
                window = window[: other[0]] if other else window
            found.append([one for one in window if one.kind == window[0].kind])
        return found

    def memory(self) -> bool:
        started = False
        if self.memory_block == len(self.moves):
            return False
        streams, at = self.moves[self.memory_block], self.memory_at
        mask = self.stores["mask"]
        order = sorted(range(len(streams)), key=lambda head: at[head])
        for head in [one for one in order if at[one] < len(streams[one])]:
            move = streams[head][at[head]]
            store = self.stores[move.storage]
            is_done = (
                move.producer is None
                or self.last[self.memory_block - 1, head, move.producer].is_done
            )
            if store.left or mask.left or not is_done:
                continue
            if store.has_room(move.elements) and mask.has_room(move.elements):
                datum = Datum(move.data, move.elements, move.data == EMBEDDING)
                store.enter(datum, move.producer is None)
                mask.enter(datum, move.producer is None)
                at[head] += 1
                started = True
        if all(position == len(one) for position, one in zip(at, streams, strict=True)):
            self.memory_block += 1
            if self.memory_block < len(self.moves):
                self.memory_at = [0] * len(self.moves[self.memory_block])
        return started

    def issue(self, groups: list[list[Tile]]) -> list[int]:
        issued = []
        for head, group in enumerate(groups):
            if not group:
                continue
            sources = (self.stores["activation"], self.stores["weight"])
            units = [unit for unit in self.units(group[0].kind) if unit.is_ready]
            if len(units) < len(group) or not all(
                any(source.holds(name) for source in sources) for one in group for name in one.needs
            ):
                continue
            for tile in group:
                free = [
                    taken
                    for element in self.elements
                    if (taken := [u for u in element[POOLS[tile.kind]] if u.is_ready])  # type: ignore[index]
                ]
                if not free:
                    raise Stuck("no element")
                for unit in free[0] if tile.kind == "softmax" else free[0][:1]:
                    unit.tile, unit.left, unit.is_ready = tile, tile.service, False
            issued.append(head)
        return issued

    def flags(self, groups: list[list[Tile]]) -> None:
        """Data of a done operation are let go, those of the present groups are required."""
        done: list[Tile] = []
        for block in self.tiles:
            for tiles in block:
                for one in tiles:
                    if not one.is_done:
                        break
                    done.append(one)
            if len(block) == 1 and not all(one.is_done for one in block[0]):
                break
        wanted = [one for group in groups for one in group]
        for value, tiles in ((False, done), (True, wanted)):
            names = {name for one in tiles for name in one.needs}
            for store in self.stores.values():
                for datum in store.held:
                    if datum.name in names and store.holds(datum.name):
                        datum.is_required = value

    def advance(self, issued: list[int]) -> None:
        block, size = self.tiles[self.block], self.group
        for head in issued:
            total = len(block[head])
            if len(block) > 1:
                self.at[head] = self.at[head] + size if self.at[head] < total - size else total
                continue
            limit = total - 1 if self.block == len(self.tiles) - 1 else total
            step = min(self.at[head] + size, limit)
            self.at[head] = step if self.at[head] < limit else total
        if all(at == len(tiles) for at, tiles in zip(self.at, block, strict=True)):
            self.block += 1
            if self.block < len(self.tiles):
                self.at = [0] * len(self.tiles[self.block])

    def run(self) -> None:
        final = self.tiles[-1][-1][-1]
        units = [unit for element in self.elements for pool in element.values() for unit in pool]
        idle = 0
        while not final.is_done:
            has_moves = self.memory_block < len(self.moves)
            has_started = self.memory()
            groups = self.groups()
            issued = self.issue(groups)
            for unit in units:
                unit.tick()
            for store in self.stores.values():
                store.tick()
            self.flags(groups)
            self.cycles += 1
            is_at_rest = not any(store.left for store in self.stores.values()) and all(
                unit.is_ready for unit in units
            )
            idle = idle + 1 if is_at_rest and not has_started and not issued else 0
            if idle > PATIENCE:
                raise Stuck("no end")
            if has_moves and not has_started and all(unit.is_ready for unit in units):
                left = [store.left for store in self.stores.values() if store.left]
                if left and min(left) > 1:
                    for store in self.stores.values():
                        store.tick(min(left))
                    self.cycles += min(left)
            if issued:
                self.advance(issued)
