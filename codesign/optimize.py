"""One compiled training step on weights, policy and the machine's sizes at once."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from numpy.typing import ArrayLike, NDArray

from codesign.errors import CodesignError
from codesign.gates import Relaxation
from codesign.objective import (
    ConstraintState,
    constraint_penalty,
    init_constraint,
    update_constraint,
)
from codesign.policy import GROUPS, Policy, group, has_whole_bits, project
from codesign.rounding import hardened
from codesign.watch import GRADIENT_NORM, THRESHOLD_GRADIENT

PyTree = Any
"""A nested container of arrays."""

Group = Literal["params", "thresholds", "bits", "clips", "sizes"]
TRAINABLE: tuple[Group, ...] = ("params", "thresholds", "bits", "clips", "sizes")
"""Optimiser groups: the model's weights, those of a policy, and the machine's sizes."""

# Every rate ends at this fraction of its peak; that of the weights also starts there, and rises over this part of the
# steps (ours).
RATE_FLOOR = 0.1
WEIGHT_WARMUP_FRACTION = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizeSettings:
    """Everything static about training; values here are compiled into the step."""

    # Optimiser groups that are trained; the others keep their values bit for bit.
    train: tuple[Group, ...] = ("params", "thresholds", "bits", "clips")
    # Optimiser steps in all, >= 1.
    num_steps: int = 200
    # Last part of the steps, with widths rounded to whole bits and held, [0, 1).
    hardened_fraction: float = 0.3
    # Peak rate of AdamW on the weights, per step, > 0.
    weight_rate: float = 5e-4
    # Added to the root of the second moment of the weights' gradients, > 0: below it steps shrink with the gradient, so
    # that a model close to its teacher is not stirred by the noise of small batches.
    weight_epsilon: float = 1e-8
    # Decoupled weight decay of the weights, per unit of rate, >= 0.
    weight_decay: float = 0.01
    # Rate of Adam on thresholds, in units of the unconstrained variable per step, > 0.
    threshold_rate: float = 0.03
    # Rate of Adam on widths, bit per step, > 0.
    bits_rate: float = 0.05
    # Rate of Adam on clips, in natural logarithm of the range per step, > 0.
    clip_rate: float = 1e-2
    # Rate of Adam on the machine's sizes, octaves per step, > 0.
    size_rate: float = 0.05
    # Largest gradient norm of a group; longer gradients are scaled down to it, > 0.
    clip_norm: float = 1.0
    # How the budgets are held: augmented Lagrangian, fixed squared penalty, or PID on the price.
    method: Literal["lagrangian", "squared", "pid"] = "lagrangian"
    # First part of the steps, over which the budgets' penalty rises from 0 to its full size, [0, 1].
    price_warmup_fraction: float = 0.1
    # Width of a gate at the start, in units of the spread of its scores, > 0.
    temperature_start: float = 0.5
    # Width of a gate at hardening and after it, same unit, > 0 and at most the start's.
    temperature_end: float = 0.05
    # Exponent of the smooth maximum at the start, > 1.
    smoothness_start: float = 8.0
    # Exponent of the smooth maximum at hardening and after it, at least the start's.
    smoothness_end: float = 32.0
    # Whether gates are hard in the forward pass, with the gradient of the soft gate.
    straight_through: bool = True

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
          CodesignError: If a field is outside its range; names it.
        """
        unknown = [name for name in self.train if name not in TRAINABLE]
        if not self.train or unknown or len(set(self.train)) != len(self.train):
            raise CodesignError(
                f"`train` must name one or more of {', '.join(TRAINABLE)}, each once, got {self.train}"
            )
        if self.num_steps < 1:
            raise CodesignError(f"`num_steps` must be at least 1, got {self.num_steps}: raise it")
        if not 0.0 <= self.hardened_fraction < 1.0:
            raise CodesignError(
                f"`hardened_fraction` must lie in [0, 1), got {self.hardened_fraction}: change it"
            )
        if not 0.0 <= self.price_warmup_fraction <= 1.0:
            raise CodesignError(
                f"`price_warmup_fraction` must lie in [0, 1], got {self.price_warmup_fraction}: change it"
            )
        for name in (
            "weight_rate",
            "weight_epsilon",
            "threshold_rate",
            "bits_rate",
            "clip_rate",
            "size_rate",
            "clip_norm",
        ):
            if not 0.0 < getattr(self, name) < math.inf:
                raise CodesignError(
                    f"`{name}` must be > 0 and finite, got {getattr(self, name)}: change it"
                )
        if not 0.0 <= self.weight_decay < math.inf:
            raise CodesignError(
                f"`weight_decay` must be >= 0 and finite, got {self.weight_decay}: change it"
            )
        if not 0.0 < self.temperature_end <= self.temperature_start < math.inf:
            raise CodesignError(
                "`temperature_end` must lie in (0, `temperature_start`], both finite, got "
                f"{self.temperature_end} with a start of {self.temperature_start}: change one"
            )
        if not 1.0 < self.smoothness_start <= self.smoothness_end < math.inf:
            raise CodesignError(
                "`smoothness_start` must lie in (1, `smoothness_end`], both finite, got "
                f"{self.smoothness_start} with an end of {self.smoothness_end}: change one"
            )
        init_constraint(self.method, 0)

    @property
    def hardened_step(self) -> int:
        """First step of the hardened stage, counted from 0; `num_steps` if there is none."""
        return max(1, round(self.num_steps * (1.0 - self.hardened_fraction)))


@struct.dataclass
class TrainState:
    """All that a step changes.

    Attributes:
      step: Steps done, int32 scalar.
      params: The model's weights.
      policy: The knobs; widths are whole bits from the hardened stage on.
      optimizer_state: Moments of the trained groups.
      constraint: Prices of the budgets.
      sizes: The machine's sizes in their own units, scalars by name; empty where they are not trained.
    """

    step: jax.Array
    params: PyTree
    policy: Policy
    optimizer_state: PyTree
    constraint: ConstraintState
    sizes: dict[str, jax.Array] = struct.field(default_factory=dict)


@struct.dataclass
class LossAux:
    """What a loss function returns beside the loss.

    Attributes:
      terms: Scalars to log, by name (loss terms, kept fractions).
      workload: What the cost function reads.
    """

    terms: dict[str, jax.Array]
    workload: Any


LossFn = Callable[[PyTree, Policy, PyTree, PyTree, Relaxation], tuple[jax.Array, LossAux]]
"""`(params, policy, batch, constants, relaxation) -> (task loss, aux)`."""

CostFn = Callable[[Any, PyTree, jax.Array], jax.Array]
"""`(workload, constants, smoothness) -> ratios [C]`, cost over budget, > 0; the budgets are among the constants, and so,
as `sizes`, are the machine's sizes where they are trained."""

SizesFn = Callable[[dict[str, jax.Array], Any, PyTree, jax.Array], dict[str, jax.Array]]
"""`(sizes, workload, constants, smoothness) -> sizes`, moved back among the legal ones."""

StepFn = Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, jax.Array]]]
"""`(state, batch, constants) -> (state, metrics)`; the metrics are scalars and vectors."""


def init_state(
    params: PyTree,
    policy: Policy,
    settings: OptimizeSettings,
    num_constraints: int,
    sizes: dict[str, jax.Array] | None = None,
) -> TrainState:
    """Returns the state before the first step, on copies of its arguments.

    Args:
      params: The model's weights.
      policy: The knobs. Widths that are not trained are used as they are, so pass whole bits.
      settings: Settings of the step.
      num_constraints: Number of budgets C.
      sizes: The machine's sizes, scalars by name, > 0; needed where they are trained.
    """
    sizes = {} if sizes is None else sizes
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        policy=policy,
        optimizer_state=_optimizer(settings).init(_trained(params, policy, sizes, settings)),
        constraint=init_constraint(settings.method, num_constraints),
        sizes=sizes,
    )
    # The step takes over its input's buffers, which must therefore be unshared; an explicit dtype
    # drops weak types, which would cost a second compilation.
    copied: TrainState = jax.tree.map(lambda x: jnp.array(x, dtype=x.dtype, copy=True), state)
    return copied


def relaxation_at(step: jax.Array, settings: OptimizeSettings) -> Relaxation:
    """Returns the relaxation at a step, counted from 0.

    Up to the hardened stage the temperature falls along a cosine and the smoothness rises
    geometrically; then both are constant.

    Args:
      step: Steps done, integer scalar, traced or not.
      settings: Start, end and length of the schedules.
    """
    progress = jnp.clip(jnp.asarray(step) / settings.hardened_step, 0.0, 1.0)
    fall = settings.temperature_start - settings.temperature_end
    growth = settings.smoothness_end / settings.smoothness_start
    return Relaxation(
        temperature=settings.temperature_end + fall * 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
        smoothness=settings.smoothness_start * growth**progress,
        straight_through=settings.straight_through,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStep:
    """A training step, called as a `StepFn`.

    Attributes:
      compiled: The step of every stage, compiled once; its widths are whole in the hardened stage if they came in whole.
      ratios: Cost over budget `[C]` of a state, batch and constants under another policy, compiled when the hardened stage
        begins; None if widths are not trained.
      hardened_step: First step of that stage.
    """

    compiled: jax.stages.Wrapped
    ratios: Callable[..., jax.Array] | None
    hardened_step: int

    def __call__(
        self, state: TrainState, batch: PyTree, constants: PyTree
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Takes a step; see `make_train_step`."""
        if self.ratios is not None and int(state.step) == self.hardened_step:
            if not has_whole_bits(state.policy):
                state = self.harden(state, [(batch, 1.0)], constants)
        after: tuple[TrainState, dict[str, jax.Array]] = self.compiled(state, batch, constants)
        return after

    def harden(
        self, state: TrainState, batches: Sequence[tuple[PyTree, ArrayLike]], constants: PyTree
    ) -> TrainState:
        """Returns the state with trained widths in whole bits that meet the budgets on given batches.

        The step does so with its own batch unless this was called before. Call it where one batch says too little of the
        budgets, because its examples are few or of one length.

        Args:
          state: State before the first step of the hardened stage.
          batches: Batches of the loss function, each with its weight, scalar or `[C]`, in the mean of cost over budget.
          constants: As in a step.
        """
        ratios_fn = self.ratios
        if ratios_fn is None:
            return state

        def mean_ratios(policy: Policy) -> NDArray[np.float64]:
            ratios = [
                np.asarray(ratios_fn(state, batch, constants, policy)) for batch, _ in batches
            ]
            weights = [np.broadcast_to(weight, ratios[0].shape) for _, weight in batches]
            return np.average(ratios, axis=0, weights=weights)

        hard: TrainState = state.replace(policy=hardened(state.policy, mean_ratios))  # type: ignore[attr-defined]
        return hard


def make_train_step(
    loss_fn: LossFn,
    cost_fn: CostFn,
    settings: OptimizeSettings,
    sizes_fn: SizesFn | None = None,
) -> TrainStep:
    """Returns the training step.

    A step descends on task loss plus penalties, only through the groups that are trained, then
    moves widths into their legal range. At `settings.hardened_step` trained widths are rounded, so
    that no cost rises where that can be had, and held from then on. Stages, schedules and budgets
    are traced: the step compiles once, and the costs that the rounding compares once more. The state
    passed in is consumed. Reading which step it is, the host waits for the one before.

    The machine's sizes do not touch the task. Their logarithms descend on the sum of the ratios' logarithms, whatever the
    price of the budgets, and are held from the hardened stage on; the rest sees them as constants.

    Args:
      loss_fn: Task loss of a batch; must not use the metric names below.
      cost_fn: Cost over budget of a workload; may return `[0]`.
      settings: Settings, compiled in.
      sizes_fn: Moves sizes back among the legal ones after each step; needed where they are trained.

    Returns:
      The step. Its metrics: the terms of `loss_fn`; `task`, `penalty`, `objective`; `ratio` and
      `price` `[C]`; `price_scale`, `temperature`, `smoothness`; `gradient_norm.<group>`, before
      clipping; `threshold_gradient.<knob>` `[L]`, the gradient norm of each layer's trained
      thresholds; `is_finite`.
    """
    optimizer = _optimizer(settings)
    trains_bits, trains_sizes = "bits" in settings.train, "sizes" in settings.train
    if trains_sizes and sizes_fn is None:
        raise CodesignError("`train` names `sizes`: give `sizes_fn`, which keeps them legal")

    def with_sizes(constants: PyTree, sizes: dict[str, jax.Array]) -> PyTree:
        return constants | {"sizes": sizes} if sizes else constants

    def step_fn(
        state: TrainState, batch: PyTree, constants: PyTree
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        is_hardened = state.step >= settings.hardened_step
        relaxation = relaxation_at(state.step, settings)
        price_scale = _price_scale(state.step, settings)

        policy = state.policy

        def objective(trained: dict[str, PyTree]) -> tuple[jax.Array, Any]:
            params = trained.get("params", state.params)
            task, aux = loss_fn(params, _merged(policy, trained), batch, constants, relaxation)
            held = with_sizes(constants, state.sizes)
            ratios = cost_fn(aux.workload, held, relaxation.smoothness)
            penalty = price_scale * constraint_penalty(state.constraint, ratios, settings.method)
            workload = jax.lax.stop_gradient(aux.workload) if trains_sizes else None
            return task + penalty, (task, penalty, ratios, aux.terms, workload)

        def size_objective(octaves: dict[str, jax.Array]) -> jax.Array:
            moved = with_sizes(constants, _scaled(state.sizes, octaves))
            return jnp.sum(jnp.log(cost_fn(workload, moved, relaxation.smoothness)))

        trained = _trained(state.params, policy, state.sizes, settings)
        chosen = {name: tree for name, tree in trained.items() if name != "sizes"}
        (value, (task, penalty, ratios, terms, workload)), gradients = jax.value_and_grad(
            objective, has_aux=True
        )(chosen)
        if trains_sizes:
            gradients["sizes"] = jax.grad(size_objective)(jax.tree.map(jnp.zeros_like, state.sizes))
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, trained)
        if trains_bits:
            updates["bits"] = jax.tree.map(
                lambda update: jnp.where(is_hardened, 0.0, update), updates["bits"]
            )
        sizes = state.sizes
        if trains_sizes:
            assert sizes_fn is not None
            moved = _scaled(sizes, updates.pop("sizes"))
            legal = sizes_fn(moved, workload, constants, relaxation.smoothness)
            sizes = jax.tree.map(lambda new, old: jnp.where(is_hardened, old, new), legal, sizes)
        trained = optax.apply_updates(chosen, updates)
        policy = _merged(policy, trained)
        ascended = update_constraint(state.constraint, ratios, settings.method)

        metrics = {
            "task": task,
            "penalty": penalty,
            "objective": value,
            "ratio": ratios,
            "price": state.constraint.price,
            "price_scale": price_scale,
            "temperature": relaxation.temperature,
            "smoothness": relaxation.smoothness,
        }
        metrics |= {GRADIENT_NORM + name: optax.tree.norm(gradients[name]) for name in gradients}
        for name, gradient in gradients.get("thresholds", {"layers": {}})["layers"].items():
            metrics[THRESHOLD_GRADIENT + name] = jnp.linalg.norm(
                jnp.reshape(gradient, (gradient.shape[0], -1)), axis=1
            )
        if clash := sorted(terms.keys() & metrics.keys()):
            raise ValueError(f"`loss_fn` returned the reserved term '{clash[0]}': rename it")
        metrics |= terms
        metrics["is_finite"] = jnp.all(
            jnp.stack([jnp.all(jnp.isfinite(metric)) for metric in metrics.values()])
        )
        after = TrainState(
            step=state.step + 1,
            params=trained.get("params", state.params),
            policy=project(policy) if trains_bits else policy,
            optimizer_state=optimizer_state,
            # While the penalty is scaled down, the prices learn as slowly.
            constraint=jax.tree.map(
                lambda new, old: old + price_scale * (new - old), ascended, state.constraint
            ),
            sizes=sizes,
        )
        return after, metrics

    def ratios_fn(state: TrainState, batch: PyTree, constants: PyTree, policy: Policy) -> jax.Array:
        relaxation = relaxation_at(state.step, settings)
        _, aux = loss_fn(state.params, policy, batch, constants, relaxation)
        return cost_fn(aux.workload, with_sizes(constants, state.sizes), relaxation.smoothness)

    return TrainStep(
        compiled=jax.jit(step_fn, donate_argnums=0),
        ratios=jax.jit(ratios_fn) if trains_bits else None,
        hardened_step=settings.hardened_step,
    )


def _optimizer(settings: OptimizeSettings) -> optax.GradientTransformation:
    """Returns the optimiser of the trained groups, each with its own clipping and a rate that falls along a cosine.

    That of widths and sizes falls over stage 1, that of the weights over stage 2 (if there is one), the others' over both.
    """
    stage1, stage2 = settings.hardened_step, settings.num_steps - settings.hardened_step
    warmup_steps = int(WEIGHT_WARMUP_FRACTION * settings.num_steps)
    weight_rate = optax.join_schedules(
        [
            optax.linear_schedule(
                RATE_FLOOR * settings.weight_rate, settings.weight_rate, warmup_steps
            ),
            optax.cosine_decay_schedule(
                settings.weight_rate, max(1, stage2 or stage1 - warmup_steps), RATE_FLOOR
            ),
        ],
        [max(warmup_steps, stage1 if stage2 else 0)],
    )

    def falling(rate: float, num_steps: int) -> optax.Schedule:
        return optax.cosine_decay_schedule(rate, num_steps, RATE_FLOOR)

    transforms = {
        "params": optax.adamw(
            weight_rate, eps=settings.weight_epsilon, weight_decay=settings.weight_decay
        ),
        "thresholds": optax.adam(falling(settings.threshold_rate, settings.num_steps)),
        "bits": optax.adam(falling(settings.bits_rate, stage1)),
        "clips": optax.adam(falling(settings.clip_rate, settings.num_steps)),
        "sizes": optax.adam(falling(settings.size_rate, stage1)),
    }
    clipping = optax.clip_by_global_norm(settings.clip_norm)
    return optax.partition(
        {name: optax.chain(clipping, transforms[name]) for name in settings.train},
        {name: name for name in settings.train},
    )


def _price_scale(step: jax.Array, settings: OptimizeSettings) -> jax.Array:
    """Returns the factor on the budgets' penalty: a ramp from 0 to 1, at full size if it has no length."""
    warmup_steps = settings.price_warmup_fraction * settings.num_steps
    return jnp.clip(step / warmup_steps, 0.0, 1.0) if warmup_steps > 0.0 else jnp.ones(())


def _trained(
    params: PyTree, policy: Policy, sizes: dict[str, jax.Array], settings: OptimizeSettings
) -> dict[str, PyTree]:
    """Returns what is trained, by optimiser group; a policy's group holds `layers` and `ends`."""

    def chosen(knobs: dict[str, jax.Array], name: str) -> dict[str, jax.Array]:
        return {knob: value for knob, value in knobs.items() if group(knob) == name}

    return {
        name: {"params": params, "sizes": sizes}[name]
        if name in ("params", "sizes")
        else {"layers": chosen(policy.layers, name), "ends": chosen(policy.ends, name)}
        for name in settings.train
    }


def _scaled(sizes: dict[str, jax.Array], octaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns sizes times powers of two; those of octaves 0 bit for bit."""
    return {name: value * jnp.exp2(octaves[name]) for name, value in sizes.items()}


def _merged(policy: Policy, trained: dict[str, PyTree]) -> Policy:
    """Returns the policy with the knobs of the trained groups put in."""
    layers, ends = dict(policy.layers), dict(policy.ends)
    for name in GROUPS:
        if name in trained:
            layers |= trained[name]["layers"]
            ends |= trained[name]["ends"]
    return Policy(layers=layers, ends=ends)
