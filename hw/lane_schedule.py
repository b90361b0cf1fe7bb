"""When the operations of layers run on lanes that take tiles, and what main memory brings meanwhile; NumPy only.

Operations are issued in order. One starts when those that it needs are done and its weights are there; its tiles go to the
lanes that are free first. All times are cycles of a whole batch, whose examples are alike.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from codesign.hw.lane_counts import Bytes, Operation

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
class Span:
    """When a part of the machine works on an operation."""

    unit: str
    name: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class LayerRun:
    """What a layer takes: its end, working time by unit and memory, and bytes that go to main memory and back."""

    end: float
    busy: dict[str, float]
    spilled: float
    spans: list[Span]


@dataclass
class _State:
    """When lanes and memories are free; what of main memory's time is taken, in order."""

    free: dict[str, np.ndarray]
    issued: dict[str, float]
    written: float = 0.0
    masked: float = 0.0
    loaded: float = 0.0
    taken: list[tuple[float, float]] = field(default_factory=list)
    # Weights held, each until its operation ends.
    held: list[tuple[float, float]] = field(default_factory=list)


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
    runs: list[LayerRun] = []
    for operations in layers:
        runs.append(_run_layer(operations, machine, state, runs[-1].end if runs else 0.0))
    return runs


def _run_layer(
    operations: Sequence[Operation], machine: LaneMachine, state: _State, entry: float
) -> LayerRun:
    busy = dict.fromkeys(("dram", "activation", "mask"), 0.0)
    spans: list[Span] = []
    ends: list[float] = []
    stored = spilled = 0.0
    for one in operations:
        ready = max((ends[need] for need in one.needs), default=entry)
        if one.loads.total:
            begin, arrived = _load(one.loads, machine, state)
            spans.append(Span(unit="dram", name=one.name, start=begin, end=arrived))
            busy["dram"] += one.loads.total / machine.dram_rate
            busy["weight"] = busy.get("weight", 0.0) + one.loads.data / machine.weight_rate
            busy["mask"] += one.loads.masks / machine.mask_rate
            if machine.overlaps:
                ready = max(ready, arrived)
        name = machine.unit_of[one.key]
        lanes = machine.units[name]
        cycles = np.tile(np.maximum(np.ceil(one.effectual / lanes.per_lane), 1.0), machine.batch)
        started = np.cumsum(np.tile(one.started, machine.batch)) / lanes.started_per_cycle
        issued = max(ready, state.issued[name])
        begin, end = deal(state.free[name], issued + np.append(0.0, started[:-1]), cycles, ready)
        if len(cycles):
            state.issued[name] = issued + started[-1]
            end = max(end, state.issued[name])
            spans.append(Span(unit=name, name=one.name, start=begin, end=end))
            busy[name] = busy.get(name, 0.0) + float(cycles.sum()) / lanes.number
            if np.isfinite(lanes.started_per_cycle):
                issue = f"{name}.issue"
                busy[issue] = busy.get(issue, 0.0) + float(started[-1])
        data, masks = (machine.batch * part for part in (one.writes.data, one.writes.masks))
        busy["activation"] += data / machine.activation_rate
        busy["mask"] += masks / machine.mask_rate
        if data or masks:
            # Tiles are written as they are done.
            state.written = max(state.written, begin) + data / machine.activation_rate
            state.masked = max(state.masked, begin) + masks / machine.mask_rate
            end = max(end, state.written, state.masked)
        surplus = max(stored + data - machine.activation_bytes, 0.0) - max(
            stored - machine.activation_bytes, 0.0
        )
        stored += data
        if surplus:
            spilled += 2.0 * surplus
            moved = 2.0 * surplus / machine.dram_rate
            busy["dram"] += moved
            back = _reserve(state.taken, begin, moved)
            spans.append(Span(unit="dram", name=one.name, start=begin, end=back))
            end = max(end, back) if machine.overlaps else end
        ends.append(end)
        if one.loads.total:
            state.held.append((one.loads.data, end))
    last = max([entry, *ends])
    if not machine.overlaps:
        last += busy["dram"]
        for free in state.free.values():
            np.maximum(free, last, out=free)
    return LayerRun(end=last, busy=busy, spilled=spilled, spans=spans)


def _load(loads: Bytes, machine: LaneMachine, state: _State) -> tuple[float, float]:
    """Returns when weights begin to come and are there: in order, and when those of earlier operations leave them room."""
    room = machine.weight_bytes - loads.data
    held = sum(size for size, _ in state.held)
    begin = state.loaded
    while state.held and held > room:
        size, until = state.held.pop(0)
        held -= size
        begin = max(begin, until)
    cycles = max(
        loads.total / machine.dram_rate,
        loads.data / machine.weight_rate,
        loads.masks / machine.mask_rate,
    )
    state.loaded = _reserve(state.taken, begin, cycles)
    return begin, state.loaded


def _reserve(taken: list[tuple[float, float]], start: float, cycles: float) -> float:
    """Takes the first time from `start` on that is free, in parts if need be, and returns the end."""
    now, left = start, cycles
    index = bisect.bisect_left(taken, (start, 0.0))
    if index and taken[index - 1][1] > now:
        now = taken[index - 1][1]
    while index < len(taken) and taken[index][0] < now + left:
        begin, end = taken[index]
        if begin > now:
            taken.insert(index, (now, begin))
            left -= begin - now
            index += 1
        now = max(now, end)
        index += 1
    if left > 0.0:
        taken.insert(index, (now, now + left))
    return now + left


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
