"""Thresholds alone, trained under a budget on what is kept, on a two-layer model with the real mechanism."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny_model

from codesign.gates import Relaxation
from codesign.mechanisms import MECHANISMS
from codesign.models.model import apply
from codesign.optimize import (
    LossAux,
    OptimizeSettings,
    init_state,
    make_train_step,
    relaxation_at,
)
from codesign.policy import Policy
from codesign.watch import check_finite
from codesign.workload import Workload

BUDGET = 0.25
"""Fraction of all pairs that may be kept."""
REACHED_WITHIN = 0.02
"""Largest distance of the deployed kept fraction from the budget (learning rules, section 10)."""
AGREE_WITHIN = 0.01
"""Largest distance between relaxed and deployed kept fractions after annealing (learning rules, section 10)."""
SETTINGS = OptimizeSettings(train=("thresholds",), num_steps=150, temperature_end=0.02)
NUM_IMAGES = 128


def kept_fraction(workload: Workload, num_tokens: int) -> jax.Array:
    """Returns the mean fraction of pairs that reach the exact attention."""
    return jnp.mean(workload.operations["softmax.exp"].count) / num_tokens**2


def test_thresholds_reach_a_quarter_and_deploy_as_trained(digits_model: tiny_model.Model) -> None:
    model, num_tokens = digits_model, digits_model.structure.max_tokens
    start = tiny_model.energon_policy(model.structure, threshold=-0.5)
    teacher = np.asarray(tiny_model.run_float(model.config, model.params, model.pixels).logits)
    traces = 0

    def loss_fn(
        params: Any, policy: Policy, batch: Any, constants: Any, relaxation: Relaxation
    ) -> tuple[jax.Array, LossAux]:
        nonlocal traces
        traces += 1
        output = apply(
            params,
            policy,
            constants["calibration"],
            {"pixels": batch["pixels"]},
            config=model.config,
            mechanism=MECHANISMS["energon"],
            relaxation=relaxation,
        )
        kl = optax.losses.kl_divergence(
            jax.nn.log_softmax(output.logits), jax.nn.softmax(batch["teacher"])
        )
        return jnp.mean(kl), LossAux(terms={}, workload=output.workload)

    def cost_fn(workload: Any, constants: Any, smoothness: jax.Array) -> jax.Array:
        del constants, smoothness
        return kept_fraction(workload, num_tokens)[None] / BUDGET

    step_fn = make_train_step(loss_fn, cost_fn, SETTINGS)
    state = init_state(model.params, start, SETTINGS, num_constraints=1)
    constants = {"calibration": model.calibration}
    ratios = []
    for step in range(SETTINGS.num_steps):
        chosen = np.random.default_rng(step).integers(len(model.pixels), size=32)
        batch = {"pixels": model.pixels[chosen], "teacher": teacher[chosen]}
        state, metrics = step_fn(state, batch, constants)
        check_finite(metrics, step)
        ratios.append(float(metrics["ratio"][0]))
    assert traces == 1
    assert ratios[0] > 1.5

    pixels = model.pixels[:NUM_IMAGES]
    hard = tiny_model.run_hard(model, state.policy, pixels)[1]
    annealed = relaxation_at(state.step, SETTINGS)
    soft = tiny_model.run_soft(
        model.params,
        state.policy,
        model.calibration,
        pixels,
        Relaxation(annealed.temperature, annealed.smoothness, straight_through=False),
        setup=model.config,
    )
    deployed, relaxed = (
        float(kept_fraction(output.workload, num_tokens)) for output in (hard, soft)
    )
    assert abs(deployed - BUDGET) < REACHED_WITHIN
    assert abs(relaxed - deployed) < AGREE_WITHIN
    # Heads that matter more to the outputs keep more: it is no longer one setting for all.
    assert np.ptp(np.asarray(state.policy.layers["threshold"])) > 0.1
