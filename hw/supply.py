"""Supply against clock by the alpha-power law, in ratios to a machine's own; the functions take floats and arrays."""

from typing import Any

ALPHA = 1.3
"""Exponent of short channels, whose carriers are at their largest velocity (Sakurai and Newton, IEEE JSSC 25(2), 1990)."""
LEAST_SUPPLY, MOST_SUPPLY = 0.6, 1.1
"""Supplies that a machine may be given, over its own (ours: near the threshold a design is another, 10 % is the margin)."""
LEAST_OVER_THRESHOLD = 1.2
"""Least supply over the threshold, at which gates still switch by the same law (ours)."""
_BEYOND, _STEPS = 1.5, 7


def supply_range(threshold: float) -> tuple[float, float]:
    """Returns the least and the largest supply that a machine may be given, over its own; `threshold` likewise."""
    return max(LEAST_SUPPLY, LEAST_OVER_THRESHOLD * threshold), MOST_SUPPLY


def clock_ratio(supply: Any, threshold: float) -> Any:
    """Returns the clock that a supply allows, both over the machine's own.

    Args:
      supply: Supply over the machine's own, above `threshold`.
      threshold: Threshold voltage over the machine's own supply, in (0, 1).
    """
    return ((supply - threshold) / (1.0 - threshold)) ** ALPHA / supply


def supply_ratio(clock: Any, threshold: float) -> Any:
    """Returns the supply that a clock needs, both over the machine's own, differentiable.

    The law has no closed form in this direction: Newton's steps on v - threshold - (1 - threshold) (clock v)^(1 / alpha),
    which is convex, so that they fall to the root from any supply above it.

    Args:
      clock: Clock over the machine's own, > 0, up to that of the largest supply.
      threshold: Threshold voltage over the machine's own supply, in (0, 1).
    """
    supply: Any = _BEYOND
    for _ in range(_STEPS):
        drive = (1.0 - threshold) * (clock * supply) ** (1.0 / ALPHA)
        supply = supply - (supply - threshold - drive) / (1.0 - drive / (ALPHA * supply))
    return supply
