"""Small transformers with policies to run them under: images of digits, briefly trained, and random ones of every kind."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import random_deployment
from sklearn.datasets import load_digits

from codesign.calibration import Calibration, floored
from codesign.gates import Relaxation
from codesign.hw import emulator
from codesign.hw.surrogate import cost
from codesign.mechanisms import MECHANISMS, Mechanism
from codesign.mechanisms.energon import hard_filter, knobs, soft_filter
from codesign.mechanisms.protocol import Context, Operands, Plan, Selection
from codesign.models import deploy, model as models
from codesign.models.config import ModelConfig
from codesign.models.parameters import init_params
from codesign.models.transformer import ModelOutput
from codesign.policy import Policy, dense_knobs, project
from codesign.structure import ModelStructure, PatchInput

BATCH_SIZE = 32
NUM_CALIBRATION = 128
# An unoptimised program compiles faster, and these run for milliseconds.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
fast_cost = jax.jit(cost, static_argnames=("smoothness",), compiler_options=FAST_COMPILE)
"""The cost model as one program: operation by operation it takes as many programs."""
WIDTHS: dict[str, object] = {"qk_bits": 16, "v_bits": 16, "query_bits": 4, "key_bits": [2, 4]}
"""Published widths of Energon's filter and attention, bit."""
OFF = -4.0
"""Threshold variable of a round that keeps all: 128 tanh(-4) = -127.9."""


PATCH_FIELDS = {field.name for field in dataclasses.fields(PatchInput)}


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model, its static ranges, and inputs (and labels) that it has not seen."""

    config: ModelConfig
    params: dict[str, Any]
    calibration: Calibration
    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None = None

    @property
    def structure(self) -> ModelStructure:
        return self.config.structure

    @property
    def pixels(self) -> np.ndarray:
        return self.inputs["pixels"]


def structure(**changes: Any) -> ModelStructure:
    """Two layers and two heads on 8 x 8 pixels: 16 tokens; `changes` may name fields of the patches too."""
    patches = {"image_size": 8, "channels": 1, "patch_size": 4, "stride": 2, "padding": 1}
    patches |= {name: changes.pop(name) for name in PATCH_FIELDS & changes.keys()}
    fields = {
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 8,
        "width": 24,
        "hidden": 48,
        "input": PatchInput(**patches),
        "num_outputs": 10,
    }
    return ModelStructure(**(fields | changes))


def config(shape: ModelStructure) -> ModelConfig:
    """Digits have pixels 0 to 16."""
    return ModelConfig(structure=shape, pixel_offset=8, pixel_scale=1 / 8)


def as_inputs(inputs: Mapping[str, Any] | np.ndarray | jax.Array) -> dict[str, jax.Array]:
    """A model's inputs; an array alone is pixels."""
    named = inputs if isinstance(inputs, Mapping) else {"pixels": inputs}
    return {name: jnp.asarray(value) for name, value in named.items()}


def run_float(
    setup: ModelConfig,
    params: dict[str, Any],
    inputs: Mapping[str, Any] | np.ndarray | jax.Array,
    *,
    calibrating: bool = False,
) -> ModelOutput:
    return models.apply(
        params,
        None,
        None,
        as_inputs(inputs),
        config=setup,
        mechanism=MECHANISMS["dense"],
        relaxation=None,
        calibrating=calibrating,
    )


def calibrate(
    setup: ModelConfig, params: dict[str, Any], inputs: Mapping[str, Any] | np.ndarray
) -> Calibration:
    run = functools.partial(run_float, setup, calibrating=True)
    observed = jax.jit(run, compiler_options=FAST_COMPILE)(params, as_inputs(inputs)).observed
    return floored(Calibration(layers=observed["layers"], ends=observed["ends"]))


@functools.cache
def trained(shape: ModelStructure, num_steps: int = 300) -> Model:
    """Returns a model after `num_steps` of Adam on two thirds of the digits."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    pixels, labels = digits.images.astype(np.int32)[order], digits.target[order]
    num_train = 2 * len(labels) // 3
    setup = config(shape)
    optimiser = optax.adam(optax.cosine_decay_schedule(4e-3, num_steps))

    def loss(params: Any, images: jax.Array, targets: jax.Array) -> jax.Array:
        logits = run_float(setup, params, images).logits
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
        updates, state = optimiser.update(jax.grad(loss)(params, images, targets), state)
        return optax.apply_updates(params, updates), state

    params = init_params(shape, key=jax.random.key(0))
    state = optimiser.init(params)
    rng = np.random.default_rng(1)
    for _ in range(num_steps):
        chosen = rng.integers(num_train, size=BATCH_SIZE)
        params, state = step(params, state, pixels[chosen], labels[chosen])
    calibration = calibrate(setup, params, pixels[:NUM_CALIBRATION])
    return Model(setup, params, calibration, {"pixels": pixels[num_train:]}, labels[num_train:])


@functools.cache
def random_model(variant: str, batch_size: int = 8) -> Model:
    """Returns a model that was never trained, of one of `random_deployment.VARIANTS`.

    `patches`, `prefix` (class token); over padded sequences `bert` and `pooler` (post-norm) and `decoder` (causal).
    """
    shape = random_deployment.structure(variant, "dense")
    setup = config(shape)
    inputs = random_deployment.random_inputs(shape, batch_size=batch_size)
    # Kept for tests of either precision, whichever asks first.
    with jax.enable_x64(False):
        # Far from the identity, so that every row, head and key matters.
        params = jax.tree.map(lambda leaf: 3.0 * leaf, init_params(shape, key=jax.random.key(3)))
        return Model(setup, params, calibrate(setup, params, inputs), inputs)


def shared_policy(
    shape: ModelStructure, *, linear_bits: float = 8.0, attention_bits: float = 16.0
) -> Policy:
    """The knobs that every mechanism has, every layer alike."""
    return dense_knobs(
        shape.num_layers,
        linear_bits=linear_bits,
        attention_bits=attention_bits,
        end_sites=shape.end_sites,
    )


def energon_policy(
    shape: ModelStructure,
    *,
    linear_bits: float = 8.0,
    attention_bits: float = 16.0,
    num_rounds: int = 2,
    threshold: float = 0.0,
) -> Policy:
    """Every layer and head alike, published filter widths."""
    policy = shared_policy(shape, linear_bits=linear_bits, attention_bits=attention_bits)
    own = knobs(shape.num_layers, shape.num_heads, num_rounds)
    own["threshold"] = own["threshold"] + threshold
    return Policy(layers=policy.layers | own, ends=policy.ends)


def random_policy(shape: ModelStructure, *, num_rounds: int, seed: int) -> Policy:
    """Fractional widths over their whole ranges, clips, and thresholds of which a quarter are off."""
    rng = np.random.default_rng(seed)
    start = energon_policy(shape, num_rounds=num_rounds)

    def drawn(name: str, value: jax.Array) -> jax.Array:
        if name == "threshold":
            is_off = rng.random(value.shape) < 0.25
            draw = np.where(is_off, OFF, rng.normal(scale=0.4, size=value.shape))
        elif name == "key_bits":
            planes = rng.uniform(1.0, 2.5, size=value.shape)
            draw = 1.0 + np.cumsum(planes, axis=-1)
        elif name in ("qk_bits", "v_bits"):
            draw = rng.uniform(8.0, 16.0, size=value.shape)
        elif name.endswith("bits"):
            draw = rng.uniform(3.0, 8.0, size=value.shape)
        else:
            draw = rng.normal(scale=0.1, size=value.shape)
        return jnp.asarray(draw, value.dtype)

    return project(
        Policy(
            layers={name: drawn(name, value) for name, value in start.layers.items()},
            ends={name: drawn(name, value) for name, value in start.ends.items()},
        )
    )


def with_knobs(model: Model, own: Mapping[str, Any], *, attention_bits: float = 12.0) -> Policy:
    """The shared knobs and a mechanism's own, those in single precision."""
    policy = shared_policy(model.structure, attention_bits=attention_bits)
    knobs = {name: jnp.asarray(value, jnp.float32) for name, value in own.items()}
    return Policy(layers=policy.layers | knobs, ends=policy.ends)


@functools.cache
def with_own_ranges(model: Model, name: str) -> Model:
    """The model with the ranges that a mechanism wants, measured at the start of its policy."""
    mechanism, shape = MECHANISMS[name], model.structure
    policy = with_knobs(model, mechanism.knobs(shape.num_layers, shape.num_heads))

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def observed(inputs: Any) -> dict[str, jax.Array]:
        output = models.apply(
            model.params,
            policy,
            model.calibration,
            inputs,
            config=model.config,
            mechanism=mechanism,
            relaxation=relaxation(),
            calibrating=True,
        )
        return {key: output.observed["layers"][key] for key in mechanism.own_ranges}

    with jax.enable_x64(False):
        layers = model.calibration.layers | observed(as_inputs(model.inputs))
    calibration = Calibration(layers=layers, ends=model.calibration.ends)
    return dataclasses.replace(model, calibration=calibration)


def relaxation(temperature: float = 0.3, *, straight_through: bool = True) -> Relaxation:
    return Relaxation(
        temperature=jnp.asarray(temperature),
        smoothness=jnp.asarray(8.0),
        straight_through=straight_through,
    )


@functools.partial(
    jax.jit, static_argnames=("setup", "tracing", "mechanism"), compiler_options=FAST_COMPILE
)
def run_soft(
    params: Any,
    policy: Policy,
    calibration: Calibration,
    inputs: Any,
    relaxed: Relaxation,
    *,
    setup: ModelConfig,
    mechanism: str = "energon",
    tracing: bool = True,
) -> ModelOutput:
    return models.apply(
        params,
        policy,
        calibration,
        as_inputs(inputs),
        config=setup,
        mechanism=MECHANISMS[mechanism],
        relaxation=relaxed,
        tracing=tracing,
    )


@functools.partial(jax.jit, static_argnames=("shape", "mechanism"), compiler_options=FAST_COMPILE)
def _apply_hard(
    layers: Any, ends: Any, inputs: Any, *, shape: ModelStructure, mechanism: Mechanism
) -> ModelOutput:
    return models.apply_hard(
        layers, ends, inputs, structure=shape, mechanism=mechanism, tracing=True
    )


def run_hard(
    model: Model,
    policy: Policy,
    inputs: Mapping[str, Any] | np.ndarray,
    *,
    mechanism: str | Mechanism = "energon",
) -> tuple[deploy.Deployment, ModelOutput]:
    """Hardens and runs the integer path; every array of the result is NumPy's."""
    chosen = MECHANISMS[mechanism] if isinstance(mechanism, str) else mechanism
    deployment = deploy.harden(model.params, policy, model.calibration, model.config, chosen)
    layers, ends = deployment.hard_arrays()
    with jax.enable_x64(True):
        output = _apply_hard(
            layers, ends, as_inputs(inputs), shape=deployment.structure, mechanism=chosen
        )
        return deployment, jax.tree.map(np.asarray, output)


def all_pairs(batch_size: int, num_queries: int, num_keys: int) -> np.ndarray:
    return np.ones((batch_size, 1, num_queries, num_keys))


@functools.partial(jax.jit, static_argnames=("is_hard",), compiler_options=FAST_COMPILE)
def _filter(context: Context, operands: Operands, *, is_hard: bool) -> Selection:
    run = hard_filter if is_hard else soft_filter
    selection, _ = run(context, operands, Plan(), ())
    return selection


def run_filter(
    query: np.ndarray,
    key: np.ndarray,
    threshold: np.ndarray,
    *,
    pairs: np.ndarray | None = None,
    widths: dict[str, object] = WIDTHS,
    soft: Relaxation | None = None,
) -> Selection:
    """Filters codes `[B, H, T, d]`, `[B, H, S, d]`; thresholds are codes `[H, R]`, for `soft` variables v."""
    batch_size, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    if pairs is None:
        pairs = all_pairs(batch_size, num_queries, num_keys)
    dtype = jnp.int32 if soft is None else jnp.result_type(float)
    numbers = {name: jnp.asarray(value, dtype) for name, value in widths.items()}
    knobs = numbers | {"threshold": jnp.asarray(threshold, dtype)}
    context = Context(
        knobs=knobs,
        widths=numbers,
        ranges={},
        relaxation=soft or relaxation(),
        valid=jnp.ones((batch_size, num_queries)),
        pairs=jnp.asarray(pairs, float),
        tracing=True,
    )
    one = jnp.ones(())
    key_codes = jnp.asarray(key, dtype)
    operands = Operands(
        query=jnp.asarray(query, dtype),
        key=key_codes,
        value=key_codes,
        logit_scale=one,
        value_scale=one,
    )
    return _filter(context, operands, is_hard=soft is None)


def tensors(output: ModelOutput) -> dict[str, np.ndarray]:
    """Every named tensor of a run, the logits among them."""
    return {**output.trace, "logits": output.logits}


def emulated(model: Model, deployment: Any, output: ModelOutput) -> dict[str, np.ndarray]:
    """Checks that every tensor of the hard path equals the emulator's, and returns them."""
    wanted = emulator.emulate(
        deployment.structure, deployment.layers, deployment.ends, model.inputs
    )
    got = tensors(output)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    return got


def existing(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[B, T]` and pairs of tokens that exist, `[B, T, S]`, of a random model."""
    shape = (len(next(iter(model.inputs.values()))), model.structure.max_tokens)
    valid = np.asarray(model.inputs.get("valid", np.ones(shape, bool)), bool)
    pairs = valid[:, :, None] & valid[:, None, :]
    return valid, np.tril(pairs) if model.structure.is_causal else pairs


def knob_slopes(model: Model, policy: Policy, mechanism: str) -> dict[str, np.ndarray]:
    """Derivatives of logits and of what attention costs to every knob of the layers, straight-through."""

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def gradient(policy: Policy) -> Policy:
        def total(policy: Policy) -> jax.Array:
            output = models.apply(
                model.params,
                policy,
                model.calibration,
                as_inputs(model.inputs),
                config=model.config,
                mechanism=MECHANISMS[mechanism],
                relaxation=relaxation(),
            )
            cost = sum(jnp.sum(one.count) for one in output.workload.operations.values())
            return jnp.sum(jnp.square(output.logits)) + 1e-4 * cost

        result: Policy = jax.grad(total)(policy)
        return result

    return jax.tree.map(np.asarray, gradient(policy).layers)
