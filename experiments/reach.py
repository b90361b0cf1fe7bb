"""Whether a budget can be reached at all, before anything is trained."""

import math

import numpy as np

from codesign.errors import InfeasibleBudgetError
from codesign.experiments.configs import Budget, BudgetMetric, Metric, Scope, with_edp
from codesign.experiments.dense_cost import DenseCost, least_cost
from codesign.experiments.evaluate import metrics_of
from codesign.experiments.model_choice import model_shape
from codesign.experiments.problem import Problem
from codesign.hw.closed_form import Setting
from codesign.hw.operating_points import (
    cheapest_setting,
    closed_form_workload,
    published_setting,
)
from codesign.hw.surrogate import cost


def cheapest_ratio(problem: Problem, scope: Scope) -> dict[BudgetMetric, float]:
    """Returns a lower bound of every legal policy's cost over the dense cost, on lengths as in the calibration examples."""
    structure, examples = problem.config.structure, problem.calibration_examples
    dense, least = (
        price.mean(examples, problem.buckets, scope)
        for price in (
            DenseCost(structure, problem.accelerator, problem.machine_mechanism),
            least_cost(structure, problem.accelerator, problem.machine_mechanism),
        )
    )
    measured: tuple[Metric, ...] = ("energy", "latency")
    ratios: dict[Metric, float] = {metric: least[metric] / dense[metric] for metric in measured}
    scale = problem.mechanism.thresholds
    if scale is None:
        return with_edp(ratios)
    # Pairs and tokens can go: in closed form, at the mean length.
    tokens = structure.max_tokens
    if "valid" in examples.inputs:
        tokens = max(2, round(float(np.mean(np.sum(examples.inputs["valid"], axis=1)))))
    shape = model_shape(structure, tokens)
    published = len(published_setting(problem.spec).kept)
    rounds = published if scale.pairs_entry is None else len(scale.names)
    prices = [
        cost(closed_form_workload(problem.spec, shape, setting), problem.accelerator)
        for setting in (
            cheapest_setting(
                shape, num_rounds=rounds, skips_zeros=problem.mechanism.soft.skips_zeros
            ),
            Setting(),
        )
    ]
    lowest, whole = (
        {name: float(value[0]) for name, value in metrics_of(price, scope).items()}
        for price in prices
    )
    return with_edp(
        {metric: min(ratios[metric], lowest[metric] / whole[metric]) for metric in measured}
    )


def check_reachable(problem: Problem, budget: Budget) -> None:
    """Raises `InfeasibleBudgetError` if the cheapest legal policy costs more than the budget."""
    cheapest = cheapest_ratio(problem, budget.scope)
    for metric, fraction in budget.limits.items():
        least = cheapest[metric]
        if fraction < least:
            raise InfeasibleBudgetError(
                f"`budget.{metric}` {fraction:g} cannot be reached on preset `{problem.spec.name}`: the cheapest legal "
                f"policy costs {least:.3f} of dense ({budget.scope}): give at least {math.ceil(least * 1000) / 1000:g}"
            )
