"""Thresholds that scores are compared with, one per row, from statistics of the row's alive keys.

Each form maps (scores `[..., S]`, alive weights `[..., S]`, parameter `[..., 1]`) to a threshold
`[..., 1]` in the unit of the scores. Weights are the gates of earlier rounds and the mask: 0 or 1
in the hard path, in [0, 1] in the soft one, 0 for padded and future keys, which therefore never
enter a statistic. The five relative forms shift with their row, so adding a constant to a row
doesn't change what is kept. The order of a row is constant for differentiation, its values not.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import ArrayLike as NumpyArrayLike, NDArray


def alive_max(scores: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the largest score among keys of weight >= 0.5.

    Args:
      scores: Scores, `[..., S]`.
      weights: Alive weights in [0, 1], `[..., S]`.

    Returns:
      Maximum, `[..., 1]`; over keys of positive weight where none reaches 0.5, 0 if none at all.
    """
    kept = jnp.max(scores, axis=-1, keepdims=True, where=weights >= 0.5, initial=-jnp.inf)
    some = jnp.max(scores, axis=-1, keepdims=True, where=weights > 0.0, initial=-jnp.inf)
    best = jnp.where(jnp.isfinite(kept), kept, some)
    return jnp.where(jnp.isfinite(best), best, 0.0)


def alive_min(scores: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the smallest score among keys of weight >= 0.5, `[..., 1]`; see `alive_max`."""
    return -alive_max(-scores, weights)


def alive_mean(scores: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the weighted mean of a row's scores, `[..., 1]`, 0 for a row without keys."""
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weighted = jnp.sum(jnp.where(weights > 0.0, weights * scores, 0.0), axis=-1, keepdims=True)
    return weighted / jnp.where(total > 0.0, total, 1.0)


def alive_std(scores: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the weighted standard deviation of a row's scores.

    Args:
      scores: Scores, `[..., S]`.
      weights: Alive weights in [0, 1], `[..., S]`.

    Returns:
      Population standard deviation, `[..., 1]`; 0, with derivative 0, for equal scores.
    """
    deviations = scores - alive_mean(scores, weights)
    variance = alive_mean(deviations * deviations, weights)
    return jnp.where(variance > 0.0, jnp.sqrt(jnp.where(variance > 0.0, variance, 1.0)), 0.0)


def row_max_threshold(scores: jax.Array, weights: jax.Array, margin: jax.Array) -> jax.Array:
    """Returns `max - margin`; keeps the keys of `p >= exp(-margin) max p` after a softmax.

    Args:
      scores: Logits, `[..., S]`.
      weights: Alive weights, `[..., S]`.
      margin: t = -ln gamma, `[..., 1]`, >= 0, unit of `scores`.

    Returns:
      Threshold, `[..., 1]`.

    References:
      "LATTE", arXiv 2404.07519.
    """
    return alive_max(scores, weights) - margin


def mean_max_threshold(scores: jax.Array, weights: jax.Array, alpha: jax.Array) -> jax.Array:
    """Returns a mix of the row's mean with its maximum, or with its minimum for negative alpha.

    `alpha max + (1 - alpha) mean` for alpha >= 0, `-alpha min + (1 + alpha) mean` below.

    Args:
      scores: Scores, `[..., S]`.
      weights: Alive weights, `[..., S]`.
      alpha: Mix, `[..., 1]`, in (-1, 1).

    Returns:
      Threshold, `[..., 1]`, rising with `alpha` and continuous at 0.

    References:
      Zhou et al., "Energon", arXiv 2110.09310 (recalled form).
    """
    extreme = jnp.where(alpha >= 0.0, alive_max(scores, weights), alive_min(scores, weights))
    share = jnp.where(alpha >= 0.0, alpha, -alpha)  # abs() has derivative 0 at alpha = 0
    return share * extreme + (1.0 - share) * alive_mean(scores, weights)


def radius_threshold(
    scores: jax.Array, weights: jax.Array, alpha: jax.Array, *, radius: ArrayLike
) -> jax.Array:
    """Returns `max - alpha radius`.

    Args:
      scores: Logits, `[..., S]`.
      weights: Alive weights, `[..., S]`.
      alpha: Fraction of the radius, `[..., 1]`, in [0, 1].
      radius: Largest margin, unit of `scores`, not trained; 3 in MCBP, 5 in PADE.

    Returns:
      Threshold, `[..., 1]`.

    References:
      "BitStopper", arXiv 2512.06457; "MCBP", arXiv 2509.10372; "PADE", arXiv 2512.14322.
    """
    return alive_max(scores, weights) - alpha * radius


def gaussian_threshold(
    scores: jax.Array, weights: jax.Array, keep_fraction: jax.Array
) -> jax.Array:
    """Returns the score that a given fraction of a normal row exceeds: `mean + z std`.

    Args:
      scores: Scores, `[..., S]`.
      weights: Alive weights, `[..., S]`.
      keep_fraction: k, `[..., 1]`, in (0, 1); z is the normal quantile of 1 - k.

    Returns:
      Threshold, `[..., 1]`.

    References:
      "Spark Transformer", arXiv 2506.06644 (recalled form).
    """
    deviations = jax.scipy.special.ndtri(1.0 - keep_fraction)
    return alive_mean(scores, weights) + deviations * alive_std(scores, weights)


def quantile_threshold(
    scores: jax.Array, weights: jax.Array, keep_fraction: jax.Array
) -> jax.Array:
    """Returns the score that a given fraction of the row's alive keys exceeds.

    With n alive scores sorted descending, interpolates at position `k n - 0.5`.

    Args:
      scores: Scores, `[..., S]`.
      weights: Alive weights, `[..., S]`; keys of weight >= 0.5 are ranked.
      keep_fraction: k, `[..., 1]`, in [1/S, 1].

    Returns:
      Threshold, `[..., 1]`, falling with `keep_fraction`; 0 for a row without keys. Between
      ranks its derivative to k is n times the (negative) gap of the two neighbours.
    """
    is_alive = weights >= 0.5
    num_alive = jnp.sum(is_alive, axis=-1, keepdims=True)
    # Dead keys sort last; they are never read, and 0 keeps their derivative finite.
    order = jnp.argsort(jnp.where(is_alive, scores, -jnp.inf), axis=-1, descending=True)
    ranked = jnp.take_along_axis(jnp.where(is_alive, scores, 0.0), order, axis=-1)
    last = jnp.maximum(num_alive - 1, 0)
    position = jnp.clip(keep_fraction * num_alive - 0.5, 0.0, last.astype(scores.dtype))
    rank = jnp.floor(position).astype(jnp.int32)
    upper = jnp.take_along_axis(ranked, rank, axis=-1)
    lower = jnp.take_along_axis(ranked, jnp.minimum(rank + 1, last), axis=-1)
    return upper + (position - rank) * (lower - upper)


def absolute_threshold(scores: jax.Array, weights: jax.Array, threshold: jax.Array) -> jax.Array:
    """Returns the parameter itself, for scores of a known scale (LeOPArd, on logits).

    Args:
      scores: Scores, `[..., S]`; unused.
      weights: Alive weights, `[..., S]`; unused.
      threshold: Unit of `scores`, `[..., 1]`.

    Returns:
      `threshold`.

    References:
      Li et al., "LeOPArd", arXiv 2204.03227.
    """
    del scores, weights
    return threshold


def probability_threshold(
    scores: jax.Array, weights: jax.Array, log_threshold: jax.Array
) -> jax.Array:
    """Returns a threshold on probabilities from its trained logarithm (Sanger, LTP, LTMP).

    Args:
      scores: Probabilities, `[..., S]`; unused.
      weights: Alive weights, `[..., S]`; unused.
      log_threshold: Natural logarithm of the threshold, `[..., 1]`, < 0.

    Returns:
      Threshold in (0, 1), `[..., 1]`.

    References:
      Kim et al., "Learned Token Pruning for Transformers", arXiv 2107.00910.
    """
    del scores, weights
    return jnp.exp(log_threshold)


def integer_threshold(
    margin: NumpyArrayLike,
    head_width: int,
    query_scale: NumpyArrayLike,
    key_scale: NumpyArrayLike,
) -> NDArray[np.int64]:
    """Returns a margin on logits in units of the integer scores `sum_c q_c k_c`.

    Args:
      margin: Margin on `q.k / sqrt(head_width)`, any shape.
      head_width: Width K of a head.
      query_scale: Value of one query code, > 0, broadcast against `margin`.
      key_scale: Value of one key code, > 0, broadcast against `margin`.

    Returns:
      `round(margin sqrt(K) / (query_scale key_scale))`, half to even, shape of `margin`.
    """
    scale = np.asarray(query_scale, np.float64) * np.asarray(key_scale, np.float64)
    codes: NDArray[np.int64] = np.rint(
        np.asarray(margin, np.float64) * np.sqrt(head_width) / scale
    ).astype(np.int64)
    return codes
