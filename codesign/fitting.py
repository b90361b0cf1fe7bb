"""The training loop for a model of one's own: weights and policy at once, or the weights alone."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codesign.applied import AppliedPolicy
from codesign.errors import CodesignError
from codesign.gates import Relaxation
from codesign.objective import BUDGET_MISS
from codesign.optimize import (
    LossAux,
    OptimizeSettings,
    PyTree,
    init_state,
    make_train_step,
    relaxation_at,
)
from codesign.policy import Policy
from codesign.watch import ThresholdWatch, check_finite
from codesign.workload import Workload


def fit(
    loss_fn: Callable[[PyTree, AppliedPolicy, PyTree], tuple[jax.Array, Workload]],
    params: PyTree,
    applied: AppliedPolicy,
    batches: Sequence[PyTree] | jax.Array,
    cost_fn: Callable[[Workload, jax.Array], jax.Array] | None = None,
    limits: jax.Array | Sequence[float] | float = (),
    **settings: Any,
) -> tuple[PyTree, AppliedPolicy]:
    """Returns trained weights, and the policy as it is deployed: widths in whole bits, decisions hard.

    One step per batch, compiled once (`codesign.make_train_step`). If the last step's cost exceeds its limit by more than
    1 %, a `UserWarning` says by how much. Without a policy in `applied` the weights alone train,
    in floating point.

    Args:
      loss_fn: `(params, applied, batch) -> (loss, workload)`; padded batches put their own `valid` into `applied`.
      params: Any pytree of arrays.
      applied: Policy, calibration and mechanism to start from; its relaxation is that of each step.
      batches: The batch of every step, all of one shape.
      cost_fn: `(workload, smoothness) -> cost`, scalar or `[C]`, any unit, differentiable; None: nothing is budgeted.
      limits: Budgets in the unit of `cost_fn`, scalar or `[C]`, > 0.
      **settings: Fields of `codesign.OptimizeSettings`; `num_steps` is the number of batches.

    Raises:
      CodesignError: If a setting is unknown or out of range, a cost has no limit or is not one number per limit, a
        threshold has no gradient, or a loss is not finite.
    """
    bounds = jnp.atleast_1d(jnp.asarray(limits, jnp.float32))
    if (cost_fn is None) != (len(bounds) == 0):
        raise CodesignError("`cost_fn` and `limits` go together: give both or neither")
    if not bool(jnp.all(bounds > 0.0)):
        raise CodesignError(f"`limits` must be > 0, in the unit of `cost_fn`, got {limits}")
    known = {field.name for field in dataclasses.fields(OptimizeSettings)} - {"num_steps"}
    if unknown := sorted(settings.keys() - known):
        raise CodesignError(
            f"`{unknown[0]}` is no setting of `fit`: it takes {', '.join(sorted(known))}; steps are as many as batches"
        )
    policy, is_float = applied.policy or Policy(layers={}, ends={}), applied.policy is None
    if is_float:
        settings = {"train": ("params",), "hardened_fraction": 0.0} | settings
    resolved = OptimizeSettings(num_steps=len(batches), **settings)

    def at(tried: Policy, relaxation: Relaxation, base: AppliedPolicy) -> AppliedPolicy:
        if is_float:
            return base
        changed: AppliedPolicy = base.replace(policy=tried, relaxation=relaxation)  # type: ignore[attr-defined]
        return changed

    def task_fn(
        tried: PyTree, policy: Policy, batch: PyTree, constants: Any, relaxation: Relaxation
    ) -> tuple[jax.Array, LossAux]:
        loss, workload = loss_fn(tried, at(policy, relaxation, constants["applied"]), batch)
        return loss, LossAux(terms={}, workload=workload)

    def ratios_fn(workload: Workload, constants: Any, smoothness: jax.Array) -> jax.Array:
        if cost_fn is None:
            return jnp.zeros((0,))
        costs = jnp.atleast_1d(cost_fn(workload, smoothness))
        if costs.shape != bounds.shape:
            raise CodesignError(
                f"`cost_fn` must give one cost per limit, {list(bounds.shape)}, got {list(costs.shape)}: take the mean "
                "over the batch"
            )
        ratios: jax.Array = costs / constants["limits"]
        return ratios

    step_fn = make_train_step(task_fn, ratios_fn, resolved)
    state = init_state(params, policy, resolved, 0 if cost_fn is None else len(bounds))
    base = applied.replace(policy=None, relaxation=None)  # type: ignore[attr-defined]
    constants = {"applied": base, "limits": bounds}
    watch = ThresholdWatch()
    for step, batch in enumerate(batches):
        state, metrics = step_fn(state, batch, constants)
        check_finite(metrics, step)
        watch.observe(metrics, step)
    for index, ratio in enumerate(np.asarray(metrics["ratio"])):
        if ratio > 1.0 + BUDGET_MISS:
            warnings.warn(
                f"the cost of the last step is {ratio:.3f} of limits[{index}]: give more batches or a larger limit",
                stacklevel=2,
            )
    return state.params, at(state.policy, relaxation_at(state.step, resolved), base)
