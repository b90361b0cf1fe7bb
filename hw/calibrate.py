"""Fits the named factors of a machine model to measurements, with the error on groups that the fit has not seen.

A model is `predict(factors, data) -> [N]`, positive and differentiable in its factors (`dict[str, scalar]`), which
are positive and fitted as logarithms with Adam from several starts. All starts of all folds are one program.

References:
  Renda et al., "DiffTune", arXiv 2010.04017: parameters of a simulator fitted to measurements by gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from codesign.errors import CodesignError, NonFiniteError, UnknownNameError

Floats = NDArray[np.float64]
Predict = Callable[[dict[str, jax.Array], Any], jax.Array]
Loss = Literal["log_ratio", "relative"]

RATE_FLOOR = 0.01
"""Fraction of the learning rate that is left at the end of its cosine."""


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A positive number of a model that is fitted: its unit, where the fit starts, and what it means."""

    name: str
    unit: str
    start: float
    meaning: str


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a fit descends.

    Attributes:
      num_starts: Starts, >= 1: the given one, and others around it.
      spread: Standard deviation of the other starts' logarithms, > 0.
      num_steps: Steps of Adam, >= 1.
      learning_rate: Its first rate, in units of a logarithm; it falls as a cosine.
      loss: `log_ratio`, mean |log(predicted / measured)|, or `relative`, mean |predicted / measured - 1|, which
        forgives predictions that are too low.
      seed: Of the other starts.
    """

    num_starts: int = 4
    spread: float = 0.5
    num_steps: int = 300
    learning_rate: float = 0.05
    loss: Loss = "log_ratio"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Errors of predictions: fractions of the measured values, and Spearman's rank correlation."""

    rows: int
    mean: float
    median: float
    largest: float
    spearman: float


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """Predictions of every row by fits that saw no row of its group.

    Attributes:
      predicted: By assignment of groups to folds (A) and row, `[A, N]`, unit of the measurements.
      factors: Fitted factors by name, `[A, folds]`.
      whole: Factors fitted to all rows.
      fitted: Predictions of all rows by these, `[N]`.
    """

    predicted: Floats
    factors: dict[str, Floats]
    whole: dict[str, float]
    fitted: Floats


def fit_factors(
    predict: Predict,
    factors: Sequence[Factor],
    data: Any,
    measured: Floats,
    *,
    weights: Floats | None = None,
    settings: FitSettings | None = None,
) -> tuple[dict[str, Floats], Floats, Floats]:
    """Returns fitted factors, all predictions, and the loss of each of several fits on the same rows.

    Args:
      predict: The model.
      factors: What is fitted.
      data: Any pytree of arrays that `predict` takes.
      measured: Measurements, `[N]`, > 0.
      weights: Weight of each row in each fit, `[F, N]`, >= 0; None: one fit, all rows alike.
      settings: How to descend; None: the defaults.

    Returns:
      Factors by name, each `[F]`; predictions `[F, N]`; losses `[F]`.

    Raises:
      CodesignError: If a measurement, a weight, a start or a setting is out of range.
      NonFiniteError: If no start of a fit has a finite loss.
    """
    settings = settings or FitSettings()
    weights = np.ones((1, len(measured))) if weights is None else weights
    _check(factors, measured, weights, settings)
    rng = np.random.default_rng(settings.seed)
    first = np.log([factor.start for factor in factors])
    drawn = rng.normal(size=(settings.num_starts, len(factors))) * settings.spread
    drawn[0] = 0.0
    names = [factor.name for factor in factors]
    best, predicted, losses = jax.device_get(
        _descend(predict, names, data, measured, weights, first + drawn, settings)
    )
    if not np.all(np.isfinite(losses)):
        fold = int(np.argmin(np.isfinite(losses)))
        raise NonFiniteError(
            f"fit {fold + 1} of {len(losses)}: no start has a finite loss: "
            "check that the model is positive at the starts of its factors"
        )
    values = np.exp(np.asarray(best, np.float64))
    return dict(zip(names, values.T, strict=True)), np.asarray(predicted, np.float64), losses


def _check(
    factors: Sequence[Factor], measured: Floats, weights: Floats, settings: FitSettings
) -> None:
    if measured.ndim != 1 or not np.all(np.isfinite(measured)) or np.any(measured <= 0.0):
        raise CodesignError(
            "`measured` must be positive finite numbers, one per row: leave others out"
        )
    if weights.shape[1:] != measured.shape or np.any(weights < 0.0) or np.any(weights.sum(1) <= 0):
        raise CodesignError(
            f"`weights` must be [fits, {len(measured)}], not negative, with a positive one in each "
            f"fit, got {weights.shape}: a fold needs rows to fit to"
        )
    for factor in factors:
        if not factor.start > 0.0:
            raise CodesignError(f"factor `{factor.name}` starts at {factor.start}: start above 0")
    if min(settings.num_starts, settings.num_steps) < 1 or settings.learning_rate <= 0.0:
        raise CodesignError("`num_starts` and `num_steps` must be >= 1, `learning_rate` > 0")
    if settings.loss not in ("log_ratio", "relative"):
        raise UnknownNameError(f"unknown loss `{settings.loss}`: use log_ratio or relative")


def _descend(
    predict: Predict,
    names: Sequence[str],
    data: Any,
    measured: Floats,
    weights: Floats,
    starts: Floats,
    settings: FitSettings,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the best logarithms `[F, K]`, predictions `[F, N]` and losses `[F]`; one compiled program."""
    schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.num_steps, RATE_FLOOR)
    optimizer = optax.adam(schedule)

    def model(logs: jax.Array, data: Any) -> jax.Array:
        return predict(dict(zip(names, jnp.exp(logs), strict=True)), data)

    @jax.jit
    def descend(
        starts: jax.Array, weights: jax.Array, data: Any, measured: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        def loss(logs: jax.Array, weight: jax.Array) -> jax.Array:
            ratio = model(logs, data) / measured
            error = jnp.log(ratio) if settings.loss == "log_ratio" else ratio - 1.0
            return jnp.sum(weight * jnp.abs(error)) / jnp.sum(weight)

        def one(start: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
            def step(carry: Any, _: None) -> tuple[Any, None]:
                logs, state, best, lowest = carry
                value, gradient = jax.value_and_grad(loss)(logs, weight)
                best = jnp.where(value < lowest, logs, best)
                updates, state = optimizer.update(gradient, state, logs)
                logs = optax.apply_updates(logs, updates)
                return (logs, state, best, jnp.fmin(value, lowest)), None

            carry = (start, optimizer.init(start), start, jnp.asarray(jnp.inf, start.dtype))
            (_, _, best, lowest), _ = jax.lax.scan(step, carry, length=settings.num_steps)
            return best, lowest

        def fold(weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            logs, losses = jax.vmap(one, (0, None))(starts, weight)
            chosen = jnp.argmin(losses)
            return logs[chosen], model(logs[chosen], data), losses[chosen]

        return jax.vmap(fold)(weights)

    as_floats = (jnp.asarray(value, jnp.float32) for value in (starts, weights))
    found: tuple[jax.Array, jax.Array, jax.Array] = descend(
        *as_floats, data, jnp.asarray(measured, jnp.float32)
    )
    return found


def group_folds(groups: Sequence[str], num_folds: int, seed: int) -> NDArray[np.int64]:
    """Returns the fold of each row, `[N]`: whole groups, shuffled, dealt to folds one by one.

    Raises:
      CodesignError: If there are fewer groups than folds, or fewer than two folds.
    """
    names, inverse = np.unique(np.asarray(groups), return_inverse=True)
    if not 2 <= num_folds <= len(names):
        raise CodesignError(
            f"`num_folds` must lie in [2, {len(names)}], the number of groups, got {num_folds}"
        )
    of_group = np.empty(len(names), np.int64)
    of_group[np.random.default_rng(seed).permutation(len(names))] = (
        np.arange(len(names)) % num_folds
    )
    return of_group[inverse]


def cross_validate(
    predict: Predict,
    factors: Sequence[Factor],
    data: Any,
    measured: Floats,
    groups: Sequence[str],
    *,
    num_folds: int = 10,
    assignments: Sequence[int] = (0,),
    settings: FitSettings | None = None,
) -> CrossValidation:
    """Returns predictions of every row by factors fitted to other groups only.

    Args:
      predict: The model.
      factors: What is fitted in each fold.
      data: What `predict` takes.
      measured: Measurements, `[N]`, > 0.
      groups: Group of each row; a group is held out as a whole.
      num_folds: Folds.
      assignments: Seeds that deal groups to folds, one whole cross-validation each.
      settings: How to descend.
    """
    folds = np.stack([group_folds(groups, num_folds, seed) for seed in assignments])
    seen = np.arange(num_folds)[None, :, None] != folds[:, None, :]
    weights = np.concatenate([np.ones((1, len(measured))), seen.reshape(-1, len(measured))])
    values, predicted, _ = fit_factors(
        predict, factors, data, measured, weights=weights, settings=settings
    )
    by_fold = predicted[1:].reshape(*seen.shape)
    held_out = np.take_along_axis(by_fold, folds[:, None, :], axis=1)[:, 0]
    return CrossValidation(
        predicted=held_out,
        factors={name: value[1:].reshape(seen.shape[:2]) for name, value in values.items()},
        whole={name: float(value[0]) for name, value in values.items()},
        fitted=predicted[0],
    )


def errors(predicted: Floats, measured: Floats) -> Errors:
    """Returns the errors of predictions `[N]`."""
    relative = np.abs(predicted / measured - 1.0)
    return Errors(
        rows=len(measured),
        mean=float(relative.mean()),
        median=float(np.median(relative)),
        largest=float(relative.max()),
        spearman=spearman(predicted, measured),
    )


def spearman(a: Floats, b: Floats) -> float:
    """Returns Spearman's rank correlation of two columns, equal values taking their mean rank."""

    def ranks(values: Floats) -> Floats:
        _, inverse, number = np.unique(values, return_inverse=True, return_counts=True)
        mean: Floats = np.cumsum(number) - (number - 1) / 2.0
        return mean[inverse]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def nested_cross_validate(
    models: Mapping[str, Predict],
    factors: Sequence[Factor],
    data: Any,
    measured: Floats,
    groups: Sequence[str],
    *,
    num_folds: int = 10,
    num_inner: int = 5,
    assignment: int = 0,
    settings: FitSettings | None = None,
) -> tuple[Floats, tuple[str, ...]]:
    """Returns predictions of every row by the model that was best on the other folds alone, and its name by fold.

    In each fold the models are compared by the mean relative error of a cross-validation within the rows of the other
    folds; the best one, fitted to all of these, predicts the fold.

    Args:
      models: Models by name.
      factors: Factors that all of them take.
      data: What they take.
      measured: Measurements, `[N]`, > 0.
      groups: Group of each row.
      num_folds: Folds.
      num_inner: Folds within the rows of the other folds.
      assignment: Seed that deals groups to folds.
      settings: How to descend.
    """
    outer = group_folds(groups, num_folds, assignment)
    # Another seed: inner folds cut across the outer ones.
    inner = group_folds(groups, num_inner, assignment + 1)
    others = np.arange(num_folds)[:, None] != outer[None]
    seen = np.concatenate(
        [np.ones((1, len(inner)), bool), np.arange(num_inner)[:, None] != inner[None]]
    )
    weights = (others[:, None] & seen[None]).reshape(-1, len(measured)) * 1.0
    mean_errors, held_out = [], []
    for predict in models.values():
        _, predicted, _ = fit_factors(
            predict, factors, data, measured, weights=weights, settings=settings
        )
        by_fold = predicted.reshape(num_folds, num_inner + 1, len(measured))
        own = np.take_along_axis(by_fold, 1 + inner[None, None], axis=1)[:, 0]
        relative = np.abs(own / measured - 1.0)
        mean_errors.append(np.sum(relative * others, axis=1) / np.sum(others, axis=1))
        held_out.append(by_fold[:, 0])
    best = np.argmin(mean_errors, axis=0)
    rows = np.arange(len(measured))
    chosen: Floats = np.stack(held_out)[best[outer], outer, rows]
    names = list(models)
    return chosen, tuple(names[index] for index in best)
