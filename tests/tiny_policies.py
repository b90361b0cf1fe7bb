"""Policies of every mechanism for the random models of `tiny_model`, and those models run under them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import tiny_model

from codesign.mechanisms import MECHANISMS
from codesign.models.transformer import ModelOutput
from codesign.policy import Policy

SPREAD: dict[str, tuple[Any, Any]] = {
    "topk": (0.3, 0.8),
    "bitserial": (0.75, 0.97),
    "sanger": (0.7, 0.95),
    "a3": (0.7, 0.97),
    "fact": ([0.2, 0.85, 0.22], [0.6, 0.97, 0.28]),
    "spatten": ([0.1, 0.3, 0.2, 0.02], [0.3, 0.5, 0.6, 0.2]),
    "sofa": ([0.3, 0.775], [0.8, 0.9]),
    "lapa": (0.25, 0.5),
    "esact": (0.4, 0.7),
}
"""Strengths between which random policies drop some pairs of a random model and keep some."""


def model_of(variant: str, name: str) -> tiny_model.Model:
    """A random model with the ranges that the mechanism wants."""
    model = tiny_model.random_model(variant)
    return tiny_model.with_own_ranges(model, name) if MECHANISMS[name].own_ranges else model


def ranges_of(model: tiny_model.Model) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in model.calibration.layers.items()}


def policy_of(
    model: tiny_model.Model,
    name: str,
    *,
    seed: int | None = None,
    setting: tuple[float, ...] | None = None,
    bits: float = 12.0,
    **own: Any,
) -> Policy:
    """Random thresholds if there is a seed, else one setting for all, unless given the one that drops nothing.

    Every other knob of the mechanism is where it starts, or at the value of `own`, a scalar or by its last axis.
    """
    shape, scale = model.structure, MECHANISMS[name].thresholds
    assert scale is not None
    knobs = MECHANISMS[name].knobs(shape.num_layers, shape.num_heads)
    size = knobs["threshold"].shape
    if seed is None:
        threshold = scale.from_setting(setting or scale.settings[0], size, ranges_of(model))
    else:
        strength = np.random.default_rng(seed).uniform(*SPREAD[name], size)
        threshold = scale.from_strength(strength, ranges_of(model))
    knobs |= {key: jnp.broadcast_to(jnp.asarray(x), knobs[key].shape) for key, x in own.items()}
    return tiny_model.with_knobs(model, knobs | {"threshold": threshold}, attention_bits=bits)


def run_hard(model: tiny_model.Model, policy: Policy, name: str) -> tuple[Any, ModelOutput]:
    """The deployment and its run."""
    return tiny_model.run_hard(model, policy, model.inputs, mechanism=name)


def run_soft(model: tiny_model.Model, policy: Policy, name: str, **relaxation: Any) -> ModelOutput:
    """The straight-through path, or what the arguments of `tiny_model.relaxation` say."""
    return tiny_model.run_soft(
        model.params,
        policy,
        model.calibration,
        model.inputs,
        tiny_model.relaxation(**relaxation),
        setup=model.config,
        mechanism=name,
    )
