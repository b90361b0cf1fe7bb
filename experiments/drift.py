"""How far the relaxed and straight-through paths are from the deployed one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codesign.calibration import Calibration
from codesign.experiments.batches import Inputs, chunks
from codesign.experiments.data import Examples
from codesign.experiments.evaluate import Measurement, Point, quality
from codesign.experiments.problem import Problem
from codesign.experiments.teacher import float_chunk
from codesign.gates import Relaxation
from codesign.mechanisms import Mechanism
from codesign.models.config import ModelConfig
from codesign.models.model import apply
from codesign.policy import Policy


def soft_measure(
    problem: Problem, point: Point, examples: Examples, relaxation: Relaxation
) -> tuple[float, float]:
    """Returns mean quality and mean kept fraction of the float path, to set beside the hard path's."""
    qualities, kept = [], []
    for inputs, indices in chunks(examples, float_chunk(problem.config), problem.buckets):
        logits, fractions = _soft_step(
            point.params,
            point.policy,
            point.calibration,
            inputs,
            relaxation,
            config=problem.config,
            mechanism=problem.mechanism,
        )
        first = slice(len(indices))
        labels, valid = examples.labels[indices], inputs.get("valid")
        if labels.ndim == 2:
            labels = labels[:, : logits.shape[1]]
        own = None if valid is None else valid[first]
        qualities.append(quality(np.asarray(logits, np.float64)[first], labels, own))
        kept.append((float(fractions), len(indices)))
    values, weights = zip(*kept, strict=True)
    return float(np.mean(np.concatenate(qualities))), float(np.average(values, weights=weights))


@functools.partial(jax.jit, static_argnames=("config", "mechanism"))
def _soft_step(
    params: dict[str, Any],
    policy: Policy,
    calibration: Calibration,
    inputs: Inputs,
    relaxation: Relaxation,
    config: ModelConfig,
    mechanism: Mechanism,
) -> tuple[jax.Array, jax.Array]:
    output = apply(
        params,
        policy,
        calibration,
        inputs,
        config=config,
        mechanism=mechanism,
        relaxation=relaxation,
    )
    scale = mechanism.thresholds
    kept = jnp.ones((1,)) if scale is None else scale.kept(output.workload)
    return output.logits, jnp.mean(kept if scale is None else scale.of_pairs(kept))


def drift(problem: Problem, point: Point, hard: Measurement) -> dict[str, float]:
    """Returns kept fraction and quality of the relaxed and straight-through paths beside the hard path's (validation)."""
    settings = problem.experiment.optimize
    result = {"hard_kept": hard.kept_fraction(), "hard_quality": float(np.mean(hard.quality))}
    for name, straight_through in (("soft", False), ("straight_through", True)):
        relaxation = Relaxation(
            temperature=jnp.asarray(settings.temperature_end),
            smoothness=jnp.asarray(settings.smoothness_end),
            straight_through=straight_through,
        )
        result[f"{name}_quality"], result[f"{name}_kept"] = soft_measure(
            problem, point, problem.task.part("validation"), relaxation
        )
    return result
