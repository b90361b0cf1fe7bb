"""When the operations of layers run on lanes that take tiles, and what main memory brings meanwhile; NumPy only.

An operation is issued when those that it needs are done and its weights are there, the first that is ready first; its
tiles go to the lanes that are free first. All times are cycles of a whole batch, whose examples are alike.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from codesign.hw.lane_counts import Operation
from codesign.hw.timeline import DRAM, Span

GROUPS = 8
"""Tiles are dealt to this part of the lanes at a time, those that are free first."""
LEAST_GROUP = 32
"""Lanes that are dealt to together, at least."""


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """A kind of unit: how many lanes, what one finishes in a cycle, and how many products all may start in one."""

    number: int
    per_lane: float
    started_per_cycle: float = np.inf


@dataclass(frozen=True, kw_only=True)
class LaneMachine:
    """Units by operation, and memories: byte per cycle and byte of capacity.

    `overlaps`: whether main memory moves while lanes work; else an operation neither waits for it nor hides it.
    """

    units: Mapping[str, Lanes]
    unit_of: Mapping[str, str]
    dram_rate: float
    weight_rate: float
    activation_rate: float
    mask_rate: float
    activation_bytes: float
    weight_bytes: float
    batch: int
    overlaps: bool


@dataclass(frozen=True, kw_only=True)
class LayerRun:
    """What a layer takes: its begin and end, working time by unit and memory, bytes that go to main memory and back.

    `spans` are of units and main memory; weights may come before the layer begins.
    """

    begin: float
    end: float
    busy: dict[str, float]
    spilled: float
    spans: list[Span]


@dataclass
class _State:
    """When lanes and memories are free, and what has been decided so far.

    Attributes:
      free: When each lane is, by unit.
      issued: When the last tile has been issued, by unit.
      written: When the memory of the activations is free.
      masked: When that of their masks is.
      taken: Times of main memory, in order.
      spilling: Those among them of what does not fit on chip.
      loaded: When the last weights came.
      num_loaded: Operations, in order, whose weights have a time.
      held: Weights on chip, byte, by the operation that needs them, in order.
      arrived: When the weights of operations are there.
      moving: When they move.
      ends: When operations are done.
    """

    free: dict[str, np.ndarray]
    issued: dict[str, float]
    written: float = 0.0
    masked: float = 0.0
    taken: list[tuple[float, float]] = field(default_factory=list)
    spilling: list[tuple[float, float]] = field(default_factory=list)
    loaded: float = 0.0
    num_loaded: int = 0
    held: list[tuple[float, int]] = field(default_factory=list)
    arrived: dict[int, float] = field(default_factory=dict)
    moving: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    ends: dict[int, float] = field(default_factory=dict)


@dataclass
class _Found:
    """What a layer has taken so far; `stored`: bytes that it has written, of a batch."""

    busy: dict[str, float]
    spans: list[Span]
    stored: float = 0.0
    spilled: float = 0.0


def run_layers(layers: Sequence[Sequence[Operation]], machine: LaneMachine) -> list[LayerRun]:
    """Runs layers one after the other; weights of later ones are loaded while earlier ones run.

    Args:
      layers: Operations of each, of one example.
      machine: The machine.
    """
    state = _State(
        free={name: np.zeros(lanes.number) for name, lanes in machine.units.items()},
        issued=dict.fromkeys(machine.units, 0.0),
    )
    operations = [one for layer in layers for one in layer]
    runs: list[LayerRun] = []
    first = 0
    for layer in layers:
        places = range(first, first + len(layer))
        entry = runs[-1].end if runs else 0.0
        runs.append(_run_layer(operations, places, machine, state, entry))
        first = places.stop
    return runs


def _run_layer(
    operations: Sequence[Operation],
    places: range,
    machine: LaneMachine,
    state: _State,
    entry: float,
) -> LayerRun:
    found = _Found(busy=dict.fromkeys(("dram", "activation", "mask"), 0.0), spans=[])
    left = list(places)
    while left:
        _load(operations, machine, state)
        ready = {}
        for place in left:
            needs = [places.start + need for need in operations[place].needs]
            if place in state.arrived and all(need in state.ends for need in needs):
                times = [state.ends[need] for need in needs]
                ready[place] = max([entry, *times, state.arrived[place]])
        place = min(ready, key=lambda one: (ready[one], one))
        left.remove(place)
        state.ends[place] = _execute(operations[place], ready[place], machine, state, found)
    last = max([entry, *(state.ends[place] for place in places)])
    for place in places:
        loads = operations[place].loads
        if loads.total:
            _add(found.busy, "dram", loads.total / machine.dram_rate)
            _add(found.busy, "weight", loads.data / machine.weight_rate)
            _add(found.busy, "mask", loads.masks / machine.mask_rate)
        moving = state.moving.pop(place, [])
        found.spans += _moved(operations[place].name, moving)
    if not machine.overlaps:
        found.spans += _moved("weights and what does not fit", [(last, last + found.busy["dram"])])
        last += found.busy["dram"]
    return LayerRun(
        begin=entry, end=last, busy=found.busy, spilled=found.spilled, spans=found.spans
    )


def _moved(name: str, times: Sequence[tuple[float, float]]) -> list[Span]:
    return [Span(part=DRAM, name=name, start=begin, end=end) for begin, end in times if end > begin]


def _execute(
    one: Operation, ready: float, machine: LaneMachine, state: _State, found: _Found
) -> float:
    """Deals the tiles of an operation and writes its result; returns when that is there."""
    name = machine.unit_of[one.key]
    lanes = machine.units[name]
    cycles = np.tile(np.maximum(np.ceil(one.effectual / lanes.per_lane), 1.0), machine.batch)
    started = np.cumsum(np.tile(one.started, machine.batch)) / lanes.started_per_cycle
    issued = max(ready, state.issued[name])
    begin, end = deal(state.free[name], issued + np.append(0.0, started[:-1]), cycles, ready)
    if len(cycles):
        state.issued[name] = issued + float(started[-1])
        end = max(end, state.issued[name])
        found.spans.append(Span(part=name, name=one.name, start=begin, end=end))
        _add(found.busy, name, float(cycles.sum()) / lanes.number)
        if np.isfinite(lanes.started_per_cycle):
            _add(found.busy, f"{name}.issue", float(started[-1]))
    data, masks = (machine.batch * part for part in (one.writes.data, one.writes.masks))
    _add(found.busy, "activation", data / machine.activation_rate)
    _add(found.busy, "mask", masks / machine.mask_rate)
    if data or masks:
        # Tiles are written as they are done.
        state.written = max(state.written, begin) + data / machine.activation_rate
        state.masked = max(state.masked, begin) + masks / machine.mask_rate
        end = max(end, state.written, state.masked)
    over = max(found.stored - machine.activation_bytes, 0.0)
    found.stored += data
    surplus = max(found.stored - machine.activation_bytes, 0.0) - over
    if surplus:
        # What does not fit goes to main memory, and comes back before it is needed.
        found.spilled += 2.0 * surplus
        moved = 2.0 * surplus / machine.dram_rate
        _add(found.busy, "dram", moved)
        if machine.overlaps:
            times = _spill(state, begin, moved)
            found.spans += _moved(one.name, times)
            end = max(end, times[-1][1])
    return end


def _load(operations: Sequence[Operation], machine: LaneMachine, state: _State) -> None:
    """Gives weights their time, in order, as far as it is known when those of earlier operations leave them room."""
    while state.num_loaded < len(operations):
        place = state.num_loaded
        loads = operations[place].loads
        begin = state.loaded
        if not loads.total or not machine.overlaps:
            state.arrived[place] = 0.0
            state.num_loaded += 1
            continue
        held = sum(size for size, _ in state.held)
        while state.held and held + loads.data > machine.weight_bytes:
            size, user = state.held[0]
            if user not in state.ends:
                return
            held -= size
            state.loaded = begin = max(begin, state.ends[user])
            state.held.pop(0)
        cycles = max(
            loads.total / machine.dram_rate,
            loads.data / machine.weight_rate,
            loads.masks / machine.mask_rate,
        )
        state.moving[place] = _reserve(state.taken, begin, cycles)
        state.arrived[place] = state.loaded = state.moving[place][-1][1]
        state.held.append((loads.data, place))
        state.num_loaded += 1


def _add(busy: dict[str, float], name: str, cycles: float) -> None:
    busy[name] = busy.get(name, 0.0) + cycles


def _spill(state: _State, start: float, cycles: float) -> list[tuple[float, float]]:
    """Gives what does not fit on chip main memory from `start` on, but for earlier such, and returns its times.

    An operation waits for it: weights that were to come ahead of their need meanwhile come later, in their order. None of
    them has been used, since an operation that is issued has waited no longer than this one.
    """
    times = _reserve(state.spilling, start, cycles)
    late = {
        place: [(max(begin, start), end) for begin, end in moving if end > start]
        for place, moving in state.moving.items()
    }
    kept = [(begin, min(end, start)) for begin, end in state.taken if begin < start]
    after = [(max(begin, start), end) for begin, end in state.spilling if end > start]
    state.taken = kept + after
    for place in sorted(place for place, parts in late.items() if parts):
        left = sum(end - begin for begin, end in late[place])
        again = _reserve(state.taken, late[place][0][0], left)
        moving = [(begin, min(end, start)) for begin, end in state.moving[place] if begin < start]
        state.moving[place] = moving + again
        state.arrived[place] = again[-1][1]
        state.loaded = max(state.loaded, again[-1][1])
    return times


def _reserve(
    taken: list[tuple[float, float]], start: float, cycles: float
) -> list[tuple[float, float]]:
    """Takes the first times from `start` on that are free, in parts if need be, and returns them."""
    now, left = start, cycles
    found: list[tuple[float, float]] = []
    index = bisect.bisect_left(taken, (start, 0.0))
    if index and taken[index - 1][1] > now:
        now = taken[index - 1][1]
    while index < len(taken) and taken[index][0] < now + left:
        begin, end = taken[index]
        if begin > now:
            taken.insert(index, (now, begin))
            found.append((now, begin))
            left -= begin - now
            index += 1
        now = max(now, end)
        index += 1
    found.append((now, now + left))
    if left > 0.0:
        taken.insert(index, found[-1])
    return found


def deal(
    free: np.ndarray, issued: np.ndarray, cycles: np.ndarray, ready: float
) -> tuple[float, float]:
    """Deals tiles in order to the lanes that are free first, and returns when the first starts and the last ends.

    Args:
      free: When each lane is free; changed.
      issued: Before when each tile cannot start, rising; its end may hold more than there are tiles.
      cycles: Time of each tile, `[N]`.
      ready: What both are without tiles.
    """
    if not len(cycles):
        return ready, ready
    number = len(free)
    group = max(number // GROUPS, min(number, LEAST_GROUP))
    begin, end = np.inf, 0.0
    for first in range(0, len(cycles), group):
        part = cycles[first : first + group]
        size = len(part)
        chosen = np.argpartition(free, size - 1)[:size]
        chosen = chosen[np.argsort(free[chosen], kind="stable")]
        starts = np.maximum(free[chosen], issued[first : first + size])
        free[chosen] = starts + part
        begin, end = min(begin, float(starts[0])), max(end, float(free[chosen].max()))
    return begin, end
