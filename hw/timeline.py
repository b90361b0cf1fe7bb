"""What the parts of a machine work on in one layer of one example, cycle by cycle; NumPy only."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

DRAM, HOST = "dram", "host"
"""Parts of every machine's timeline that are no units."""
_GAP = 1e-6
"""Cycles between two spans that are none."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The layer, and the example of a batch, whose timeline is kept; both count from 0."""

    layer: int
    example: int


@dataclass(frozen=True, kw_only=True)
class Span:
    """When a part of the machine works; cycles from the beginning of the layer.

    Attributes:
      part: A unit, `dram` or `host`.
      group: Which group of the unit's lanes; 0 where all work together.
      name: What it works on.
      start: When it begins.
      end: When it ends.
    """

    part: str
    group: int = 0
    name: str
    start: float
    end: float


def spans(
    part: str,
    names: Sequence[str],
    starts: np.ndarray,
    cycles: np.ndarray,
    *,
    group: int = 0,
) -> list[Span]:
    """Returns spans that take any time, those of one name that follow one another at once as one.

    Args:
      part: Which part works.
      names: On what, `[N]`.
      starts: When each begins, cycles, `[N]`, rising.
      cycles: How long each takes, `[N]`.
      group: Which group of lanes.
    """
    found: list[Span] = []
    for name, start, each in zip(names, starts, cycles, strict=True):
        if each <= 0.0:
            continue
        end = float(start + each)
        if found and found[-1].name == name and start - found[-1].end <= _GAP:
            found[-1] = Span(part=part, group=group, name=name, start=found[-1].start, end=end)
        else:
            found.append(Span(part=part, group=group, name=name, start=float(start), end=end))
    return found


def shifted(timeline: Iterable[Span], cycles: float) -> list[Span]:
    """Returns spans that begin and end so many cycles later."""
    return [
        dataclasses.replace(one, start=one.start + cycles, end=one.end + cycles) for one in timeline
    ]
