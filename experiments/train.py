"""Training of a policy (and the weights) under a budget, from a problem to a deployable point."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from codesign.calibration import Calibration
from codesign.errors import InfeasibleBudgetError
from codesign.experiments.configs import Budget, Metric, Scope, model_shape
from codesign.experiments.data import batch_indices
from codesign.experiments.evaluate import Measurement, Point, deployment, hard_run, metrics_of
from codesign.experiments.problem import Problem, calibrate, no_cost
from codesign.experiments.run import RunDirectory, train_loop
from codesign.gates import Relaxation
from codesign.hw.operating_points import Setting, cheapest_setting, workload_from_fractions
from codesign.hw.surrogate import SCOPES, cost
from codesign.models import vit
from codesign.optimize import (
    Group,
    LossAux,
    OptimizeSettings,
    StepFn,
    TrainState,
    init_state,
    make_train_step,
)
from codesign.policy import ATTENTION_BITS, Policy, bits_range, dense_knobs, deployed_bits

BISECTIONS = 6
"""Halvings of the interval of alpha, 2, when start thresholds are sought: 1/32."""
BUDGET_BISECTIONS = 7
"""Halvings of the interval [0, 1] of a move that is to meet a budget: 1/128."""
FILTER_WIDTHS = ("query_bits", "key_bits")
"""Widths that a common move leaves alone: they are at a few bits from the start."""
BUDGET_TOLERANCE = 0.005
"""Part of the budget by which the deployed cost may exceed it before thresholds are raised (ours)."""


def closed_form_costs(problem: Problem, setting: Setting) -> dict[Scope, dict[Metric, float]]:
    """Returns pJ and cycles per example of a setting that is alike in all layers and heads."""
    shape = model_shape(problem.config.structure)
    price = cost(workload_from_fractions(shape, setting), problem.accelerator)
    return {
        scope: {name: float(value[0]) for name, value in metrics_of(price, scope).items()}
        for scope in SCOPES
    }


def check_reachable(problem: Problem, budget: Budget) -> None:
    """Raises `InfeasibleBudgetError` if the cheapest legal policy costs more than the budget."""
    shape = model_shape(problem.config.structure)
    dense = closed_form_costs(problem, Setting())[budget.scope]
    cheapest = closed_form_costs(problem, cheapest_setting(shape, num_rounds=problem.num_rounds))[
        budget.scope
    ]
    for metric, fraction in budget.limits.items():
        least = cheapest[metric] / dense[metric]
        if fraction < least:
            raise InfeasibleBudgetError(
                f"`budget.{metric}` {fraction:g} cannot be reached on preset `{problem.spec.name}`: the cheapest legal "
                f"policy costs {least:.3f} of dense ({budget.scope}): give at least {math.ceil(least * 1000) / 1000:g}"
            )


def start_policy(problem: Problem, *, linear_bits: float, attention_bits: float) -> Policy:
    """Returns start widths and the mechanism's own start knobs, all layers alike."""
    structure = problem.config.structure
    policy = dense_knobs(
        structure.num_layers, linear_bits=linear_bits, attention_bits=attention_bits
    )
    own = problem.mechanism.knobs(structure.num_layers, structure.num_heads)
    return Policy(layers=policy.layers | own, ends=policy.ends)


def with_alpha(policy: Policy, alpha: NDArray[np.float64]) -> Policy:
    """Returns the policy with thresholds atanh(alpha), alpha `[L, H, R]` limited to (-0.99, 0.99)."""
    value = jnp.asarray(np.arctanh(np.clip(alpha, -0.99, 0.99)), jnp.float32)
    return policy.replace(layers=policy.layers | {"threshold": value})  # type: ignore[attr-defined,no-any-return]


def start_point(problem: Problem) -> Point:
    """Returns where training starts: the dense weights, off-integer widths, thresholds at score quantiles.

    Each head's alpha is found by bisection on the hard path, round by round, so that the kept fractions on the calibration
    images are `start_kept`.
    """
    experiment = problem.experiment
    calibration = calibrate(problem.params, problem.calibration_pixels, problem.config)
    policy = start_policy(
        problem,
        linear_bits=experiment.start_linear_bits,
        attention_bits=experiment.start_attention_bits,
    )
    point = Point(params=problem.params, policy=policy, calibration=calibration)
    if "threshold" not in policy.layers:
        return point
    alpha = np.full(policy.layers["threshold"].shape, -0.5)
    for index, target in enumerate(experiment.start_kept):
        low, high = np.full(alpha.shape[:2], -1.0), np.full(alpha.shape[:2], 1.0)
        for _ in range(BISECTIONS):
            alpha[..., index] = (low + high) / 2.0
            kept = calibration_run(problem, _with_policy(point, with_alpha(policy, alpha)))[1]
            keeps_more = kept[..., index] > target
            low = np.where(keeps_more, alpha[..., index], low)
            high = np.where(keeps_more, high, alpha[..., index])
    return _with_policy(point, with_alpha(policy, alpha))


def _with_policy(point: Point, policy: Policy) -> Point:
    return dataclasses.replace(point, policy=policy)


def calibration_run(
    problem: Problem, point: Point
) -> tuple[dict[Scope, dict[Metric, float]], NDArray[np.float64]]:
    """Returns mean costs and kept fractions `[L, H, R]` of a point's hard path on the calibration images."""
    _, costs, kept = hard_run(
        deployment(problem, point), problem.calibration_pixels, problem.accelerator
    )
    return jax.tree.map(lambda values: float(np.mean(values)), costs), kept


class BudgetedTraining:
    """The compiled step of one choice of trained groups and budgeted metrics, used for any number of budgets.

    Budgets, ranges and the machine's sizes are traced, so one compilation serves a whole curve.
    """

    def __init__(
        self,
        problem: Problem,
        settings: OptimizeSettings,
        metrics: tuple[Metric, ...],
        scope: Scope,
    ):
        self.problem = problem
        self.settings = settings
        self.metrics = metrics
        self.scope: Scope = scope
        self.step: StepFn = make_train_step(self._loss, self._ratios, settings)
        self.dense = self.dense_costs(problem, scope)

    @staticmethod
    def dense_costs(problem: Problem, scope: Scope) -> dict[Metric, float]:
        """Returns pJ and cycles per example of dense attention with 8-bit linear layers on the same machine."""
        return closed_form_costs(problem, Setting())[scope]

    def _loss(
        self,
        params: dict[str, Any],
        policy: Policy,
        batch: dict[str, jax.Array],
        constants: dict[str, Any],
        relaxation: Relaxation,
    ) -> tuple[jax.Array, LossAux]:
        problem = self.problem
        output = vit.apply(
            params,
            policy,
            constants["calibration"],
            batch["pixels"],
            config=problem.config,
            mechanism=problem.mechanism,
            relaxation=relaxation,
        )
        entropy = jnp.mean(
            optax.losses.softmax_cross_entropy_with_integer_labels(output.logits, batch["labels"])
        )
        kl = jnp.mean(
            optax.losses.kl_divergence(
                jax.nn.log_softmax(output.logits), jax.nn.softmax(batch["teacher"])
            )
        )
        share = problem.experiment.distillation
        kept = output.workload.operations["softmax.exp"].count
        terms = {
            "cross_entropy": entropy,
            "kl_nats": kl,
            "kept": jnp.mean(kept) / problem.config.structure.num_tokens**2,
        }
        loss = share * kl + (1.0 - share) * entropy
        return loss, LossAux(terms=terms, workload=output.workload)

    def _ratios(self, workload: Any, constants: dict[str, Any], smoothness: jax.Array) -> jax.Array:
        if not self.metrics:
            return no_cost(workload, constants, smoothness)
        price = cost(workload, constants["accelerator"], smoothness=smoothness)
        values = metrics_of(price, self.scope)
        means = jnp.stack([jnp.mean(values[name]) for name in self.metrics])
        ratios: jax.Array = means / constants["limits"]
        return ratios

    def batch(self, step: int) -> dict[str, NDArray[Any]]:
        """Returns the batch of a step, a pure function of it."""
        experiment, train = self.problem.experiment, self.problem.train
        chosen = batch_indices(len(train), experiment.batch_size, step, experiment.seed + 1)
        return {
            "pixels": train.pixels[chosen],
            "labels": train.labels[chosen],
            "teacher": self.problem.teacher[chosen],
        }

    def limits(self, budget: Budget) -> dict[Metric, float]:
        """Returns the bounds of a budget in pJ and cycles per example."""
        bounds = budget.limits
        return {metric: bounds[metric] * self.dense[metric] for metric in self.metrics}

    def constants(self, calibration: Calibration, budget: Budget) -> dict[str, Any]:
        """Returns what the step reads beside its state and batch."""
        limits = self.limits(budget)
        return {
            "calibration": calibration,
            "accelerator": self.problem.accelerator,
            "limits": jnp.asarray([limits[name] for name in self.metrics] or [1.0], jnp.float32),
        }

    def initial(self, point: Point, budget: Budget) -> dict[str, Any]:
        """Returns the tree of a checkpoint before the first step."""
        policy = point.policy if "bits" in self.settings.train else deployed_bits(point.policy)
        state = init_state(point.params, policy, self.settings, max(1, len(self.metrics)))
        return {"state": state, "constants": self.constants(point.calibration, budget)}

    def train(
        self,
        point: Point,
        budget: Budget,
        run: RunDirectory,
        *,
        checkpoint_every: int,
        progress: bool,
    ) -> Point:
        """Trains from a point to a deployable one under a budget; continues where the run stopped.

        Before the first step, widths and thresholds are moved together until the deployed cost meets the budget, so that
        training redistributes instead of descending. Stage 1 anneals everything that is trained. At the hardened step the
        ranges are measured again, on the weights as they are then; widths become whole bits and stay. Stage 2 goes on with
        thresholds and weights on the deployed decisions, the budget still held. At last, should the deployed cost on the
        calibration images exceed the budget, all thresholds are raised together until it does not.

        Args:
          point: Where to start.
          budget: The bounds.
          run: Where checkpoints and metrics go.
          checkpoint_every: Steps between checkpoints.
          progress: Whether to show a progress bar.

        Raises:
          InfeasibleBudgetError: If no legal policy reaches the budget.
        """
        check_reachable(self.problem, budget)
        settings = self.settings
        if run.checkpoint_step() is None:
            point = self.fitted(point, budget)
        done, tree = run.resume(self.initial(point, budget))
        if done > settings.num_steps:
            return finished_point(tree)

        def until(stop: int, start: int, tree: dict[str, Any]) -> dict[str, Any]:
            state = train_loop(
                self.step,
                tree["state"],
                self.batch,
                tree["constants"],
                start=start,
                stop=stop,
                run=run,
                checkpoint_every=checkpoint_every,
                log_every=max(1, settings.num_steps // 20),
                progress=progress,
            )
            return {"state": state, "constants": tree["constants"]}

        if done < settings.hardened_step:
            tree = until(settings.hardened_step, done, tree)
            done = settings.hardened_step
        if done == settings.hardened_step and "params" in settings.train:
            tree["constants"]["calibration"] = calibrate(
                tree["state"].params, self.problem.calibration_pixels, self.problem.config
            )
        if done < settings.num_steps:
            tree = until(settings.num_steps, done, tree)
        final = self.repaired(finished_point(tree), budget)
        state: TrainState = tree["state"].replace(policy=final.policy)
        run.save(settings.num_steps + 1, {"state": state, "constants": tree["constants"]})
        return final

    def fitted(self, point: Point, budget: Budget) -> Point:
        """Returns the point moved, all layers and heads alike, to where its deployed cost meets the budget.

        Widths move towards their lower limits in proportion to their distance from them, thresholds alike upwards: the
        widths first under a budget on energy, the thresholds first under one on latency alone, which widths hardly change.
        """
        moves: dict[Group, Callable[[Policy, float], Policy]] = {
            "bits": narrowed,
            "thresholds": raised,
        }
        order: tuple[Group, ...] = ("bits", "thresholds")
        for name in order if "energy" in self.metrics else order[::-1]:
            if name not in self.settings.train or self.excess(point, budget) <= 1.0:
                continue
            point = self._moved(point, budget, moves[name])
        return point

    def _moved(
        self, point: Point, budget: Budget, move: Callable[[Policy, float], Policy]
    ) -> Point:
        """Returns the point with the least move in [0, 1] that meets the budget; the whole move if none does."""
        low, high = 0.0, 1.0
        for _ in range(BUDGET_BISECTIONS):
            middle = (low + high) / 2.0
            candidate = _with_policy(point, move(point.policy, middle))
            low, high = (middle, high) if self.excess(candidate, budget) > 1.0 else (low, middle)
        return _with_policy(point, move(point.policy, high))

    def excess(self, point: Point, budget: Budget) -> float:
        """Returns the largest ratio of deployed cost, on the calibration images, to its bound; 0 without a bound."""
        limits = self.limits(budget)
        if not limits:
            return 0.0
        costs = calibration_run(self.problem, point)[0][self.scope]
        return max(costs[name] / limit for name, limit in limits.items())

    def repaired(self, point: Point, budget: Budget) -> Point:
        """Returns the point with whole bits and, if the deployed cost breaks the budget, higher thresholds."""
        point = _with_policy(point, deployed_bits(point.policy))
        if "thresholds" not in self.settings.train:
            return point
        if self.excess(point, budget) <= 1.0 + BUDGET_TOLERANCE:
            return point
        mended = self._moved(point, budget, raised)
        # Thresholds that cannot mend it stay as trained; the measured cost is reported as it is.
        return mended if self.excess(mended, budget) <= 1.0 else point


def narrowed(policy: Policy, move: float) -> Policy:
    """Returns the policy with its widths moved towards their lower limits: `move` of the way, 0 to 1.

    Exact attention goes first (up to a half), where narrowing costs least quality, then the linear layers.
    """

    def inside(name: str, value: jax.Array) -> jax.Array:
        if not name.endswith("bits") or name in FILTER_WIDTHS:
            return value
        low = bits_range(name)[0]
        part = 2.0 * move if name in ATTENTION_BITS else 2.0 * move - 1.0
        return low + (value - low) * (1.0 - min(max(part, 0.0), 1.0))

    return Policy(
        layers={name: inside(name, value) for name, value in policy.layers.items()},
        ends={name: inside(name, value) for name, value in policy.ends.items()},
    )


def raised(policy: Policy, move: float) -> Policy:
    """Returns the policy with every alpha, if it has any, moved towards 1: `move` of the way, 0 to 1."""
    if "threshold" not in policy.layers:
        return policy
    alpha = np.tanh(np.asarray(policy.layers["threshold"], np.float64))
    return with_alpha(policy, alpha + (1.0 - alpha) * move)


def finished_point(tree: dict[str, Any]) -> Point:
    """Returns the point that a checkpoint holds."""
    state: TrainState = tree["state"]
    return Point(
        params=state.params, policy=state.policy, calibration=tree["constants"]["calibration"]
    )


def soft_measure(
    problem: Problem, point: Point, pixels: NDArray[np.int32], relaxation: Relaxation
) -> tuple[NDArray[np.float64], float]:
    """Returns logits `[N, classes]` and the mean kept fraction of the float path, to set beside the hard path's."""
    output = _soft_step(
        point.params,
        point.policy,
        point.calibration,
        pixels,
        relaxation=relaxation,
        config=problem.config,
        mechanism=problem.mechanism,
    )
    kept = np.mean(np.asarray(output.workload.operations["softmax.exp"].count))
    return np.asarray(output.logits, np.float64), float(
        kept / problem.config.structure.num_tokens**2
    )


_soft_step: Callable[..., Any] = jax.jit(vit.apply, static_argnames=("config", "mechanism"))


def drift(problem: Problem, point: Point, hard: Measurement) -> dict[str, float]:
    """Returns kept fraction and accuracy of the relaxed and straight-through paths beside the hard path's (validation)."""
    examples = problem.task.parts["validation"]
    settings = problem.experiment.optimize
    result = {
        "hard_kept": float(np.mean(hard.kept[..., -1])),
        "hard_accuracy": float(np.mean(hard.correct)),
    }
    for name, straight_through in (("soft", False), ("straight_through", True)):
        relaxation = Relaxation(
            temperature=jnp.asarray(settings.temperature_end),
            smoothness=jnp.asarray(settings.smoothness_end),
            straight_through=straight_through,
        )
        logits, kept = soft_measure(problem, point, examples.pixels, relaxation)
        result[f"{name}_kept"] = kept
        result[f"{name}_accuracy"] = float(np.mean(np.argmax(logits, -1) == examples.labels))
    return result
