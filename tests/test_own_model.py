"""Flax models written elsewhere, Linen and NNX, under the public calls; their training loop; and the example."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from foreign_model import (
    BATCH,
    HEAD_DIM,
    HEADS,
    LAYERS,
    ROUNDING,
    WIDTH,
    compiled,
    inputs,
    two_layers,
)

import codesign
from codesign.errors import CodesignError, NonFiniteError
from codesign.policy import BITS_RANGE

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "own_model.py"
MAX_LINES = 40
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@pytest.fixture(scope="module", autouse=True)
def _fast_compilation() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Wrapped(nnx.Module):
    """A model that holds Flax's own attention and calls ours with its parameters."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, rngs=rngs, decode=False)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def plain(self, x: jax.Array) -> jax.Array:
        result: jax.Array = self.head(jnp.mean(x + self.attention(x), axis=1))
        return result

    def __call__(self, x: jax.Array, applied: codesign.AppliedPolicy) -> tuple[jax.Array, Any]:
        layer, counts, heads = applied.layer(0), codesign.LayerCounts(), []
        for name in ("query", "key", "value"):
            part = getattr(self.attention, name)
            kernel = jnp.reshape(part.kernel[...], (WIDTH, WIDTH))
            y, added = codesign.linear(x, kernel, jnp.reshape(part.bias[...], -1), layer, "qkv")
            heads.append(jnp.reshape(y, (*x.shape[:2], HEADS, HEAD_DIM)))
            counts += added
        y, added = codesign.attention(heads[0], heads[1], heads[2], layer)
        counts += added
        out = self.attention.out
        kernel = jnp.reshape(out.kernel[...], (WIDTH, WIDTH))
        y, added = codesign.linear(jnp.reshape(y, x.shape), kernel, out.bias[...], layer, "out")
        pooled = jnp.mean(x + y, axis=1)
        y, last = codesign.linear(pooled, self.head.kernel, self.head.bias, applied.ends(), "head")
        return y, codesign.collect([counts + added], last)


class LinenBlock(linen.Module):
    """The same in Linen: parameters declared where they are used."""

    @linen.compact
    def __call__(self, x: jax.Array, layer: codesign.LayerPolicy) -> Any:
        shape = (WIDTH, 3 * WIDTH)
        kernel = self.param("qkv", linen.initializers.lecun_normal(), shape)
        y, first = codesign.linear(x, kernel, None, layer, "qkv")
        q, k, v = jnp.unstack(jnp.reshape(y, (*x.shape[:2], 3, HEADS, HEAD_DIM)), axis=2)
        y, second = codesign.attention(q, k, v, layer)
        return x + jnp.reshape(y, x.shape), first + second


class LinenModel(linen.Module):
    """Two such blocks by `nn.scan`: the layer's number is scanned, the policy shared."""

    @linen.compact
    def __call__(self, x: jax.Array, applied: codesign.AppliedPolicy) -> Any:
        def block(module: LinenBlock, x: jax.Array, index: jax.Array) -> Any:
            return module(x, applied.layer(index))

        scan = linen.scan(block, variable_axes={"params": 0}, split_rngs={"params": True})
        x, counts = scan(LinenBlock(), x, jnp.arange(LAYERS))
        kernel = self.param("head", linen.initializers.lecun_normal(), (WIDTH, 3))
        y, last = codesign.linear(jnp.mean(x, axis=1), kernel, None, applied.ends(), "head")
        return y, codesign.collect(counts, last)


def test_nnx_module_trains_under_its_policy() -> None:
    model, x = Wrapped(nnx.Rngs(0)), inputs()[0]
    graph, params = nnx.split(model)

    @compiled
    def run(params: Any, applied: codesign.AppliedPolicy) -> Any:
        return nnx.merge(graph, params)(x, applied)

    y, (dense, calibration) = run(params, codesign.AppliedPolicy(calibrating=True))
    np.testing.assert_allclose(y, model.plain(x), atol=ROUNDING)
    assert dense.block_gemms["qkv"].outer == 3 * WIDTH
    start = codesign.policy_for(calibration, HEADS, codesign.mechanism_by_name("dense"))
    labels = jnp.asarray([0, 2])

    def loss_fn(params: Any, applied: codesign.AppliedPolicy, batch: jax.Array) -> Any:
        logits, (workload, _) = nnx.merge(graph, params)(batch, applied)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(BATCH), labels]), workload

    def bits(workload: codesign.Workload, smoothness: jax.Array) -> jax.Array:
        del smoothness
        return sum(jnp.mean(part.weight_bits) for part in workload.block_gemms.values()) / 2.0

    before = loss_fn(params, codesign.AppliedPolicy(), x)[0]
    trained, applied = codesign.fit(
        loss_fn, params, start, [x] * 40, bits, 4.0, weight_rate=0.01, bits_rate=0.3
    )
    after, workload = loss_fn(trained, applied, x)
    assert after < before
    # Four bit on average, deployed: whole, and not above the budget.
    assert 3.0 <= bits(workload, jnp.ones(())) <= 4.0
    assert applied.policy is not None and applied.relaxation is not None
    widths = applied.policy.layers["qkv.weight_bits"]
    assert widths.tolist() == np.round(widths).tolist()
    assert isinstance(trained, type(params))


def test_linen_module_with_scanned_layers_equals_a_loop() -> None:
    model, x = LinenModel(), inputs()[0]
    params = compiled(model.init)(jax.random.key(0), x, codesign.AppliedPolicy())
    kernels = params["params"]["LinenBlock_0"]["qkv"]
    assert kernels.shape == (LAYERS, WIDTH, 3 * WIDTH)
    _, (_, calibration) = compiled(model.apply)(params, x, codesign.AppliedPolicy(calibrating=True))
    expected = compiled(two_layers)(codesign.AppliedPolicy(calibrating=True), x, kernels)[1][1]
    for name, ranges in expected.layers.items():
        np.testing.assert_allclose(calibration.layers[name], ranges, rtol=1e-5)
    assert set(calibration.layers) == set(expected.layers)


def float_loss(params: Any, applied: codesign.AppliedPolicy, batch: jax.Array) -> Any:
    y, (workload, _) = two_layers(applied, batch, params)
    return jnp.mean(jnp.square(y)), workload


def test_fit_tells_of_a_missed_budget() -> None:
    x, kernels = inputs()
    calibration = compiled(two_layers)(codesign.AppliedPolicy(calibrating=True), x, kernels)[1][1]
    start = codesign.policy_for(calibration, HEADS, codesign.mechanism_by_name("dense"))

    def always_three(workload: codesign.Workload, smoothness: jax.Array) -> jax.Array:
        del smoothness
        return 3.0 + 0.0 * jnp.mean(workload.block_gemms["qkv"].weight_bits)

    with pytest.warns(UserWarning, match=r"1\.500 of limits\[0\]"):
        codesign.fit(float_loss, kernels, start, [x], always_three, 2.0)


def test_fit_without_a_policy_trains_weights_in_floating_point() -> None:
    x, kernels = inputs()
    before = float_loss(kernels, codesign.AppliedPolicy(), x)[0]
    trained, applied = codesign.fit(
        float_loss, kernels, codesign.AppliedPolicy(), jnp.stack([x] * 5), weight_rate=0.01
    )
    assert applied.policy is None and applied.relaxation is None
    assert float_loss(trained, applied, x)[0] < before


def test_fit_names_what_is_wrong() -> None:
    x, kernels = inputs()
    with pytest.raises(CodesignError, match="`bits_rate` must be > 0"):
        codesign.fit(float_loss, kernels, codesign.AppliedPolicy(), [x], bits_rate=-1.0)
    with pytest.raises(CodesignError, match="`cost_fn` and `limits` go together"):
        codesign.fit(float_loss, kernels, codesign.AppliedPolicy(), [x], limits=4.0)
    with pytest.raises(NonFiniteError, match="step 0"):
        codesign.fit(float_loss, kernels, codesign.AppliedPolicy(), [jnp.nan * x])


def run_example(num_steps: int, **environment: str) -> tuple[float, float]:
    """Returns the accuracy and the share of the dense energy that the example prints, with another number of steps."""
    code = EXAMPLE.read_text()
    assert code.count("(400, 64)") == 1
    code = code.replace("(400, 64)", f"({num_steps}, 64)")
    done = subprocess.run(
        # Few steps miss the budget, and `fit` says so.
        [sys.executable, "-W", "error", "-W", "default:the cost of the last", "-c", code],
        env=environment | {"JAX_PLATFORMS": "cpu", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(
        r"accuracy (0\.\d+) with decisions as deployed\n"
        r"energy (\d\.\d+) of dense \(straight-through, not integers\)\n",
        done.stdout,
    )
    assert found, done.stdout
    return float(found[1]), float(found[2])


def test_example_is_short_and_runs() -> None:
    lines = [line for line in EXAMPLE.read_text().splitlines() if line.strip()]
    assert len(lines) <= MAX_LINES
    accuracy, energy = run_example(20, XLA_FLAGS=FAST_COMPILE)
    assert accuracy > 0.2  # of ten classes, after a few steps
    low, high = BITS_RANGE["linear"]
    assert low / high / 2.0 < energy < 1.0


@pytest.mark.slow
def test_example_keeps_its_accuracy_and_its_budget() -> None:
    accuracy, energy = run_example(400)
    assert accuracy > 0.8
    assert 0.55 < energy <= 0.61
