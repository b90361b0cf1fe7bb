"""Sanger's published closed form of the latency of an attention layer; standard library only.

Nothing overlaps or waits for memory: operations over the array's rate, those of scores and values fewer by the kept
fraction and slower by what the array's elements idle.

References:
  Lu et al., "Sanger", MICRO 2021, and its repository (hatsu3/Sanger), first version.
"""

from codesign.units import OPERATIONS_PER_GOP

PEAK_GOPS = 2048.0
"""Rate of the array, billions of operations a second, a multiplication and an addition being two (repository)."""


def latency_s(
    num_tokens: int,
    width: int,
    *,
    kept: float,
    utilisation: float,
    peak_gops: float = PEAK_GOPS,
    scales_projection: bool = True,
) -> float:
    """Returns the latency of an attention layer with its projections, all heads, in seconds.

    Published: `t = 6 n h^2 / R + (4 n^2 h + 2 n h^2) s / (R u)`. The output projection, `2 n h^2`, has nothing to do with
    the mask; without `scales_projection` it takes its full time: `t = 8 n h^2 / R + 4 n^2 h s / (R u)`.

    Args:
      num_tokens: n.
      width: h, the width of all heads.
      kept: s, kept fraction of the mask.
      utilisation: u, share of the array's elements that work on scores and values, in (0, 1].
      peak_gops: R.
      scales_projection: Whether the output projection shrinks with the mask, as in the repository.
    """
    projections = 6.0 * num_tokens * width**2
    output = 2.0 * num_tokens * width**2
    sparse = 4.0 * num_tokens**2 * width
    if scales_projection:
        sparse += output
    else:
        projections += output
    operations = projections + sparse * kept / utilisation
    return operations / (peak_gops * OPERATIONS_PER_GOP)
