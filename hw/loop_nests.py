"""Loop nests of products out[M, N] += in[M, K] w[K, N]: what each memory holds and how often it is filled; NumPy only.

A nest is a list of loops from the innermost outwards, and a cut is a place in it: a memory whose cut is c keeps what the
loops before c run over. What it keeps stays while loops run that do not concern its operand; so its contents change
once per round of the loops from the first one at or behind c that does. Nests are stacked in any leading axes `...`.

References:
  Parashar et al., "Timeloop", ISPASS 2019 (stationarity); Mei et al., "ZigZag", IEEE TC 2021 (a cut for each operand).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Operand = Literal["input", "weight", "output"]
OPERANDS: tuple[Operand, ...] = ("output", "input", "weight")
ROWS, COLS, INNER, UNUSED = range(4)
"""Dimensions M, N, K of a loop, and that of loops of one round that fill a nest up."""
CONCERNS: dict[Operand, tuple[int, int]] = {
    "input": (ROWS, INNER),
    "weight": (COLS, INNER),
    "output": (ROWS, COLS),
}
"""Dimensions that an operand extends over."""

Floats = NDArray[np.float64]
Cuts = NDArray[np.int_]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Nests:
    """Loops from the innermost outwards.

    Attributes:
      dims: Dimension of each loop, `[..., L]`.
      rounds: How often each runs, `[..., L]`; 1 where `dims` is `UNUSED`.
    """

    dims: NDArray[np.int_]
    rounds: Floats

    def concerns(self, operand: Operand) -> Mask:
        """Returns which loops change what is used of an operand, `[..., L]`."""
        first, second = CONCERNS[operand]
        return np.asarray((self.dims == first) | (self.dims == second))

    def cycles(self) -> Floats:
        """Returns the rounds of all loops inside each cut, `[..., L + 1]`."""
        return _inside(self.rounds)

    def values(self, operand: Operand) -> Floats:
        """Returns the values of an operand inside each cut, for one place of the array, `[..., L + 1]`."""
        return _inside(np.where(self.concerns(operand), self.rounds, 1.0))

    def stays(self, operand: Operand, cut: Cuts) -> Cuts:
        """Returns the first loop at or behind a cut that changes what is kept of an operand, `[...]`."""
        return _first(self.concerns(operand), cut)

    def has_inner(self, cut: Cuts) -> Mask:
        """Returns whether sums go on in loops at or behind a cut, `[...]`."""
        return np.asarray(_first(self.dims == INNER, cut) < self.dims.shape[-1])

    def outermost(self, operand: Operand, low: Cuts, high: Cuts, *, concerned: bool) -> Floats:
        """Returns the rounds of the outermost loops between two cuts that concern an operand, or do not, `[...]`."""
        others = self.concerns(operand) != concerned
        others &= self.dims != UNUSED
        # The last such loop before `high` ends the run: the first one seen from there, inwards.
        length = self.dims.shape[-1]
        start = length - _first(others[..., ::-1], length - high)
        cycles = self.cycles()
        return np.asarray(at(cycles, high) / at(cycles, np.maximum(start, low)))


def at(values: Floats, cut: Cuts) -> Floats:
    """Returns the entries `[..., cut]` of `[..., L + 1]`."""
    return np.asarray(np.take_along_axis(values, cut[..., None], axis=-1)[..., 0])


def _inside(rounds: Floats) -> Floats:
    ones = np.ones((*rounds.shape[:-1], 1))
    return np.concatenate([ones, np.cumprod(rounds, axis=-1)], axis=-1)


def _first(wanted: Mask, cut: Cuts) -> Cuts:
    """Returns the first loop at or behind a cut that is wanted, L if none is."""
    places = np.arange(wanted.shape[-1])
    found = np.where(wanted & (places >= cut[..., None]), places, wanted.shape[-1])
    return np.asarray(np.min(found, axis=-1, initial=wanted.shape[-1]))
