"""When memory ports hold an array up: stalls while it computes, loading before and after; NumPy only.

A transfer repeats with a period; it may use its window of each period, the whole of it if the memory that receives is
double-buffered, and needs some cycles of the port. Arrays are over any candidates `[P]`, in cycles.

References:
  Mei et al., "A uniform latency model for DNN accelerators with diverse architectures and dataflows", DATE 2022:
  stalls of one transfer, of transfers that share a port, and the union of their windows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from codesign.hw.loop_nests import Floats


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One direction of one operand through a port, `[P]` each.

    Attributes:
      needed: Cycles of the port per period.
      window: Cycles of a period in which the transfer may run.
      period: Cycles from one transfer to the next while the array computes.
      count: Transfers in all; 0 where there is none.
      rate_bits: Bits per cycle on average.
      least: Cycles after which the array can begin, if all is moved before it.
      is_loading: Whether it comes before the first cycle of the array or after the last; partial sums do not.
    """

    needed: Floats
    window: Floats
    period: Floats
    count: Floats
    rate_bits: Floats
    least: Floats
    is_loading: bool


def union_cycles(transfers: Sequence[Transfer], total: Floats) -> Floats:
    """Returns in how many of all cycles the window of any transfer is open, `[P]`.

    Each window opens at the start of its period; each period is a multiple of the shorter ones.
    """
    active = np.stack([transfer.count > 0 for transfer in transfers])
    windows = np.where(active, np.stack([transfer.window for transfer in transfers]), 0.0)
    periods = np.where(active, np.stack([transfer.period for transfer in transfers]), 1.0)
    whole = np.any(active & (windows == periods), axis=0)
    order = np.argsort(periods, axis=0, kind="stable")
    windows = np.take_along_axis(windows, order, axis=0)
    periods = np.take_along_axis(periods, order, axis=0)
    covered: Callable[[Floats], Floats] = np.zeros_like
    union = np.zeros_like(total)
    for window, period in zip(windows, periods, strict=True):
        union = window + covered(period) - covered(window)
        covered = _repeated(covered, window, period, union)
    return np.where(whole, total, union * (total / periods[-1]))


def _repeated(
    inner: Callable[[Floats], Floats], window: Floats, period: Floats, union: Floats
) -> Callable[[Floats], Floats]:
    """Returns how many of the first x cycles a further window covers together with the shorter ones."""

    def covered(x: Floats) -> Floats:
        rest = np.mod(x, period)
        partial = np.where(rest <= window, rest, window + inner(rest) - inner(window))
        return np.floor(x / period) * union + partial

    return covered


def stall(transfers: Sequence[Transfer], total: Floats) -> Floats:
    """Returns by how much a port falls behind its windows over a run; below 0: how much it has to spare, `[P]`."""
    late = np.stack([(t.needed - t.window) * np.maximum(t.count - 1.0, 0.0) for t in transfers])
    if len(transfers) == 1:
        return np.asarray(late[0])
    windows = np.stack([t.window * np.maximum(t.count - 1.0, 0.0) for t in transfers])
    spare = np.sum(np.minimum(late, 0.0), axis=0) + np.sum(windows, axis=0)
    shared = np.maximum(0.0, spare - union_cycles(transfers, total))
    return np.asarray(np.sum(np.maximum(late, 0.0), axis=0) + shared)


def loading(transfers: Sequence[Transfer], width_bits: float, total: Floats) -> list[Floats]:
    """Returns the cycles of each transfer of a port outside the array's run, `[P]` each.

    What is moved once may be moved during the run as far as the port is free then, but for the least that the array
    needs to begin; the longest such transfer first.

    Args:
      transfers: Those of the port.
      width_bits: Bits that it moves in a cycle.
      total: Cycles of the array with its stalls.
    """
    once = np.stack([(t.count == 1) & t.is_loading for t in transfers])
    often = np.stack([(t.count > 1) & t.is_loading for t in transfers])
    rates = np.stack([np.floor(t.rate_bits) for t in transfers])
    busy = np.sum(np.where(often, rates, 0.0), axis=0)
    free = np.maximum(0.0, (width_bits - busy) / width_bits * total)
    needed = np.stack([transfer.needed for transfer in transfers])
    movable = np.where(once, needed - np.stack([transfer.least for transfer in transfers]), 0.0)
    movable = np.maximum(movable, 0.0)
    order = np.argsort(np.where(once, -needed, np.inf), axis=0, kind="stable")
    sorted_movable = np.take_along_axis(movable, order, axis=0)
    before = np.cumsum(sorted_movable, axis=0) - sorted_movable
    moved = np.clip(free - before, 0.0, sorted_movable)
    moved = np.take_along_axis(moved, np.argsort(order, axis=0), axis=0)
    return list(np.where(once | often, needed - moved, 0.0))
