"""Rounding of trained widths to whole bits, so that budgets survive it."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from codesign.policy import Policy, deployed_bits, group, is_filter_width, project

OFFSET = 0.499
"""Largest shift of the rounding, in bit: nearly all the way up or down (ours)."""
BISECTIONS = 10
"""Halvings of the interval of shifts (ours)."""


def hardened(policy: Policy, ratios_fn: Callable[[Policy], ArrayLike]) -> Policy:
    """Returns the policy with widths in whole bits that meets its budgets with the most bits.

    One offset shifts the rounding of all widths but the filter's, found by bisection between rounding up and rounding down;
    widths are rounded down if even that breaks a budget, for thresholds to mend. Widths that trained together round
    together, so what the offset leaves of the budgets is filled width by width (`_filled`).

    Args:
      policy: Fractional widths.
      ratios_fn: Cost over budget `[C]` of a policy.

    References:
      Yang and Jin, "FracBits", arXiv 2007.02017 (offset of the rounding). Differs: both directions, and the filling.
    """

    def is_met(tried: Policy) -> bool:
        return bool(np.all(np.asarray(ratios_fn(tried)) <= 1.0))

    nearest = deployed_bits(policy)
    if np.asarray(ratios_fn(nearest)).size == 0:
        return nearest
    low, high = -OFFSET, OFFSET
    for _ in range(BISECTIONS):
        middle = (low + high) / 2.0
        if is_met(deployed_bits(policy, offset=middle)):
            high = middle
        else:
            low = middle
    rounded = deployed_bits(policy, offset=high)
    return _filled(policy, rounded, is_met) if is_met(rounded) else rounded


def _filled(policy: Policy, rounded: Policy, is_met: Callable[[Policy], bool]) -> Policy:
    """Returns `rounded` with one more bit wherever training wanted more and the budgets allow it, the largest lack first.

    More bits bring a tensor closer to what it stands for. Those of a filter only change what it keeps.

    Args:
      policy: Fractional widths.
      rounded: Widths in whole bits that meet the budgets.
      is_met: Whether a policy meets them.
    """
    lacks = [
        (float(lack), part, name, index)
        for part in ("layers", "ends")
        for name, trained in getattr(policy, part).items()
        if group(name) == "bits" and not is_filter_width(name)
        for index, lack in np.ndenumerate(np.asarray(trained - getattr(rounded, part)[name]))
        if lack > 0.0
    ]
    for _, part, name, index in sorted(lacks, key=lambda lack: -lack[0]):
        knobs = getattr(rounded, part)
        one_more = np.zeros(knobs[name].shape, np.float32)
        one_more[index] = 1.0
        tried = project(rounded.replace(**{part: knobs | {name: knobs[name] + one_more}}))  # type: ignore[attr-defined]
        if is_met(tried):
            rounded = tried
    return rounded
