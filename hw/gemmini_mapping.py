"""Mappings of layers onto a Gemmini-like array as Timeloop writes them, a whole column at once; NumPy only.

A mapping is one line, memories from the outermost, each with its loops from the outermost:

    L3[WIO] K32 Q10 - L2[WI] N1 K16X - L1[O] K2 S3 R3 C32 Q3 P10 C16X - L0[W] P3

`K32` is a loop over time, `K16X` one over the array; letters in brackets are the tensors that the memory keeps
(W weights, I inputs, O outputs). A loop that is not written has one step.

References:
  Parashar et al., "Timeloop", ISPASS 2019; memories and data of Hong et al., "DOSA", MICRO 2023 (ucb-bar/dosa).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from codesign.errors import DataError

Integers = NDArray[np.int64]

DIMENSIONS = ("R", "S", "P", "Q", "C", "K", "N")
"""Kernel columns and rows, output columns and rows, input and output channels, batch."""
LEVELS = ("registers", "accumulator", "scratchpad", "dram")
"""Memories L0 to L3."""

_LOOP = r"[RSPQCKN][1-9]\d*[XY]?"
_LINE = " - ".join(rf"L{level}\[[WIO]+\](?: {_LOOP})*" for level in (3, 2, 1, 0))
_LINES = re.compile(rf"^{_LINE}$", re.MULTILINE)
_TOKEN = re.compile(r"(\n)|L(\d)\[|([RSPQCKN])(\d+)([XY]?)")


@dataclass(frozen=True, kw_only=True)
class LoopNests:
    """Loops of N mappings, by memory of `LEVELS` (M) and dimension of `DIMENSIONS` (D).

    Attributes:
      temporal: Steps of the loops over time, `[N, M, D]`, 1 where there is none.
      spatial: Steps of the loops over the array, `[N, M, D]`.
      place: Place of a loop over time among those of its memory, `[N, M, D]`, 0 outermost, -1 where there is none.
    """

    temporal: Integers
    spatial: Integers
    place: Integers

    @property
    def sizes(self) -> Integers:
        """Sizes of the layers, `[N, D]`: the product of all loops."""
        product: Integers = np.prod(self.temporal * self.spatial, axis=1)
        return product

    @property
    def tiles(self) -> Integers:
        """Sizes of what one step of the DRAM loops covers, `[N, D]`."""
        dram = LEVELS.index("dram")
        tiles: Integers = self.sizes // (self.temporal * self.spatial)[:, dram]
        return tiles


def parse_mappings(texts: Sequence[str]) -> LoopNests:
    """Returns the loops of a column of mappings.

    Raises:
      DataError: If a mapping is not of the form above.
    """
    column = "\n".join(text.strip() for text in texts)
    if len(_LINES.findall(column)) != len(texts):
        row = next(row for row, text in enumerate(texts) if not re.fullmatch(_LINE, text.strip()))
        raise DataError(
            f"mapping of row {row + 1}: {texts[row]!r} is not `L3[WIO] K2 - L2[WI] K16X - L1[O] C8 - L0[W] P8` "
            "with loops R, S, P, Q, C, K, N: give Timeloop's text, memories from L3 to L0"
        )
    found = np.array(_TOKEN.findall(column), dtype=np.str_).reshape(-1, 5)
    rows = np.cumsum(found[:, 0] == "\n")
    starts = found[:, 1] != ""
    # A loop belongs to the last memory before it.
    last = np.maximum.accumulate(np.where(starts, np.arange(len(found)), 0))
    levels = np.where(found[last, 1] == "", "0", found[last, 1]).astype(np.int64)
    is_loop = found[:, 2] != ""
    by_letter = np.argsort(DIMENSIONS)
    dimensions = by_letter[np.searchsorted(np.array(DIMENSIONS)[by_letter], found[is_loop, 2])]
    index = (rows[is_loop], levels[is_loop], dimensions)
    steps, in_space = found[is_loop, 3].astype(np.int64), found[is_loop, 4] != ""
    shape = (len(texts), len(LEVELS), len(DIMENSIONS))
    temporal, spatial, place = (np.full(shape, fill, np.int64) for fill in (1, 1, -1))
    np.multiply.at(temporal, index, np.where(in_space, 1, steps))
    np.multiply.at(spatial, index, np.where(in_space, steps, 1))
    in_time = ~in_space
    order = np.arange(len(found))[is_loop] - last[is_loop] - 1
    place[tuple(part[in_time] for part in index)] = order[in_time]
    return LoopNests(temporal=temporal, spatial=spatial, place=place)
