"""What training minimises besides the task loss: budgets on latency, energy, area and bytes.

Every cost C is in physical units and enters as the ratio `C / limit` to its budget; 1 means
the budget is met exactly. The default is an augmented Lagrangian on the logarithm of the ratio:
its price finds its own scale, and its quadratic term hits the budget from both sides.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from codesign.errors import UnknownNameError

CONSTRAINT_METHODS = ("lagrangian", "squared", "pid")

# Dimensionless.
LAGRANGIAN_STIFFNESS = 30.0  # ours
LAGRANGIAN_RATE = 0.3  # ours
# Ours: largest violation the price reacts to, or it winds up while a far cost is on its way.
LAGRANGIAN_MAX_VIOLATION = 0.3
SQUARED_WEIGHT = 10.0  # LTMP, arXiv 2307.10780
ONE_SIDED_WEIGHT = 0.1  # Uhlich et al., arXiv 1905.11452
PID_INITIAL_PRICE = 0.1  # ours
PID_PROPORTIONAL, PID_INTEGRAL, PID_DERIVATIVE = 1.0, 2e-3, 0.0  # HGQ2 repository, per epoch
PID_STEPS = 50  # ours: steps that share one of those updates, or the price overshoots
# Ours: part of a budget by which a measured cost may exceed it before it counts as missed.
BUDGET_MISS = 0.01
PROJECTION_START, PROJECTION_GROWTH = 1e-3, 1.1  # HDX, arXiv 2301.09312 (recalled)


def squared_budget(ratio: jax.Array, weight: jax.Array | float = SQUARED_WEIGHT) -> jax.Array:
    """Returns `weight (ratio - 1)^2`, which hits a budget from both sides.

    Args:
      ratio: Cost over budget, any shape.
      weight: Scale of the penalty.

    Returns:
      Penalty, same shape.

    References:
      Bonnaerens and Dambre, "Learned Thresholds Token Merging and Pruning for Vision
      Transformers", arXiv 2307.10780.
    """
    return weight * jnp.square(ratio - 1.0)


def one_sided_budget(ratio: jax.Array, weight: jax.Array | float = ONE_SIDED_WEIGHT) -> jax.Array:
    """Returns `weight relu(ratio - 1)^2`, for caps that may be left unused.

    Args:
      ratio: Cost over cap, any shape.
      weight: Scale of the penalty.

    Returns:
      Penalty, same shape, 0 within the cap.

    References:
      Uhlich et al., arXiv 1905.11452.
    """
    return weight * jnp.square(jax.nn.relu(ratio - 1.0))


def log_price(ratio: jax.Array, price: jax.Array | float) -> jax.Array:
    """Returns `price log(ratio)`: a fixed price per relative saving, to trace a curve.

    Args:
      ratio: Cost over a reference cost, any shape, > 0.
      price: Loss given up per e-fold of cost.

    Returns:
      Penalty, same shape.
    """
    return price * jnp.log(ratio)


def double_price(price: jax.Array, ratio: jax.Array) -> jax.Array:
    """Returns the price doubled where a budget is violated, halved where it is met.

    References:
      Fu et al., "Auto-NBA", arXiv 2106.06575.
    """
    return jnp.where(ratio > 1.0, 2.0 * price, 0.5 * price)


class ConstraintState(NamedTuple):
    """State of C budgets.

    Attributes:
      price: Price of each budget, `[C]`, >= 0, loss per unit of its violation.
      error_sum: Sum of past `log10(ratio)`, `[C]`; PID only.
      previous_error: Last `log10(ratio)`, `[C]`; PID only.
    """

    price: jax.Array
    error_sum: jax.Array
    previous_error: jax.Array


def init_constraint(method: str, num_constraints: int) -> ConstraintState:
    """Returns the initial state of `num_constraints` budgets.

    Args:
      method: One of `CONSTRAINT_METHODS`.
      num_constraints: Number of budgets C.

    Returns:
      State with leaves `[C]`.

    Raises:
      UnknownNameError: If `method` does not exist.
    """
    match method:
        case "lagrangian":
            price = 0.0
        case "squared":
            price = SQUARED_WEIGHT
        case "pid":
            price = PID_INITIAL_PRICE
        case _:
            raise _unknown_method(method)
    zeros = jnp.zeros(num_constraints)
    return ConstraintState(zeros + price, zeros, zeros)


def constraint_penalty(state: ConstraintState, ratios: jax.Array, method: str) -> jax.Array:
    """Returns the sum of the budgets' penalties, to add to the task loss.

    Args:
      state: From `init_constraint` or `update_constraint`; constant for differentiation.
      ratios: Cost over budget, `[C]`, > 0.
      method: The method of `state`.

    Returns:
      Penalty, scalar: `price g + stiffness g^2 / 2` with g = log(ratio) for "lagrangian",
      `price (ratio - 1)^2` for "squared", `price ratio` for "pid".

    Raises:
      UnknownNameError: If `method` does not exist.
    """
    match method:
        case "lagrangian":
            violations = jnp.log(ratios)
            quadratic = 0.5 * LAGRANGIAN_STIFFNESS * jnp.square(violations)
            return jnp.sum(state.price * violations + quadratic)
        case "squared":
            return jnp.sum(squared_budget(ratios, state.price))
        case "pid":
            return jnp.sum(state.price * ratios)
        case _:
            raise _unknown_method(method)


def update_constraint(state: ConstraintState, ratios: jax.Array, method: str) -> ConstraintState:
    """Returns the state after a step whose costs were `ratios`.

    Args:
      state: State before the step.
      ratios: Cost over budget, `[C]`, > 0.
      method: The method of `state`.

    Returns:
      New state: dual ascent `max(price + rate g, 0)` with g = log(ratio), clipped, for
      "lagrangian", unchanged for "squared", `update_pid` with gains for single steps for "pid".

    Raises:
      UnknownNameError: If `method` does not exist.
    """
    match method:
        case "lagrangian":
            bound = LAGRANGIAN_MAX_VIOLATION
            violations = jnp.clip(jnp.log(ratios), -bound, bound)
            ascended = state.price + LAGRANGIAN_RATE * violations
            return state._replace(price=jnp.maximum(ascended, 0.0))
        case "squared":
            return state
        case "pid":
            return update_pid(
                state,
                ratios,
                proportional=PID_PROPORTIONAL / PID_STEPS,
                integral=PID_INTEGRAL / PID_STEPS**2,  # the sum has more terms, too
                derivative=PID_DERIVATIVE,
            )
        case _:
            raise _unknown_method(method)


def update_pid(
    state: ConstraintState,
    ratios: jax.Array,
    *,
    proportional: jax.Array | float = PID_PROPORTIONAL,
    integral: jax.Array | float = PID_INTEGRAL,
    derivative: jax.Array | float = PID_DERIVATIVE,
) -> ConstraintState:
    """Returns the state after one controller step on the logarithm of the price.

    `log10 price += p e + i sum(e) + d (e - e_previous)`, e = log10(ratio). The default gains
    suit one update per epoch, when the costs have followed the last price.

    Args:
      state: From `init_constraint("pid", C)`.
      ratios: Cost over budget, `[C]`, > 0.
      proportional: Gain p.
      integral: Gain i.
      derivative: Gain d.

    Returns:
      New state.

    References:
      HGQ2 repository (calad0i/HGQ2), beta PID scheduler.
    """
    error = jnp.log10(ratios)
    error_sum = state.error_sum + error
    step = proportional * error + integral * error_sum
    step = step + derivative * (error - state.previous_error)
    return ConstraintState(state.price * 10.0**step, error_sum, error)


class ProjectionState(NamedTuple):
    """State of `project_gradients`: the demanded descent of each cost, `[C]`, 0 where met."""

    delta: jax.Array


def init_projection(num_constraints: int) -> ProjectionState:
    """Returns the state of `num_constraints` hard limits, all taken as met."""
    return ProjectionState(jnp.zeros(num_constraints))


def project_gradient(
    gradient: chex.ArrayTree, constraint_gradient: chex.ArrayTree, delta: jax.Array | float
) -> chex.ArrayTree:
    """Returns the gradient nearest to `gradient` whose step lowers a cost by at least `delta`.

    Adds the smallest m with `(g_L + m).g_C >= delta`.

    Args:
      gradient: Loss gradient g_L, a pytree.
      constraint_gradient: Gradient g_C of the violated cost, same structure.
      delta: Demanded inner product, scalar, >= 0.

    Returns:
      `g_L + relu(delta - g_L.g_C) / (|g_C|^2 + 1e-12) g_C`, same structure.

    References:
      Hong et al., "HDX", arXiv 2301.09312 (formula recalled, closed form derived).
    """
    shortfall = jax.nn.relu(delta - _dot(gradient, constraint_gradient))
    scale = shortfall / (_dot(constraint_gradient, constraint_gradient) + 1e-12)
    return jax.tree.map(lambda g, c: g + scale * c, gradient, constraint_gradient)


def project_gradients(
    state: ProjectionState,
    gradient: chex.ArrayTree,
    constraint_gradients: chex.ArrayTree,
    ratios: jax.Array,
) -> tuple[chex.ArrayTree, ProjectionState]:
    """Projects a gradient for each violated limit in turn, the largest violation first.

    The demand delta of a limit starts at `1e-3 |g_L| |g_C|`, grows by 1.1 per violated step and
    resets when the limit is met.

    Args:
      state: From `init_projection` or the last step.
      gradient: Loss gradient, a pytree.
      constraint_gradients: Gradients of the C costs, same structure, each leaf with a leading
        axis C.
      ratios: Cost over limit, `[C]`.

    Returns:
      The projected gradient, unchanged where every ratio is <= 1, and the new state.

    References:
      Hong et al., "HDX", arXiv 2301.09312 (formula recalled).
    """
    norms = jnp.sqrt(jax.vmap(_dot)(constraint_gradients, constraint_gradients))
    start = PROJECTION_START * jnp.sqrt(_dot(gradient, gradient)) * norms
    grown = jnp.where(state.delta > 0.0, PROJECTION_GROWTH * state.delta, start)
    is_violated = ratios > 1.0
    delta = jnp.where(is_violated, grown, 0.0)

    def project(current: chex.ArrayTree, index: jax.Array) -> tuple[chex.ArrayTree, None]:
        chosen = jax.tree.map(lambda leaf: leaf[index], constraint_gradients)
        projected = project_gradient(current, chosen, delta[index])
        selected = jax.tree.map(
            lambda new, old: jnp.where(is_violated[index], new, old), projected, current
        )
        return selected, None

    order = jnp.argsort(ratios, descending=True)
    projected, _ = jax.lax.scan(project, gradient, order)
    return projected, ProjectionState(delta)


def token_cost_ratio(keep_fractions: jax.Array, num_tokens: int, width: int) -> jax.Array:
    """Returns the MACs of a token-pruned transformer relative to the dense one.

    Args:
      keep_fractions: Cumulative fraction of tokens left by each layer, `[L]`.
      num_tokens: Tokens n that enter the first layer.
      width: Model width d; the feed-forward layer is 4 d wide.

    Returns:
      Ratio, scalar, 1 if nothing is dropped. A layer's Q, K, V, output projection and attention
      run on the tokens that enter it, its feed-forward layer on those that it keeps.

    References:
      Bonnaerens and Dambre, "Learned Thresholds Token Merging and Pruning for Vision
      Transformers", arXiv 2307.10780.
    """
    entering = jnp.concatenate([jnp.ones_like(keep_fractions[:1]), keep_fractions[:-1]])
    linear = float(num_tokens * width**2)
    attention = jnp.square(entering) * float(num_tokens**2 * width)
    macs = 2.0 * entering * linear + attention + 4.0 * keep_fractions * linear
    return jnp.mean(macs) / (6.0 * linear + float(num_tokens**2 * width))


def _dot(a: chex.ArrayTree, b: chex.ArrayTree) -> jax.Array:
    """Returns the inner product of two pytrees, scalar."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return sum(jax.tree.leaves(products), start=jnp.zeros(()))


def _unknown_method(method: str) -> UnknownNameError:
    """Returns the error for a method that does not exist."""
    choices = ", ".join(CONSTRAINT_METHODS)
    return UnknownNameError(f"`method` must be one of {choices}, got '{method}'.")
