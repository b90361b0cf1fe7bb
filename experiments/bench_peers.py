"""Other tools, timed beside ours where their package is installed (the `bench` extra).

Qwix: training with int8 operands, straight through, ranges found in every step. Optuna: black-box search.
"""

import functools
import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from codesign.experiments.bench_cost import SIZE_SPAN, log_cost
from codesign.experiments.bench_sizes import MINILM, BenchSizes, TextShape
from codesign.experiments.bench_steps import (
    PLAIN,
    budgeted_step,
    float_step,
    random_text,
    step_milliseconds,
    text_problem,
)
from codesign.experiments.configs import MODES
from codesign.experiments.model_choice import model_shape
from codesign.experiments.timing import (
    Record,
    TimedStep,
    interleaved_seconds,
    make_record,
    rate_record,
)
from codesign.hw.accelerator import CLOCK, Accelerator, accelerator_from_spec
from codesign.hw.closed_form import workload_from_fractions
from codesign.hw.operating_points import published_setting
from codesign.hw.spec import load_preset
from codesign.structure import ModelStructure
from codesign.vocabulary import BLOCK_SITES
from codesign.workload import Workload

WIDTH_SPAN = 1.6
"""Widths are searched from 1 / WIDTH_SPAN times the published ones to these: 5 to 8 bit, 10 to 16 bit."""
NUM_WIDTHS = len(BLOCK_SITES) + 2
"""Widths of a layer that are searched: of each linear site's weights, of Q and K, of V."""
DESCENT_RATE = 1e-2
"""Step of the gradient search, in the logarithm of a factor (ours; its size changes no time)."""


def peer(name: str) -> Any:
    """Returns another tool's module; None, with one line on standard error, if it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(
            f"bench: `{name}` is left out ({error}): pip install 'codesign[bench]' to time it",
            file=sys.stderr,
        )
        return None


class Twin(nn.Module):
    """The pre-norm text classifier of `SMALL` in Flax Linen, its products where ours are."""

    structure: ModelStructure

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits `[B, C]` of token numbers `[B, T]`, all of which exist."""
        sizes = self.structure
        heads = (sizes.num_heads, sizes.head_dim)
        place = self.param(
            "position", nn.initializers.normal(0.02), (sizes.max_tokens, sizes.width)
        )
        vocabulary_size = sizes.end_shapes()["token"][0]
        x = nn.Embed(vocabulary_size, sizes.width)(tokens) + place[None, : tokens.shape[1]]
        for _ in range(sizes.num_layers):
            qkv = nn.Dense(3 * sizes.attention_width)(nn.LayerNorm()(x))
            q, k, v = jnp.moveaxis(jnp.reshape(qkv, (*x.shape[:2], 3, *heads)), 2, 0)
            scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(sizes.head_dim)
            attended = jnp.einsum("bhts,bshk->bthk", nn.softmax(scores), v)
            merged = jnp.reshape(attended, (*x.shape[:2], sizes.attention_width))
            x = x + nn.Dense(sizes.width)(merged)
            inner = nn.gelu(nn.Dense(sizes.hidden)(nn.LayerNorm()(x)), approximate=False)
            x = x + nn.Dense(sizes.width)(inner)
        return nn.Dense(sizes.num_outputs)(jnp.mean(nn.LayerNorm()(x), axis=1))


def int8_twin(qwix: Any, twin: Twin) -> Any:
    """Returns the twin as Qwix trains it: every product on int8 operands."""
    rule = qwix.QtRule(module_path=".*", weight_qtype="int8", act_qtype="int8")
    return qwix.quantize_model(twin, qwix.QtProvider([rule]))


def twin_step(model: nn.Module, shape: TextShape) -> TimedStep:
    """Returns the training step of a Flax model: cross-entropy, AdamW."""
    examples = random_text(shape).part("train")
    optimizer = optax.adamw(1e-4)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        logits = model.apply(params, batch["tokens"])
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return jnp.mean(losses)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: Any, constants: Any) -> tuple[Any, Any]:
        params, moments = state
        loss, gradients = jax.value_and_grad(loss_fn)(params, batch)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), {"task": loss}

    batch = {"tokens": examples.inputs["tokens"], "labels": examples.labels}
    params = jax.jit(model.init)(jax.random.key(0), batch["tokens"])
    return TimedStep(step, (params, optimizer.init(params)), batch, {})


def bench_qwix(sizes: BenchSizes) -> list[Record]:
    """Measures a step of Qwix's int8 training and our joint step on the same small transformer, all by turns.

    Baselines: the plain Flax twin of Qwix's; our plain fine-tuning; Qwix's step.
    """
    qwix = peer("qwix")
    if qwix is None:
        return []
    shape = sizes.small
    twin = Twin(structure=shape.structure)
    problem, point = text_problem(shape, "energon")
    steps = {
        "plain Flax twin": twin_step(twin, shape),
        "Qwix int8": twin_step(int8_twin(qwix, twin), shape),
        PLAIN: float_step(problem, point),
        "joint": budgeted_step(problem, point, MODES["joint"]),
    }
    taken = step_milliseconds({name: step.compiled() for name, step in steps.items()}, sizes)

    def record(name: str, own: str, baseline: str) -> Record:
        return make_record(name, taken[own], "ms/step", baseline, taken[baseline])

    return [
        record("qwix_int8", "Qwix int8", "plain Flax twin"),
        record("small_joint", "joint", PLAIN),
        record("small_joint_beside_qwix", "joint", "Qwix int8"),
    ]


def _moved_sizes(accelerator: Accelerator) -> list[str]:
    """Returns the sizes that knobs move: all but the clock, whose range the supply bounds."""
    return [name for name in accelerator.sizes if name != CLOCK]


def moved_cost(knobs: jax.Array, workload: Workload, accelerator: Accelerator) -> jax.Array:
    """Returns `log_cost` of a machine and a model changed by the knobs, scalar.

    Args:
      knobs: Logarithms of factors: on the machine's sizes but the clock; then on the `NUM_WIDTHS` widths, layer by layer.
      workload: One example's.
      accelerator: The machine.
    """
    factors = jnp.exp(knobs)
    names = _moved_sizes(accelerator)
    num_sizes = len(names)
    changes = dict(zip(names, factors[:num_sizes], strict=True))
    sizes = {name: size * changes.get(name, 1.0) for name, size in accelerator.sizes.items()}
    num_layers = workload.operations["qk.mac"].count.shape[1]
    *linear, of_qk, of_v = jnp.reshape(factors[num_sizes:], (NUM_WIDTHS, 1, num_layers))
    changed: Any = workload
    gemms, operations = dict(changed.block_gemms), dict(changed.operations)
    for site, factor in zip(BLOCK_SITES, linear, strict=True):
        gemms[site] = gemms[site].replace(weight_bits=gemms[site].weight_bits * factor)
    qk, pv, of_qk = operations["qk.mac"], operations["pv.mac"], of_qk[..., None]
    operations["qk.mac"] = qk.replace(bits_a=qk.bits_a * of_qk, bits_b=qk.bits_b * of_qk)
    operations["pv.mac"] = pv.replace(bits_b=pv.bits_b * of_v[..., None])
    changed = changed.replace(block_gemms=gemms, operations=operations)
    return log_cost((changed, sizes), accelerator)


def bench_optuna(sizes: BenchSizes) -> list[Record]:
    """Measures gradient steps per second on `moved_cost`. Baseline: trials per second of Optuna's TPE on the same.

    Both evaluate the compiled function at one point after another, the next depending on the last.
    """
    optuna = peer("optuna")
    if optuna is None:
        return []
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spec = load_preset("energon")
    accelerator = accelerator_from_spec(spec)
    shape = model_shape(MINILM, sizes.short.num_tokens)
    workload = workload_from_fractions(shape, published_setting(spec))
    bounds = [(-np.log(SIZE_SPAN), np.log(SIZE_SPAN))] * len(_moved_sizes(accelerator))
    bounds += [(-np.log(WIDTH_SPAN), 0.0)] * (NUM_WIDTHS * shape.num_layers)
    start = jnp.asarray(np.mean(bounds, axis=1), jnp.float32)
    function = functools.partial(moved_cost, workload=workload, accelerator=accelerator)
    value, gradient = jax.jit(function), jax.jit(jax.grad(function))

    def trial(trial: Any) -> float:
        knobs = [trial.suggest_float(str(i), *bound) for i, bound in enumerate(bounds)]
        return float(value(jnp.asarray(knobs, jnp.float32)))

    def search() -> None:
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
        study.optimize(trial, n_trials=sizes.num_trials)

    def descend() -> jax.Array:
        knobs = start
        for _ in range(sizes.num_gradients):
            knobs = knobs - DESCENT_RATE * gradient(knobs)
        return knobs

    seconds = interleaved_seconds([descend, search], sizes.repeats)
    return [
        rate_record(
            f"cost_gradient_{len(bounds)}_knobs",
            "evaluation/s",
            "Optuna TPE trials",
            (sizes.num_gradients, sizes.num_trials),
            seconds,
        )
    ]
