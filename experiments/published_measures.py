"""Figures of the baselines as ratios of what the integer path did, by example, layer and head. NumPy alone.

A figure is the sum of one thing over the sum of another: over all examples and heads its mean, over the examples of a head
that head's value, over resampled examples its interval.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from codesign.experiments.comparison import resampled
from codesign.references.integers import Booleans
from codesign.references.sanger import lockstep_slots, packed_slots

Floats: TypeAlias = npt.NDArray[np.float64]
Numbers: TypeAlias = npt.NDArray[np.integer] | Floats
Counts: TypeAlias = dict[str, tuple[Numbers, Numbers]]
"""By figure: what is counted, and what it is a part of, `[L, H]`."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A figure of one seed: `part` over `whole`, `[N, L, H]`, or `[N, 1, 1]` where heads are not told apart."""

    part: Floats
    whole: Floats


def by_example(part: Numbers | float, whole: Numbers | float) -> Ratio:
    """Returns the ratio of two values by example, `[N]`, either of which may be one for all."""
    pair = np.broadcast_arrays(np.asarray(part, np.float64), np.asarray(whole, np.float64))
    return Ratio(part=pair[0][:, None, None], whole=pair[1][:, None, None])


def stacked(examples: Sequence[Counts]) -> dict[str, Ratio]:
    """Returns the ratios of examples whose counts are `[L, H]`."""
    return {
        name: Ratio(
            part=np.stack([one[name][0] for one in examples]).astype(np.float64),
            whole=np.stack([one[name][1] for one in examples]).astype(np.float64),
        )
        for name in examples[0]
    }


def combined(by_seed: Sequence[Ratio], *, num_resamples: int) -> dict[str, Any]:
    """Returns a figure's mean over seeds, its 95 % bootstrap interval over examples, and how far heads lie apart.

    Args:
      by_seed: The figure of every seed, on the same examples.
      num_resamples: Resamples of the examples.

    Returns:
      `mean`, `low`, `high`, `by_seed`, and `deviation`, the standard deviation over heads of all layers and seeds; None
      where heads are not told apart.
    """
    means = []
    for one in by_seed:
        part, whole = (
            resampled(values.sum(axis=(1, 2)), num_resamples=num_resamples)
            for values in (one.part, one.whole)
        )
        means.append(part / whole)
    over_seeds = np.mean(means, axis=0)
    low, high = np.percentile(over_seeds[1:], [2.5, 97.5])
    return {
        "mean": float(over_seeds[0]),
        "low": float(low),
        "high": float(high),
        "by_seed": [float(mean[0]) for mean in means],
        "deviation": _deviation(by_seed),
    }


def _deviation(by_seed: Sequence[Ratio]) -> float | None:
    """Returns the standard deviation over heads of layers and seeds, None where they are not told apart."""
    if by_seed[0].part[0].size == 1:
        return None
    heads = []
    for one in by_seed:
        part, whole = one.part.sum(axis=0), one.whole.sum(axis=0)
        heads.append((part[whole > 0.0] / whole[whole > 0.0]).ravel())
    return float(np.std(np.concatenate(heads)))


def _kept(keep: Booleans, exists: Booleans) -> Counts:
    """Returns what is left of pairs."""
    kept = keep[:, -1].sum(axis=(-2, -1))
    return {"kept": (kept, np.full(kept.shape, exists.sum()))}


def _reread(keep: Booleans, exists: Booleans) -> Counts:
    """Returns the share of computed rows whose low bits are read: the second decision of a pair says so."""
    del exists
    rows, again = (keep[:, index].any(axis=-1).sum(axis=-1) for index in (0, 1))
    return {"reread": (again, rows)}


def _packed(keep: Booleans, exists: Booleans) -> Counts:
    """Returns what the mask keeps, and the utilisation of the array with pack and split, and without."""
    mask = keep[:, 0]
    kept = mask.sum(axis=(-2, -1))
    return _kept(keep, exists) | {
        "packed": (kept, packed_slots(mask)),
        "lockstep": (kept, lockstep_slots(mask)),
    }


def _searched(keep: Booleans, exists: Booleans) -> Counts:
    """Returns the share of candidates, and what the threshold behind them leaves."""
    kept = _kept(keep, exists)
    return kept | {"candidates": (keep[:, 0].sum(axis=(-2, -1)), kept["kept"][1])}


MEASURES: Mapping[str, Callable[[Booleans, Booleans], Counts]] = {
    "spatten": _reread,
    "sanger": _packed,
    "a3": _searched,
    "fact": _kept,
    "energon": _kept,
}
"""From the decisions of an example, `[L, R, H, T, S]`, and the pairs that exist, `[T, S]`, to its counts, by mechanism."""


def measured(mechanism: str, keep: Booleans, *, is_causal: bool) -> Counts:
    """Returns the counts of one example.

    Args:
      mechanism: Its name, one of `MEASURES`.
      keep: Decisions on the tokens that exist, `[L, R, H, T, T]`.
      is_causal: Whether a token sees only those before it and itself.
    """
    exists = np.ones(keep.shape[-2:], np.bool_)
    if is_causal:
        exists = np.tril(exists)
    return MEASURES[mechanism](keep & exists, exists)
