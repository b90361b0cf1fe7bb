"""Statistics of curves: paired bootstrap intervals, cost at equal divergence, mixtures of two policies."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BOOTSTRAP_SEED = 0


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: NDArray[np.floating], *, num_resamples: int) -> Interval:
    """Returns the mean over examples and its 95 % percentile bootstrap interval.

    Args:
      values: One value per example, already averaged over seeds, `[N]`; paired differences make a paired interval.
      num_resamples: Resamples of the examples.
    """
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    wide = np.asarray(values, np.float64)
    chosen = generator.integers(0, len(wide), size=(num_resamples, len(wide)))
    means = wide[chosen].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(mean=float(wide.mean()), low=float(low), high=float(high))


def cost_at_equal_kl(
    reference: tuple[NDArray[np.floating], NDArray[np.floating]],
    candidate: tuple[NDArray[np.floating], NDArray[np.floating]],
) -> float | None:
    """Returns how many times the candidate's cost the reference needs for the same divergence.

    Both curves are made monotone (a point is as good as the best at most as expensive) and interpolated linearly in the
    logarithms of cost and divergence. The geometric mean is taken over the divergences that both reach.

    Args:
      reference: Costs and divergences, each `[points]`.
      candidate: Costs and divergences, each `[points]`.

    Returns:
      The ratio, above 1 where the candidate is cheaper; None if the divergences do not overlap.
    """

    def front(
        curve: tuple[NDArray[np.floating], NDArray[np.floating]],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        order = np.argsort(curve[0])
        cost = np.log(np.asarray(curve[0], np.float64)[order])
        kl = np.log(np.maximum(np.asarray(curve[1], np.float64)[order], 1e-9))
        best = np.minimum.accumulate(kl)
        first = np.concatenate([[True], best[1:] < best[:-1]])
        return cost[first][::-1], best[first][::-1]  # divergence rising, cost falling

    cost_r, kl_r = front(reference)
    cost_c, kl_c = front(candidate)
    low, high = max(kl_r[0], kl_c[0]), min(kl_r[-1], kl_c[-1])
    if not low < high:
        return None
    levels = np.linspace(low, high, 50)
    gap = np.interp(levels, kl_r, cost_r) - np.interp(levels, kl_c, cost_c)
    return float(np.exp(np.mean(gap)))


def mixture_at(
    costs: Sequence[float], values: Sequence[NDArray[np.floating]], cost: float
) -> NDArray[np.float64] | None:
    """Returns what a machine has that switches between two policies from example to example, at a given mean cost.

    Such a mixture of the two policies next to that cost reaches every cost between theirs, and its expected quality and
    divergence lie on the straight line between theirs.

    Args:
      costs: Mean costs of policies, `[points]`.
      values: A figure of each policy by example, `[points]` of `[N]`.
      cost: The mean cost that is wanted.

    Returns:
      The figure by example in expectation, `[N]`; None if the cost lies outside those of the policies.
    """
    order = np.argsort(costs)
    sorted_costs = np.asarray(costs, np.float64)[order]
    if not sorted_costs[0] <= cost <= sorted_costs[-1]:
        return None
    upper = max(1, int(np.searchsorted(sorted_costs, cost)))
    low, high = sorted_costs[upper - 1], sorted_costs[upper]
    share = 0.0 if high == low else (cost - low) / (high - low)
    first, second = (np.asarray(values[order[i]], np.float64) for i in (upper - 1, upper))
    mixed: NDArray[np.float64] = (1.0 - share) * first + share * second
    return mixed


def resampled(values: NDArray[np.floating], *, num_resamples: int) -> NDArray[np.float64]:
    """Returns means over the examples, then over bootstrap resamples of them, `[1 + num_resamples, ...]`.

    Args:
      values: Figures by example, `[N, ...]`.
      num_resamples: Resamples of the examples.
    """
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    size = len(values)
    drawn = generator.multinomial(size, np.full(size, 1.0 / size), size=num_resamples)
    shares = np.concatenate([np.ones((1, size)), drawn]) / size
    means: NDArray[np.float64] = np.tensordot(shares, np.asarray(values, np.float64), axes=1)
    return means


def cheapest_mixtures(
    excess: NDArray[np.floating], costs: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Returns the mixtures of at most two policies that cost least and lose nothing beyond their limit, as shares `[R, P]`.

    Args:
      excess: By how much a policy loses more than it may, `[R, P]`; what a mixture loses is the mean of what its parts do.
      costs: What it costs, `[R, P]`.

    Returns:
      Shares that add up to one; where every policy loses too much, those of the first alone.
    """
    rows, policies = excess.shape
    good, other = excess[:, :, None], excess[:, None, :]
    splits = (good <= 0.0) & (other > 0.0)
    share = np.where(splits, good / np.where(splits, good - other, 1.0), 0.0)
    mixed = (1.0 - share) * costs[:, :, None] + share * costs[:, None, :]
    mixed = np.where(good <= 0.0, mixed, np.inf).reshape(rows, -1)
    best = np.argmin(mixed, axis=1)
    first, second = np.divmod(best, policies)
    row = np.arange(rows)
    result = np.zeros(excess.shape)
    taken = share[row, first, second]
    result[row, first] += 1.0 - taken
    result[row, second] += taken
    result[np.isinf(mixed[row, best])] = np.eye(policies)[0]
    return result
