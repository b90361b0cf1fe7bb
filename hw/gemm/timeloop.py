"""Mappings in Timeloop's one-line form, read all at once: `L3[WIO] P14 K32 - L2[WI] N1 K4X - L1[O] C2 - L0[W] P4`.

Levels from the outermost, loops of a level from the outermost; `X` or `Y` marks iterations side by side. Imports no JAX.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from codesign.errors import DataError

_MAX_DIGITS = 9
_SIDES = b"XY"


def parse_mappings(
    texts: Sequence[str], dims: tuple[str, ...], num_levels: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int32]]:
    """Returns the factors in time and in space and the order of loops, `[N, L, D]` each, levels from the innermost.

    Loops that a text leaves out have one iteration and stand outermost in their level.

    Args:
      texts: N mappings.
      dims: Names of the loop dimensions, one letter each.
      num_levels: Levels of the machine.

    Raises:
      DataError: If a text names another level or dimension, or has no loops.
    """
    chars = np.asarray(texts, dtype=np.bytes_)
    codes = chars.view(np.uint8).reshape(len(texts), -1)
    # Blanks all round: a loop at the end still has a character behind it.
    codes = np.pad(codes, ((0, 0), (1, _MAX_DIGITS + 1)), constant_values=ord(" "))
    digits = np.where((codes >= ord("0")) & (codes <= ord("9")), codes - np.int64(ord("0")), -1)
    before, after = np.roll(codes, 1, axis=1), np.roll(digits, -1, axis=1)
    is_word = (before == ord(" ")) & (codes >= ord("A")) & (codes <= ord("Z")) & (after >= 0)
    is_level = is_word & (codes == ord("L"))
    places = np.arange(codes.shape[1])
    last_level = np.maximum.accumulate(np.where(is_level, places, 0), axis=1)
    levels = np.take_along_axis(after, last_level, axis=1)

    rows, columns = np.nonzero(is_word & ~is_level)
    letters = codes[rows, columns]
    dimension_of = np.full(256, -1)
    dimension_of[[ord(dim) for dim in dims]] = np.arange(len(dims))
    dimension, level = dimension_of[letters], levels[rows, columns]
    _check(texts, rows, dimension, level, num_levels)
    factors = np.zeros(len(rows))
    ends = columns + 1
    for _ in range(_MAX_DIGITS):
        digit = digits[rows, ends]
        factors = np.where(digit >= 0, factors * 10.0 + digit, factors)
        ends = ends + (digit >= 0)
    is_spatial = np.isin(codes[rows, ends], list(_SIDES))

    shape = (len(texts), num_levels, len(dims))
    temporal, spatial = np.ones(shape), np.ones(shape)
    # Loops further left are further out; those that are not there come after all others.
    distance = np.broadcast_to(codes.shape[1] + np.arange(len(dims)), shape).copy()
    for chosen, target in ((~is_spatial, temporal), (is_spatial, spatial)):
        np.multiply.at(target, (rows[chosen], level[chosen], dimension[chosen]), factors[chosen])
    chosen = ~is_spatial
    distance[rows[chosen], level[chosen], dimension[chosen]] = -columns[chosen]
    return temporal, spatial, np.argsort(distance, axis=-1, kind="stable").astype(np.int32)


def _check(
    texts: Sequence[str],
    rows: NDArray[np.intp],
    dimension: NDArray[np.int64],
    level: NDArray[np.int64],
    num_levels: int,
) -> None:
    missing = np.setdiff1d(np.arange(len(texts)), rows)
    bad = np.concatenate([missing, rows[(dimension < 0) | (level < 0) | (level >= num_levels)]])
    if bad.size:
        raise DataError(
            f"mapping {bad[0]}, `{texts[bad[0]]}`, is not of {num_levels} levels and known loops: write it as "
            "`L1[WIO] K4 - L0[W] C2X`"
        )
