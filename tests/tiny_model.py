"""Small vision transformers on the bundled digits, briefly trained, with policies to run them under."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from codesign.calibration import Calibration, floored
from codesign.gates import Relaxation
from codesign.mechanisms import MECHANISMS
from codesign.mechanisms.energon import hard_filter, knobs, soft_filter
from codesign.mechanisms.protocol import Context, Operands, Plan, Selection
from codesign.models import deploy, vit
from codesign.models.config import VisionConfig
from codesign.models.parameters import init_params
from codesign.models.transformer import ModelOutput
from codesign.policy import Policy, dense_knobs, project
from codesign.structure import ModelStructure

BATCH_SIZE = 32
NUM_CALIBRATION = 128
# An unoptimised program compiles faster, and these run for milliseconds.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
WIDTHS: dict[str, object] = {"qk_bits": 16, "v_bits": 16, "query_bits": 4, "key_bits": [2, 4]}
"""Published widths of Energon's filter and attention, bit."""
OFF = -4.0
"""Threshold variable of a round that keeps all: 128 tanh(-4) = -127.9."""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A trained model, its static ranges, and images and labels that it has not seen."""

    config: VisionConfig
    params: dict[str, Any]
    calibration: Calibration
    pixels: np.ndarray
    labels: np.ndarray

    @property
    def structure(self) -> ModelStructure:
        return self.config.structure


def structure(**changes: Any) -> ModelStructure:
    """Two layers and two heads on 8 x 8 pixels: 16 tokens."""
    fields = {
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 8,
        "width": 24,
        "hidden": 48,
        "image_size": 8,
        "channels": 1,
        "patch_size": 4,
        "stride": 2,
        "padding": 1,
        "num_classes": 10,
        "mechanism": "dense",
        "num_rounds": 0,
    }
    return ModelStructure(**(fields | changes))


def config(shape: ModelStructure) -> VisionConfig:
    """Digits have pixels 0 to 16."""
    return VisionConfig(structure=shape, pixel_offset=8, pixel_scale=1 / 8)


def run_float(
    setup: VisionConfig, params: dict[str, Any], pixels: np.ndarray | jax.Array
) -> ModelOutput:
    return vit.apply(
        params,
        None,
        None,
        jnp.asarray(pixels),
        config=setup,
        mechanism=MECHANISMS["dense"],
        relaxation=None,
    )


def calibrate(setup: VisionConfig, params: dict[str, Any], pixels: np.ndarray) -> Calibration:
    run = jax.jit(functools.partial(run_float, setup), compiler_options=FAST_COMPILE)
    observed = run(params, pixels).observed
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
    return Model(setup, params, calibration, pixels[num_train:], labels[num_train:])


def energon_policy(
    shape: ModelStructure,
    *,
    linear_bits: float = 8.0,
    attention_bits: float = 16.0,
    num_rounds: int = 2,
    threshold: float = 0.0,
) -> Policy:
    """Every layer and head alike, published filter widths."""
    policy = dense_knobs(shape.num_layers, linear_bits=linear_bits, attention_bits=attention_bits)
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
    pixels: jax.Array,
    relaxed: Relaxation,
    *,
    setup: VisionConfig,
    mechanism: str = "energon",
    tracing: bool = True,
) -> ModelOutput:
    return vit.apply(
        params,
        policy,
        calibration,
        pixels,
        config=setup,
        mechanism=MECHANISMS[mechanism],
        relaxation=relaxed,
        tracing=tracing,
    )


@functools.partial(jax.jit, static_argnames=("shape", "mechanism"), compiler_options=FAST_COMPILE)
def _apply_hard(
    layers: Any, ends: Any, pixels: jax.Array, *, shape: ModelStructure, mechanism: str
) -> ModelOutput:
    return vit.apply_hard(
        layers, ends, pixels, structure=shape, mechanism=MECHANISMS[mechanism], tracing=True
    )


def run_hard(
    model: Model, policy: Policy, pixels: np.ndarray, *, mechanism: str = "energon"
) -> tuple[deploy.Deployment, ModelOutput]:
    """Hardens and runs the integer path; every array of the result is NumPy's."""
    deployment = deploy.harden(
        model.params, policy, model.calibration, model.config, MECHANISMS[mechanism]
    )
    layers, ends = deployment.hard_arrays()
    with jax.enable_x64(True):
        output = _apply_hard(
            layers,
            ends,
            np.asarray(pixels),
            shape=deployment.structure,
            mechanism=mechanism,
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
