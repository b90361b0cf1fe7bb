"""Trains a few steps on one device and data parallel on all, and prints the metrics as JSON; runs in its own process."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny_model
from foreign_model import two_layers
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from codesign.applied import AppliedPolicy, policy_for
from codesign.gates import Relaxation
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.spec import load_preset
from codesign.hw.surrogate import cost
from codesign.mechanisms import MECHANISMS
from codesign.models import model as models
from codesign.optimize import LossAux, OptimizeSettings, init_state, make_train_step
from codesign.policy import Policy
from codesign.workload import Workload

BATCH_SIZE, NUM_STEPS = 8, 4
SETTINGS = OptimizeSettings(num_steps=NUM_STEPS, hardened_fraction=0.5, price_warmup_fraction=0.0)
# Without the rounding of widths the step compiles in half the time.
FEWER = dataclasses.replace(SETTINGS, train=("params", "thresholds"))
MACHINE = accelerator_from_spec(load_preset("energon"))
Placed = Callable[[Any], Any]


def ratio(workload: Workload, constants: Any, smoothness: jax.Array) -> jax.Array:
    spent = cost(workload, MACHINE, smoothness=smoothness).energy_pj("end_to_end")
    return jnp.mean(spent)[None] / constants["limit"]


def run(
    loss_fn: Any,
    settings: OptimizeSettings,
    start: tuple[Any, Policy],
    batch: Any,
    constants: Any,
    placed: tuple[Placed, Placed],
) -> dict[str, Any]:
    """Returns the metrics of every step; `placed` puts what is the same everywhere, and what is cut by example."""
    everywhere, by_example = placed
    step_fn = make_train_step(loss_fn, ratio, settings)
    state = everywhere(init_state(*start, settings, 1))
    batch, constants = by_example(batch), everywhere(constants)
    found = []
    for _ in range(NUM_STEPS):
        state, metrics = step_fn(state, batch, constants)
        found.append(metrics)
    shards = [shard.data.shape[0] for shard in found[-1]["outputs"].addressable_shards]
    listed = [{name: np.asarray(value).tolist() for name, value in step.items()} for step in found]
    return {
        "steps": listed,
        "shards": shards,
        "compilations": step_fn.compiled._cache_size(),  # type: ignore[attr-defined]
        "policy": {name: np.asarray(x).tolist() for name, x in state.policy.layers.items()},
    }


def project(placed: tuple[Placed, Placed]) -> dict[str, Any]:
    """The project's own model on padded sequences."""
    model = tiny_model.random_model("bert", BATCH_SIZE)
    mechanism = MECHANISMS["energon"]

    def loss_fn(
        params: Any, policy: Policy, batch: Any, constants: Any, relaxation: Relaxation
    ) -> tuple[jax.Array, LossAux]:
        output = models.apply(
            params,
            policy,
            constants["calibration"],
            batch["inputs"],
            config=model.config,
            mechanism=mechanism,
            relaxation=relaxation,
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(output.logits, batch["labels"])
        return jnp.mean(losses), LossAux({"outputs": output.logits}, output.workload)

    batch = {
        "inputs": tiny_model.as_inputs(model.inputs),
        "labels": jnp.arange(BATCH_SIZE) % model.structure.num_outputs,
    }
    constants = {"calibration": model.calibration, "limit": jnp.asarray(1e6)}
    policy = tiny_model.random_policy(model.structure, num_rounds=2, seed=1)
    return run(loss_fn, SETTINGS, (model.params, policy), batch, constants, placed)


def foreign(placed: tuple[Placed, Placed]) -> dict[str, Any]:
    """A layer made of the public calls."""
    x = jax.random.normal(jax.random.key(0), (BATCH_SIZE, 7, 8))
    kernels = jax.random.normal(jax.random.key(1), (1, 8, 24)) / 8**0.5
    _, (_, ranges) = two_layers(AppliedPolicy(calibrating=True), x, kernels)
    start = policy_for(ranges, 2, MECHANISMS["energon"])
    assert start.policy is not None

    def loss_fn(
        params: Any, policy: Policy, batch: Any, constants: Any, relaxation: Relaxation
    ) -> tuple[jax.Array, LossAux]:
        applied = AppliedPolicy(policy, constants["ranges"], start.mechanism, relaxation)
        outputs, (workload, _) = two_layers(applied, batch, params)
        return jnp.mean(jnp.square(outputs)), LossAux({"outputs": outputs}, workload)

    constants = {"ranges": ranges, "limit": jnp.asarray(1e5)}
    return run(loss_fn, FEWER, (kernels, start.policy), x, constants, placed)


def main() -> None:
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    everywhere = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec()))
    by_example = functools.partial(
        jax.device_put, device=NamedSharding(mesh, PartitionSpec("data"))
    )
    first = functools.partial(jax.device_put, device=jax.devices()[0])
    results = {
        kind.__name__: {"one": kind((first, first)), "mesh": kind((everywhere, by_example))}
        for kind in (project, foreign)
    }
    print(json.dumps({"devices": len(jax.devices()), **results}))


if __name__ == "__main__":
    main()
