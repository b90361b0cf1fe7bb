"""Gates that decide what is kept: hard comparisons, their relaxations, and what they feed.

Every value that is held constant for differentiation passes through `detach`, and every hard
forward value with a substituted derivative through `straight_through`. Callers in other modules
write `gates.detach(...)` and `gates.straight_through(...)`, so that a test can replace either and
compare the gradients with finite differences.
"""

import flax.struct
import jax
import jax.numpy as jnp

from codesign.backward import kept, row_products

# A row of equal scores has no spread to measure a temperature in; below this it counts as 1.
MIN_SPREAD = 1e-6
# Keeps exp finite in float32 (exp(60) = 1e26) for dropped keys far above the kept ones.
MAX_EXPONENT = 60.0
# Largest exponential, relative to a row's largest kept one, in the derivative to the gate of a key that is dropped outright
# (ours): the true one, up to exp(60), lets a single key outweigh every other gradient of a step.
MAX_DROPPED_EXPONENT = 2.0

# Hard concrete distribution, van Baalen et al., "Bayesian Bits", arXiv 2005.07093 (dimensionless).
CONCRETE_TEMPERATURE = 2.0 / 3.0
CONCRETE_UPPER = 1.1
CONCRETE_LOWER = -0.1


@flax.struct.dataclass
class Relaxation:
    """How the non-smooth parts are relaxed; values are traced, so annealing never recompiles.

    Attributes:
      temperature: Width of a gate's transition, scalar, in units of the spread of its scores.
      smoothness: Exponent p of `smooth_max`, scalar, >= 1.
      straight_through: Whether the forward value is the hard one (gradient of the soft one).
    """

    temperature: jax.Array
    smoothness: jax.Array
    straight_through: bool = flax.struct.field(pytree_node=False, default=True)


def detach(x: jax.Array) -> jax.Array:
    """Returns `x` as a constant for differentiation."""
    return jax.lax.stop_gradient(x)


@jax.custom_jvp
def _straight_through(hard: jax.Array, soft: jax.Array) -> jax.Array:
    del soft
    return hard


# True derivative: that of `hard`, zero almost everywhere. Substituted: that of `soft`.
@_straight_through.defjvp
def _straight_through_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return primals[0], tangents[1]


def straight_through(hard: jax.Array, soft: jax.Array) -> jax.Array:
    """Returns `hard`, bit for bit, with the derivative of `soft`.

    Args:
      hard: Forward value, any shape; converted to the dtype of `soft` (a bool becomes 0 or 1).
      soft: Value whose derivative is used, same shape.

    Returns:
      `hard`, same shape, dtype of `soft`.

    References:
      Bengio et al., "Estimating or propagating gradients through stochastic neurons", 2013.
    """
    value: jax.Array = _straight_through(detach(jnp.asarray(hard, soft.dtype)), soft)
    return value


def soft_gate(scores: jax.Array, threshold: jax.Array, *, temperature: jax.Array) -> jax.Array:
    """Gates scores with a sigmoid around a threshold.

    Tends to `hard_gate` as `temperature` goes to 0, except at `scores == threshold`.

    Args:
      scores: Scores, `[..., S]`.
      threshold: Same unit as `scores`, broadcast against them, e.g. `[..., 1]`.
      temperature: Width of the transition, unit of `scores`, > 0, scalar or like `threshold`.

    Returns:
      Gate in [0, 1], `[..., S]`.

    References:
      Kim et al., "Learned Token Pruning for Transformers", arXiv 2107.00910.
    """
    return jax.nn.sigmoid((scores - threshold) / temperature)


def hard_gate(scores: jax.Array, threshold: jax.Array, *, temperature: jax.Array) -> jax.Array:
    """Returns 1 where a score exceeds its threshold, strictly, else 0.

    Args:
      scores: Scores, `[..., S]`.
      threshold: Same unit as `scores`, broadcast against them, e.g. `[..., 1]`.
      temperature: Unused; the signature is that of `soft_gate`.

    Returns:
      Gate in {0, 1}, `[..., S]`, dtype of `scores`.
    """
    del temperature
    return (scores > threshold).astype(scores.dtype)


def gate_width(spread: jax.Array) -> jax.Array:
    """Returns the unit of a gate's temperature: the spread of the scores, 1 where they have none."""
    return jnp.where(spread > MIN_SPREAD, spread, 1.0)


def gate(
    scores: jax.Array, threshold: jax.Array, relaxation: Relaxation, *, spread: jax.Array
) -> jax.Array:
    """Gates scores, straight-through or soft, at a temperature measured in their spread.

    Args:
      scores: Scores, `[..., S]`.
      threshold: Same unit as `scores`, broadcast against them, e.g. `[..., 1]`.
      relaxation: Temperature in units of `spread`, and which forward value to use.
      spread: Standard deviation of the row's alive scores, `[..., 1]`; held constant.

    Returns:
      Gate, `[..., S]`: in {0, 1} if `relaxation.straight_through`, else in [0, 1].

    References:
      Bonnaerens and Dambre, "Learned Thresholds Token Merging and Pruning for Vision
      Transformers", arXiv 2307.10780 (straight-through form).
    """
    temperature = relaxation.temperature * detach(gate_width(spread).astype(scores.dtype))
    soft = soft_gate(scores, threshold, temperature=temperature)
    if not relaxation.straight_through:
        return soft
    return straight_through(hard_gate(scores, threshold, temperature=temperature), soft)


def tanh_soft_threshold(
    logits: jax.Array, threshold: jax.Array, *, sharpness: float = 10.0, depth: float = 1000.0
) -> jax.Array:
    """Pushes logits below a threshold towards `-depth` and leaves those well above it alone.

    Kept logits within about `1 / sharpness` of the threshold are distorted.

    Args:
      logits: Attention logits, `[..., S]`.
      threshold: Same unit, broadcast against `logits`.
      sharpness: Slope of the tanh, per unit of `logits`.
      depth: Magnitude that dropped logits tend to, unit of `logits`.

    Returns:
      Logits, `[..., S]`, to feed to an ordinary softmax.

    References:
      Li et al., "LeOPArd", arXiv 2204.03227; the two constants are recalled, unconfirmed.
    """
    shape = jnp.tanh(sharpness * (logits - threshold))
    return jnp.where(logits >= threshold, logits * shape, depth * shape)


def tanh_density(
    pruned_logits: jax.Array,
    *,
    depth: float = 1000.0,
    sharpness: float = 100.0,
    offset: float = 1.0,
) -> jax.Array:
    """Returns the smooth fraction of logits that `tanh_soft_threshold` kept.

    Args:
      pruned_logits: Output of `tanh_soft_threshold`, any shape.
      depth: The `depth` they were made with.
      sharpness: Slope of the counting sigmoid, per unit of logits.
      offset: Distance above `-depth` from which a logit counts as kept.

    Returns:
      Kept fraction, scalar, in [0, 1].

    References:
      Li et al., "LeOPArd", arXiv 2204.03227; form and constants are recalled, unconfirmed.
    """
    return jnp.mean(jax.nn.sigmoid(sharpness * (pruned_logits + depth - offset)))


def hard_concrete_probability(location: jax.Array) -> jax.Array:
    """Returns the probability that a hard concrete gate is not zero.

    Args:
      location: Trainable location phi of each gate, any shape.

    Returns:
      Probability in (0, 1), same shape.

    References:
      van Baalen et al., "Bayesian Bits", arXiv 2005.07093.
    """
    shift = CONCRETE_TEMPERATURE * jnp.log(-CONCRETE_LOWER / CONCRETE_UPPER)
    return jax.nn.sigmoid(location - shift)


def hard_concrete_gate(location: jax.Array, *, key: jax.Array) -> jax.Array:
    """Samples hard concrete gates, differentiably in their location.

    Args:
      location: Trainable location phi of each gate, any shape.
      key: Random key.

    Returns:
      Gates in [0, 1], same shape, exactly 0 or 1 with positive probability.

    References:
      van Baalen et al., "Bayesian Bits", arXiv 2005.07093.
    """
    noise = jax.random.logistic(key, location.shape, location.dtype)
    relaxed = jax.nn.sigmoid((noise + location) / CONCRETE_TEMPERATURE)
    return jnp.clip(relaxed * (CONCRETE_UPPER - CONCRETE_LOWER) + CONCRETE_LOWER, 0.0, 1.0)


def masked_softmax(
    logits: jax.Array,
    weights: jax.Array,
    *,
    epsilon: float,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Returns attention probabilities over keys weighted by their gates.

    `P_j = (w_j exp(x_j - m) + epsilon / n) / (sum_k w_k exp(x_k - m) + epsilon)`, with m the
    maximum over keys of w >= 0.5 (over all keys where there is none), held constant. The product
    form keeps the gradient of a gate finite at w = 0 (there its exponential is bounded by `exp(MAX_DROPPED_EXPONENT)`).
    A row without any key gives zeros.

    Args:
      logits: Attention logits, `[..., S]`.
      weights: Gates in [0, 1], `[..., S]`.
      epsilon: Mass shared by all keys, 1e-5 in training, 0 at evaluation.
      mask: True for real keys, `[..., S]`; padded or future keys get exactly 0 and no share of
        `epsilon`. None: all are real.

    Returns:
      Probabilities, `[..., S]`.

    References:
      Bonnaerens and Dambre, "Learned Thresholds Token Merging and Pruning for Vision
      Transformers", arXiv 2307.10780. Differs: m, and the mask.
    """
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
        weights = jnp.where(mask, weights, 0.0)
        num_keys = jnp.sum(mask, axis=-1, keepdims=True).astype(logits.dtype)
    else:
        num_keys = jnp.full((*logits.shape[:-1], 1), logits.shape[-1], logits.dtype)
    top_alive = jnp.max(jnp.where(weights >= 0.5, logits, -jnp.inf), axis=-1, keepdims=True)
    top_any = jnp.max(logits, axis=-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top_alive), top_alive, top_any)
    top = kept(detach(jnp.where(jnp.isfinite(top), top, 0.0)))
    share = epsilon / jnp.maximum(num_keys, 1.0)
    if mask is not None:
        share = jnp.where(mask, share, 0.0)
    return _probabilities(logits, weights, top, detach(share), jnp.asarray(epsilon, logits.dtype))


def _masses(logits: jax.Array, weights: jax.Array, top: jax.Array) -> tuple[jax.Array, jax.Array]:
    exponentials = jnp.exp(jnp.minimum(logits - top, MAX_EXPONENT))
    return exponentials, weights * exponentials


@jax.custom_vjp
def _probabilities(
    logits: jax.Array, weights: jax.Array, top: jax.Array, share: jax.Array, epsilon: jax.Array
) -> jax.Array:
    """Returns `(w exp(x - top) + share) / (sum w exp(x - top) + epsilon)`; `top`, `share` and `epsilon` are constants."""
    return _probabilities_forward(logits, weights, top, share, epsilon)[0]


def _probabilities_forward(
    logits: jax.Array, weights: jax.Array, top: jax.Array, share: jax.Array, epsilon: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    _, masses = _masses(logits, weights, top)
    total = kept(jnp.sum(masses, axis=-1, keepdims=True) + epsilon)
    inverse = 1.0 / jnp.where(total > 0.0, total, 1.0)
    return (masses + share) * inverse, (logits, weights, top, share, total, inverse)


# The true derivatives, written out: fewer passes over pairs than automatic differentiation takes. Only that to the weight
# of a key dropped outright (0, never on a relaxed path) is bounded.
def _probabilities_backward(
    stored: tuple[jax.Array, ...], slope: jax.Array
) -> tuple[jax.Array, ...]:
    logits, weights, top, share, total, inverse = stored
    exponentials, masses = _masses(logits, weights, top)
    mean = row_products(slope, masses + share) * inverse
    to_masses = (slope - jnp.where(total > 0.0, mean, 0.0)) * inverse
    to_logits = jnp.where(logits - top < MAX_EXPONENT, to_masses * masses, 0.0)
    constants = (jnp.zeros_like(top), jnp.zeros_like(share), jnp.zeros((), logits.dtype))
    bounded = jnp.minimum(exponentials, jnp.exp(jnp.asarray(MAX_DROPPED_EXPONENT, logits.dtype)))
    to_weights = to_masses * jnp.where(weights > 0.0, exponentials, bounded)
    return to_logits, to_weights, *constants


_probabilities.defvjp(_probabilities_forward, _probabilities_backward)


def smooth_max(values: jax.Array, p: jax.Array | float, axis: int = -1) -> jax.Array:
    """Returns a smooth, scale-free upper bound of the maximum: `(sum x_i^p)^(1/p)`.

    Lies between the maximum and `n^(1/p)` times it. The derivative with respect to x_i is
    `(x_i / smooth_max)^(p-1)`: every value gets some, the largest most. Zeros contribute nothing.

    Args:
      values: Values of one unit, >= 0 (not checked: traced), any shape.
      p: Exponent, scalar, > 1.
      axis: Axis reduced.

    Returns:
      The smooth maximum, unit of `values`, without `axis`.
    """
    # Any positive factor cancels out; the largest value keeps the powers within range.
    top = detach(jnp.max(values, axis=axis, keepdims=True))
    top = jnp.where(top > 0.0, top, 1.0)
    is_positive = values > 0.0
    logs = jnp.log(jnp.where(is_positive, values / top, 1.0))
    total = jnp.sum(jnp.where(is_positive, jnp.exp(p * logs), 0.0), axis=axis)
    has_any = total > 0.0
    scaled = jnp.exp(jnp.log(jnp.where(has_any, total, 1.0)) / p)
    return jnp.where(has_any, scaled * jnp.squeeze(top, axis=axis), 0.0)
