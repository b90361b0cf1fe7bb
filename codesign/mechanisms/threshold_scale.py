"""How grids, common moves and start values see a mechanism's thresholds; thresholds that are parts of a whole."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np

from codesign.workload import Workload

Kept = TypeVar("Kept", jax.Array, np.ndarray)

MIN_PART, MAX_PART = 2.0**-10, 1.0 - 2.0**-12
"""Parts beyond these mean the same integers; the variable would be infinite (ours)."""


def part_variable(part: np.ndarray) -> np.ndarray:
    """Returns v with sigmoid(v) = part, limited to [2^-10, 1 - 2^-12], any shape."""
    limited = np.clip(np.asarray(part, np.float64), MIN_PART, MAX_PART)
    variable: np.ndarray = np.log(limited) - np.log1p(-limited)
    return variable


def kept_part(variable: np.ndarray) -> np.ndarray:
    """Returns sigmoid(v), float64."""
    part: np.ndarray = 1.0 / (1.0 + np.exp(-np.asarray(variable, np.float64)))
    return part


def from_strength(strength: np.ndarray, ranges: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the variables v of parts sigmoid(v) = 1 - strength, for `ThresholdScale.from_strength`."""
    del ranges
    return part_variable(1.0 - strength)


def to_strength(threshold: np.ndarray, ranges: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns 1 - sigmoid(v), for `ThresholdScale.to_strength`."""
    del ranges
    return 1.0 - kept_part(threshold)


@dataclass(frozen=True, kw_only=True)
class ThresholdScale:
    """How grids, common moves and start values see a mechanism's knob `threshold`, `[L, ...]`.

    Ranges are the calibrated ones of all layers by tensor, `[L]`.

    Attributes:
      names: What the entries of the knob's last axis are: rounds or sites.
      in_order: Whether an entry's kept fraction depends on the entries before it (rounds).
      from_strength: Strengths in [0, 1] (0 keeps nearly all, 1 drops most), shaped like the knob, and ranges to the knob.
      to_strength: The inverse.
      from_setting: One setting for all layers and heads, the knob's shape, and ranges to the knob.
      settings: Settings of the default uniform grid, the first of which drops nothing.
      start_kept: Kept fraction of each entry where training starts.
      kept: A hard path's workload to the kept fraction of each entry, mean over the batch, shaped like the knob.
      pairs_entry: The entry whose kept fraction is that of the pairs that attention runs on, in rows that are computed;
        None if none is. Entries behind it, where it is not counted from the end, drop whole rows and tokens.
    """

    names: tuple[str, ...]
    in_order: bool
    from_strength: Callable[[np.ndarray, Mapping[str, np.ndarray]], np.ndarray]
    to_strength: Callable[[np.ndarray, Mapping[str, np.ndarray]], np.ndarray]
    from_setting: Callable[
        [tuple[float, ...], tuple[int, ...], Mapping[str, np.ndarray]], np.ndarray
    ]
    settings: tuple[tuple[float, ...], ...]
    start_kept: tuple[float, ...]
    kept: Callable[[Workload], jax.Array]
    pairs_entry: int | None = None

    def of_pairs(self, kept: Kept) -> Kept:
        """Returns the fractions of pairs `[...]` among kept fractions `[..., n]`; all fractions if no entry is of pairs."""
        return kept if self.pairs_entry is None else kept[..., self.pairs_entry]
