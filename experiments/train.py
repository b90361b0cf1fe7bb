"""Training of a policy (and the weights) under a budget, from a problem to a deployable point."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from codesign.calibration import Calibration
from codesign.experiments.batches import Inputs
from codesign.experiments.configs import Budget, BudgetMetric, Metric, Scope, with_edp
from codesign.experiments.dense_cost import DenseCost
from codesign.experiments.evaluate import Point, metrics_of
from codesign.experiments.moves import narrowed, raised, with_spare
from codesign.experiments.problem import Problem, mean_loss, no_cost, task_loss
from codesign.experiments.reach import check_reachable
from codesign.experiments.run import RunDirectory, train_loop, write_json
from codesign.experiments.sizing import SizeTraining
from codesign.experiments.start import CalibrationRun, calibration_run, measured_ranges, with_policy
from codesign.gates import Relaxation
from codesign.hw.accelerator import Accelerator
from codesign.hw.sizing import Caps, with_sizes
from codesign.hw.surrogate import cost
from codesign.models.model import apply
from codesign.optimize import (
    Group,
    LossAux,
    OptimizeSettings,
    TrainState,
    init_state,
    make_train_step,
    relaxation_at,
)
from codesign.policy import Policy, deployed_bits

COSTS: tuple[Metric, ...] = ("energy", "latency")
"""What a batch says of the dense model, in this order."""
SIZES_FILE = "sizes.json"
"""Of a run that trains sizes: those of the file, relaxed and built."""
BUDGET_BISECTIONS = 7
"""Halvings of the interval [0, 1] of a move that is to meet a budget: 1/128."""
ACTIVATION_SHARES = (1.0, 0.75, 0.5, 0.25)
"""How far the activations of linear layers may follow when their weights are narrowed to meet a budget (ours)."""
SPARE_BITS = 0.44
"""How far above the whole width that is deployed a narrowed width starts, bit, < 0.5 (ours). A step or two deploy one more,
and the price takes back what is worth least; from the middle, few steps reach either side."""
THRESHOLD_MOVES = (-0.5, 0.25, 0.5, 0.75)
"""How far thresholds may be moved first (ours): those of pairs raised, so that widths need be narrowed less, or all
lowered, where what they drop costs more than narrower widths do."""
MOVE_GAIN = 0.9
"""Part of the divergence without a move that a start with moved thresholds may have at most (ours). Where both are near
chance, differences say nothing, and of keys that nobody looks at any more a threshold learns little."""
MIN_KEYS = 4.0
"""Keys per row, mean, that such a start must leave (ours): a row of one key has no gradient, and what two keys carry is
soon lost. Digits at 0.35 and 0.3, seed 0: divergence 0.19, 1.37 from starts with two keys, 0.08 and 0.25 by this rule."""
BUDGET_TOLERANCE = 0.005
"""Part of the budget by which the deployed cost may exceed it before thresholds are raised (ours)."""


class BudgetedTraining:
    """The compiled step of one choice of trained groups and budgeted metrics, used for any number of budgets.

    Budgets, ranges and the machine's sizes are traced, so one compilation serves a whole curve.

    Args:
      problem: Data, dense model, mechanism and machine.
      settings: Settings of the step.
      metrics: What budgets bound; none: nothing.
      scope: What counts.
      caps: What the machine's sizes keep, where they are trained.

    Raises:
      InfeasibleCapError: If no legal machine keeps the caps.
    """

    def __init__(
        self,
        problem: Problem,
        settings: OptimizeSettings,
        metrics: tuple[BudgetMetric, ...],
        scope: Scope,
        caps: Caps = Caps(),  # noqa: B008 (frozen)
    ):
        self.problem = problem
        self.settings = settings
        self.metrics = metrics
        self.scope: Scope = scope
        self.sizing = None
        if "sizes" in settings.train:
            self.sizing = SizeTraining(problem.spec, caps, self._price)
        self.step = make_train_step(
            self._loss,
            self._ratios,
            settings,
            None if self.sizing is None else self.sizing.legal,
        )
        self._executed = jax.jit(lambda *arguments: self._loss(*arguments)[1].workload)
        self.dense_cost = DenseCost(
            problem.config.structure, problem.accelerator, problem.machine_mechanism
        )
        self._batches = problem.batches(problem.experiment.batch_size, problem.experiment.seed + 1)

    @functools.cached_property
    def dense(self) -> dict[BudgetMetric, float]:
        """PJ, cycles and their product per calibration example of the dense model on the same machine."""
        problem = self.problem
        return self.dense_cost.mean(problem.calibration_examples, problem.buckets, self.scope)

    def _loss(
        self,
        params: dict[str, Any],
        policy: Policy,
        batch: dict[str, jax.Array],
        constants: dict[str, Any],
        relaxation: Relaxation,
    ) -> tuple[jax.Array, LossAux]:
        problem = self.problem
        output = apply(
            params,
            policy,
            constants["calibration"],
            batch,
            config=problem.config,
            mechanism=problem.mechanism,
            relaxation=relaxation,
        )
        entropy, accuracy = task_loss(output.logits, batch, 0.0)
        divergences = optax.losses.kl_divergence(
            jax.nn.log_softmax(output.logits), jax.nn.softmax(batch["teacher"])
        )
        kl = mean_loss(divergences, batch)
        share = problem.experiment.distillation
        terms = {"cross_entropy": entropy, "accuracy": accuracy, "kl_nats": kl}
        if problem.mechanism.thresholds is not None:
            scale = problem.mechanism.thresholds
            terms["kept"] = jnp.mean(scale.of_pairs(scale.kept(output.workload)))
        costs = {"workload": output.workload, "dense": batch["dense"]}
        return share * kl + (1.0 - share) * entropy, LossAux(terms=terms, workload=costs)

    def _ratios(self, costs: Any, constants: dict[str, Any], smoothness: jax.Array) -> jax.Array:
        if not self.metrics:
            return no_cost(costs, constants, smoothness)
        machine = with_sizes(constants["accelerator"], constants.get("sizes", {}))
        return self._price(costs, machine, constants, smoothness)[0]

    def _price(
        self, costs: Any, machine: Accelerator, constants: dict[str, Any], smoothness: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `codesign.experiments.sizing.PriceFn`."""
        price = cost(costs["workload"], machine, smoothness=smoothness)
        dense = dict(zip(COSTS, jnp.mean(costs["dense"], axis=0), strict=True))
        values = metrics_of(price, self.scope)
        reached = with_edp({name: jnp.mean(values[name]) / dense[name] for name in COSTS})
        ratios = jnp.stack([reached[name] for name in self.metrics]) / constants["limits"]
        return ratios, jnp.mean(values["energy"]), jnp.mean(values["latency"])

    def batch(self, step: int) -> dict[str, NDArray[Any]]:
        """Returns the batch of a step, a pure function of it; `dense` `[B, 2]` are the dense `COSTS`."""
        batch = self._batches.batch(step)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        teacher = self.problem.teacher.batch_logits(self._batches.key(step), inputs)
        return batch | {"teacher": teacher, "dense": self._dense_of(inputs)}

    def _dense_of(self, inputs: Inputs) -> NDArray[np.float32]:
        dense = self.dense_cost.of(inputs)[self.scope]
        return np.stack([dense[name] for name in COSTS], axis=-1).astype(np.float32)

    def hardened(self, state: TrainState, constants: dict[str, Any]) -> TrainState:
        """Returns the state with whole widths that meet the budget on all calibration examples.

        A step's own batch would do where all examples are alike; texts of one bucket of lengths are not.
        """
        return self.step.harden(state, self._calibration_batches(), constants)

    def _calibration_batches(self) -> list[tuple[dict[str, Any], NDArray[np.float64]]]:
        """Returns the calibration examples as batches of the loss, each with its weight in the mean of the ratios."""
        examples = self.problem.calibration_examples
        size = min(self.problem.experiment.batch_size, len(examples))
        batches = []
        for start in range(0, len(examples), size):
            indices = np.arange(start, min(start + size, len(examples)))
            chosen = examples.take(indices)
            teacher = self.problem.teacher.part_logits("train", indices, chosen.inputs)
            dense = self._dense_of(chosen.inputs)
            batch = {"labels": chosen.labels, "teacher": teacher, "dense": dense}
            batches.append((chosen.inputs | batch, self._weights(dense)))
        return batches

    def _executed_batches(
        self, state: TrainState, constants: dict[str, Any]
    ) -> list[tuple[Any, NDArray[np.float64]]]:
        """Returns what a state's model executes on the calibration examples, each batch with its weight."""
        relaxation = relaxation_at(state.step, self.settings)
        return [
            (self._executed(state.params, state.policy, batch, constants, relaxation), weight)
            for batch, weight in self._calibration_batches()
        ]

    def _with_fitted_sizes(self, point: Point, budget: Budget) -> Point:
        """Returns the point with sizes that suit what it executes, by a descent without the model."""
        if self.sizing is None:
            return point
        point = dataclasses.replace(point, sizes=point.sizes or self.sizing.start)
        tree = self.initial(point, budget)
        state, constants = tree["state"], tree["constants"]
        batches = self._executed_batches(state, constants)
        smoothness = jnp.asarray(self.settings.smoothness_end)
        sizes = self.sizing.descended(point.sizes, batches, constants, smoothness)
        return dataclasses.replace(point, sizes=sizes)

    def with_suitable_sizes(self, point: Point, budget: Budget) -> Point:
        """Returns the point on sizes that can be built and suit what it executes; the model stays as it is."""
        assert self.sizing is not None
        point = self._with_fitted_sizes(point, budget)
        tree = self.initial(point, budget)
        batches = self._executed_batches(tree["state"], tree["constants"])
        values = self.sizing.built(point.sizes, batches, tree["constants"])
        sizes = {name: jnp.asarray(value, float) for name, value in values.items()}
        return dataclasses.replace(point, sizes=sizes)

    def _with_built_sizes(
        self, state: TrainState, constants: dict[str, Any], run: RunDirectory
    ) -> TrainState:
        """Returns the state with sizes that can be built; writes them beside the relaxed ones, and what the step costs."""
        if self.sizing is None:
            return state
        batches = self._executed_batches(state, constants)
        values = self.sizing.built(state.sizes, batches, constants)
        sizes = {name: jnp.asarray(value, float) for name, value in values.items()}
        scores = [self.sizing.score(one, batches, constants) for one in (state.sizes, sizes)]
        record = {
            "caps": dataclasses.asdict(self.sizing.caps),
            "file": {name: float(value) for name, value in self.sizing.start.items()},
            "relaxed": {name: float(value) for name, value in state.sizes.items()},
            "built": values,
            "gap": math.expm1(scores[1] - scores[0]),
        }
        write_json(run.path / SIZES_FILE, record)
        return state.replace(sizes=sizes)  # type: ignore[attr-defined,no-any-return]

    def _weights(self, dense: NDArray[np.float32]) -> NDArray[np.float64]:
        """Returns the weight of a batch in the mean of each ratio, `[C]`: its dense cost; of a product the root of both."""
        totals = dense.sum(axis=0, dtype=np.float64)
        energy, latency = float(totals[0]), float(totals[1])
        weights = {"energy": energy, "latency": latency, "edp": math.sqrt(energy * latency)}
        return np.asarray([weights[name] for name in self.metrics] or [1.0])

    def limits(self, budget: Budget) -> dict[BudgetMetric, float]:
        """Returns the bounds of a budget in pJ, cycles and pJ cycles per calibration example."""
        bounds = budget.limits
        return {metric: bounds[metric] * self.dense[metric] for metric in self.metrics}

    def constants(self, calibration: Calibration, budget: Budget) -> dict[str, Any]:
        """Returns what the step reads beside its state and batch."""
        bounds = budget.limits
        return {
            "calibration": calibration,
            "accelerator": self.problem.accelerator,
            "limits": jnp.asarray([bounds[name] for name in self.metrics] or [1.0], jnp.float32),
        }

    def initial(self, point: Point, budget: Budget) -> dict[str, Any]:
        """Returns the tree of a checkpoint before the first step."""
        policy = point.policy if "bits" in self.settings.train else deployed_bits(point.policy)
        state = init_state(
            point.params, policy, self.settings, max(1, len(self.metrics)), point.sizes
        )
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
        training redistributes instead of descending; sizes descend to suit what is executed, before and after. Stage 1
        anneals everything that is trained. At the hardened step the ranges are measured again, on the weights as they are
        then; sizes become values that can be built, widths whole bits that meet the budget on the calibration examples, and
        both stay. Stage 2 goes on with thresholds and weights on the deployed decisions, the budget still held. At last,
        should the deployed cost on the calibration examples exceed the budget, all thresholds are raised together until it
        does not.

        Args:
          point: Where to start.
          budget: The bounds.
          run: Where checkpoints and metrics go.
          checkpoint_every: Steps between checkpoints.
          progress: Whether to show a progress bar.

        Raises:
          InfeasibleBudgetError: If no legal policy reaches the budget.
        """
        if self.sizing is None:
            check_reachable(self.problem, budget)
        settings = self.settings
        if run.checkpoint_step() is None:
            point = self.fitted(self._with_fitted_sizes(point, budget), budget)
            point = self._with_fitted_sizes(point, budget)
        elif self.sizing is not None:
            point = dataclasses.replace(point, sizes=self.sizing.start)
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
        if done == settings.hardened_step:
            if "params" in settings.train:
                tree["constants"]["calibration"] = measured_ranges(
                    self.problem, tree["state"].params
                )
            state = self._with_built_sizes(tree["state"], tree["constants"], run)
            tree["state"] = self.hardened(state, tree["constants"])
        if done < settings.num_steps:
            tree = until(settings.num_steps, done, tree)
        final = self.repaired(finished_point(tree), budget)
        state = tree["state"].replace(policy=final.policy)
        run.save(settings.num_steps + 1, {"state": state, "constants": tree["constants"]})
        return final

    def fitted(self, point: Point, budget: Budget) -> Point:
        """Returns the point moved, all layers and heads alike, to where its deployed cost meets the budget.

        Widths move towards their lower limits in proportion to their distance from them, thresholds alike upwards: the
        widths first under a budget on energy, the thresholds first under one on latency alone, which widths hardly change.
        How far activations follow the weights, and whether thresholds rise or fall before widths are narrowed, is what
        diverges least from the dense model on the calibration examples.
        """
        moves: dict[Group, Callable[[Point, Budget], Point]] = {
            "bits": self._narrowed,
            "thresholds": lambda point, budget: self._moved(point, budget, self._raised),
        }
        order: tuple[Group, ...] = ("bits", "thresholds")
        for name in order[::-1] if self.metrics == ("latency",) else order:
            if name not in self.settings.train or self.excess(point, budget) <= 1.0:
                continue
            point = moves[name](point, budget)
        return point

    def _narrowed(self, point: Point, budget: Budget) -> Point:
        def tried(start: Point, share: float) -> tuple[float, float, float, Point, float]:
            """Excess, divergence, share, point and keys per row of a start whose widths were narrowed."""

            def move(moved: Point, by: float) -> Policy:
                return narrowed(moved.policy, by, activation_share=share)

            candidate = self._moved(start, budget, move)
            run = calibration_run(self.problem, candidate)
            excess = max(self._excess(run, budget), 1.0)
            return excess, run.kl_nats, share, candidate, self._keys_per_row(run)

        best = min((tried(point, share) for share in ACTIVATION_SHARES), key=lambda one: one[:2])
        if "thresholds" in self.settings.train and self.problem.mechanism.thresholds is not None:
            # Under a budget on latency alone thresholds have just been raised to meet it.
            moves = [by for by in THRESHOLD_MOVES if by > 0.0 or self.metrics != ("latency",)]
            starts = (with_policy(point, self._shifted(point, by)) for by in moves)
            others = [
                one for one in (tried(start, best[2]) for start in starts) if one[4] >= MIN_KEYS
            ]
            other = min(others, key=lambda one: one[:2], default=best)
            if other[0] < best[0] or (other[0] == best[0] and other[1] < MOVE_GAIN * best[1]):
                best = other
        return with_policy(best[3], with_spare(best[3].policy, SPARE_BITS))

    def _keys_per_row(self, run: CalibrationRun) -> float:
        """Returns the mean number of keys that rows keep; infinite where no filter drops any."""
        scale = self.problem.mechanism.thresholds
        if scale is None or scale.pairs_entry is None:
            return math.inf
        structure = self.problem.config.structure
        valid = self.problem.calibration_examples.inputs.get("valid")
        keys = structure.max_tokens if valid is None else float(np.mean(np.sum(valid, axis=1)))
        return float(np.mean(scale.of_pairs(run.kept))) * (
            keys / 2.0 if structure.is_causal else keys
        )

    def _raised(self, point: Point, move: float) -> Policy:
        return raised(point, move, self.problem.mechanism.thresholds)

    def _shifted(self, point: Point, move: float) -> Policy:
        return raised(point, move, self.problem.mechanism.thresholds, only_pairs=move > 0.0)

    def _moved(self, point: Point, budget: Budget, move: Callable[[Point, float], Policy]) -> Point:
        """Returns the point with the least move in [0, 1] that meets the budget; the whole move if none does."""
        low, high = 0.0, 1.0
        for _ in range(BUDGET_BISECTIONS):
            middle = (low + high) / 2.0
            candidate = with_policy(point, move(point, middle))
            low, high = (middle, high) if self.excess(candidate, budget) > 1.0 else (low, middle)
        return with_policy(point, move(point, high))

    def excess(self, point: Point, budget: Budget) -> float:
        """Returns the largest ratio of deployed cost, on the calibration examples, to its bound; 0 without a bound."""
        return self._excess(calibration_run(self.problem, point), budget)

    def _excess(self, run: CalibrationRun, budget: Budget) -> float:
        costs = with_edp(run.costs[self.scope])
        return max((costs[name] / x for name, x in self.limits(budget).items()), default=0.0)

    def repaired(self, point: Point, budget: Budget) -> Point:
        """Returns the point with whole bits and, if the deployed cost breaks the budget, higher thresholds."""
        point = with_policy(point, deployed_bits(point.policy))
        if "thresholds" not in self.settings.train:
            return point
        if self.excess(point, budget) <= 1.0 + BUDGET_TOLERANCE:
            return point
        mended = self._moved(point, budget, self._raised)
        # Thresholds that cannot mend it stay as trained; the measured cost is reported as it is.
        return mended if self.excess(mended, budget) <= 1.0 else point


def finished_point(tree: dict[str, Any]) -> Point:
    """Returns the point that a checkpoint holds."""
    state: TrainState = tree["state"]
    return Point(
        params=state.params,
        policy=state.policy,
        calibration=tree["constants"]["calibration"],
        sizes=state.sizes,
    )
