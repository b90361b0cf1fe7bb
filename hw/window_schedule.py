"""When windows of rows pass units that follow one another, and groups of lanes that share their tasks; plain Python.

Axes: H heads, W windows. All times are cycles.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from codesign.hw.timeline import Span

_HEAD, _LINEAR = range(2)


@dataclass(frozen=True)
class Stretch:
    """A group, or a unit chained to the heads' work, works on a window from start to end; `head` -1: on all of it."""

    group: int
    window: int
    head: int
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Passage:
    """How windows passed: when each has left, `[W]`, and what groups and chained units, `[U]`, did meanwhile."""

    done: np.ndarray
    groups: list[Stretch]
    beside: list[list[Stretch]]

    def spans(self, units: Sequence[str]) -> list[Span]:
        """Returns what units did, those of the groups first, then the chained ones."""
        return [
            Span(
                part=unit,
                group=one.group,
                name=f"window {one.window}",
                start=one.start,
                end=one.end,
            )
            for unit, stretches in zip(units, [self.groups, *self.beside], strict=True)
            for one in stretches
            if one.end > one.start
        ]


def chained(
    ready: np.ndarray, least: np.ndarray, cycles: np.ndarray, free: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns starts and ends of windows in a unit that takes them in order, `[W]`.

    Args:
      ready: When each may start.
      least: Before when none may end: the unit that it is chained to has not ended the window yet.
      cycles: Time of each.
      free: When the unit is free.
    """
    starts, ends = np.zeros(len(cycles)), np.zeros(len(cycles))
    for index, each in enumerate(cycles):
        starts[index] = max(ready[index], free)
        free = ends[index] = max(starts[index] + each, least[index])
    return starts, ends


@dataclass(frozen=True, kw_only=True)
class GroupWork:
    """What groups of lanes do with the windows of a layer; cycles.

    Attributes:
      make: Of one group for the keys and values that a head's window is the first to want, `[H, W]`.
      query: Of the same group for the window's queries of that head, `[H, W]`.
      attend: Of the same group for attention, `[H, W]`.
      linear: Of every group for a window behind its heads, `[W]`.
      beside: Of units chained to the heads' work, in order, `[U][W]`.
      groups: Number of groups.
      shares_heads: Whether any group takes any head; else head h is of group h modulo the groups.
    """

    make: np.ndarray
    query: np.ndarray
    attend: np.ndarray
    linear: np.ndarray
    beside: list[np.ndarray]
    groups: int
    shares_heads: bool


def run_groups(work: GroupWork, ready: np.ndarray) -> Passage:
    """Returns how windows pass.

    A group that is free takes the task of the earliest window that may start; a head's attention waits, on its group,
    until tasks of earlier windows have made the keys it wants of them.

    Args:
      work: The tasks.
      ready: When each window may start, `[W]`, not falling.
    """
    heads, windows = work.make.shape
    groups = work.groups
    # Tasks `(window, kind, head)` of a group's own, and those that any group takes.
    own: list[list[tuple[int, int, int]]] = [[] for _ in range(groups)]
    shared: list[tuple[int, int, int]] = []
    # Events `(time, number, group, window, kind)`; a group below 0 says that a window is ready for a kind.
    events: list[tuple[float, int, int, int, int]] = []
    number = 0
    left = {_HEAD: np.full(windows, heads), _LINEAR: np.full(windows, groups)}
    first, last, done = np.full(windows, np.inf), np.zeros(windows), np.zeros(windows)
    made = np.zeros(heads)
    idle = list(range(groups))
    beside_free, passed = [0.0] * len(work.beside), 0
    worked: list[Stretch] = []
    beside: list[list[Stretch]] = [[] for _ in work.beside]

    def at(time: float, group: int, window: int, kind: int) -> None:
        nonlocal number
        heapq.heappush(events, (time, number, group, window, kind))
        number += 1

    for window in range(windows):
        at(float(ready[window]), -1, window, _HEAD)
    while events:
        now = events[0][0]
        while events and events[0][0] == now:
            _, _, group, window, kind = heapq.heappop(events)
            if group < 0:
                for head in range(heads if kind == _HEAD else groups):
                    any_group = kind == _HEAD and work.shares_heads
                    heapq.heappush(
                        shared if any_group else own[head % groups], (window, kind, head)
                    )
                continue
            idle.append(group)
            left[kind][window] -= 1
            if left[kind][window]:
                continue
            if kind == _LINEAR:
                done[window] = max(done[window], now)
            else:
                last[window] = now
                # Chained units take windows in order, whichever is ended first.
                while passed < windows and not left[_HEAD][passed]:
                    starts, ends = first[passed], last[passed]
                    for index, cycles in enumerate(work.beside):
                        starts = max(starts, beside_free[index])
                        own_end = float(starts + cycles[passed])
                        beside[index].append(Stretch(0, passed, -1, float(starts), own_end))
                        ends = beside_free[index] = max(own_end, ends)
                    done[passed] = ends
                    if work.linear[passed]:
                        at(max(float(ends), now), -1, passed, _LINEAR)
                    passed += 1
        idle.sort()
        waiting = []
        for group in idle:
            queue = own[group]
            if shared and (not queue or shared[0] < queue[0]):
                queue = shared
            if not queue:
                waiting.append(group)
                continue
            window, kind, head = heapq.heappop(queue)
            end = now + work.linear[window]
            if kind == _LINEAR:
                worked.append(Stretch(group, window, -1, now, float(end)))
            else:
                first[window] = min(first[window], now)
                made[head] = max(made[head], now + work.make[head, window])
                own_end = now + work.make[head, window] + work.query[head, window]
                begin = float(max(own_end, made[head]))
                end = begin + work.attend[head, window]
                # Between them it waits for keys that other groups make.
                worked.append(Stretch(group, window, head, now, float(own_end)))
                worked.append(Stretch(group, window, head, begin, float(end)))
            at(float(end), group, window, kind)
        idle[:] = waiting
    return Passage(done=done, groups=worked, beside=beside)
