"""Attention and linear layers for models of one's own: values, counts, transformations and what is refused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from foreign_model import (
    BATCH,
    FLOAT,
    HEAD_DIM,
    HEADS,
    LAYERS,
    ROUNDING,
    TOKENS,
    WIDTH,
    applied,
    calibration,
    compiled,
    inputs,
    one_layer,
    run_attention,
    run_linear,
    tensors,
    two_layers,
)

from codesign.applied import AppliedPolicy, LayerPolicy, policy_for
from codesign.fake_quantize import quantize_activation
from codesign.layer_counts import LayerCounts, collect
from codesign.layers import attention, linear
from codesign.mechanisms import MECHANISMS
from codesign.quantize import quantize_codes


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masking", ["none", "valid", "mask"])
def test_floating_point_is_plain_attention(masking: str, is_causal: bool) -> None:
    q, k, v = tensors()
    valid = jnp.arange(TOKENS)[None, :] < jnp.asarray([TOKENS, 4])[:, None]
    pairs = jnp.broadcast_to(valid[:, None, None, :], (BATCH, 1, TOKENS, TOKENS))
    expected = jax.nn.dot_product_attention(
        q, k, v, mask=None if masking == "none" else pairs, is_causal=is_causal, scale=0.7
    )
    layer = AppliedPolicy(valid=valid if masking == "valid" else None).layer(0)
    mask = pairs if masking == "mask" else None
    output, counted = run_attention(q, k, v, layer, mask=mask, is_causal=is_causal, scale=0.7)
    np.testing.assert_allclose(output, expected, atol=ROUNDING)
    # Pairs of queries that exist: 7 of 7 and 4 of 4 tokens; a mask says nothing about queries.
    lengths = {"none": (7, 7), "valid": (7, 4), "mask": (7, 4)}[masking]
    queries = {"none": (7, 7), "valid": (7, 4), "mask": (7, 7)}[masking]
    kept = [
        sum(min(length, t + 1) if is_causal else length for t in range(number))
        for length, number in zip(lengths, queries, strict=True)
    ]
    operations = counted.counts.operations
    assert operations["softmax.exp"].count.tolist() == [[kept[0]] * HEADS, [kept[1]] * HEADS]
    assert operations["qk.mac"].count[1, 0] == kept[1] * HEAD_DIM
    assert operations["qk.mac"].bits_a.item() == 16.0


def test_equals_the_blocks_of_the_project() -> None:
    model = tiny_model.random_model("decoder")  # causal, padded
    policy = tiny_model.random_policy(model.structure, num_rounds=2, seed=5)
    relaxed = tiny_model.relaxation()
    expected = tiny_model.run_soft(
        model.params, policy, model.calibration, model.inputs, relaxed, setup=model.config
    )
    run = AppliedPolicy(
        policy, model.calibration, MECHANISMS["energon"], relaxed, model.inputs["valid"]
    )

    @compiled
    def own(run: AppliedPolicy, params: Any, trace: dict[str, jax.Array]) -> Any:
        layers, outputs = [], []
        for index in range(model.structure.num_layers):
            layer, counted = run.layer(index), LayerCounts()
            for site, name in {
                "qkv": "qkv",
                "out": "context",
                "up": "up",
                "down": "hidden",
            }.items():
                weight = jax.tree.map(lambda leaf: leaf[index], params["blocks"][site])  # noqa: B023
                y, added = linear(trace[name][index], weight["kernel"], weight["bias"], layer, site)
                counted += added
                if site == "qkv":
                    shape = (*y.shape[:2], 3, model.structure.num_heads, -1)
                    q, k, v = jnp.unstack(jnp.reshape(y, shape), axis=2)
            y, added = attention(q, k, v, layer, is_causal=model.structure.is_causal)
            y = jnp.reshape(y, (*y.shape[:2], -1))
            knobs, range_ = layer.knobs, layer.ranges["out"]
            y = quantize_activation(y, range_, knobs, "out", relaxed)
            outputs.append(y)
            layers.append(counted + added)
        return jnp.stack(outputs), collect(layers)[0]

    outputs, workload = own(run, model.params, expected.trace)
    exists = model.inputs["valid"][None, :, :, None]
    np.testing.assert_allclose(outputs * exists, expected.trace["context"] * exists, atol=1e-5)
    theirs = expected.workload.replace(end_gemms={})
    assert jax.tree.structure(workload) == jax.tree.structure(theirs)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), workload, theirs)


def test_decisions_are_those_of_the_integer_filter() -> None:
    q, k, v = tensors(3)
    run = applied(attention_bits=12.0)
    layer = run.layer(1)
    threshold = jnp.asarray([[-0.2, 0.1], [0.3, 0.0]])
    layer = layer.replace(knobs=layer.knobs | {"threshold": threshold})
    _, counted = run_attention(q, k, v, layer)
    codes = [
        np.swapaxes(quantize_codes(np.asarray(x), 8.0 / (2**11 - 1), 12), 1, 2) for x in (q, k)
    ]
    stored = MECHANISMS["energon"].codes({"threshold": np.asarray(threshold)}, {})["threshold"]
    widths = tiny_model.WIDTHS | {"qk_bits": 12}
    kept = tiny_model.run_filter(*codes, stored, widths=widths).weights
    count = counted.counts.operations["softmax.exp"].count
    np.testing.assert_array_equal(count, np.sum(kept, axis=(2, 3)))
    assert TOKENS * BATCH * HEADS < np.sum(kept) < TOKENS**2 * BATCH * HEADS


def test_rows_without_pairs_and_single_tokens() -> None:
    q, k, v = tensors()
    mask = jnp.ones((1, 1, TOKENS, TOKENS), bool).at[:, :, 3].set(False)

    @compiled
    @functools.partial(jax.grad, has_aux=True)
    def slope(q: jax.Array, layer: LayerPolicy) -> tuple[jax.Array, jax.Array]:
        output, _ = attention(q, k, v, layer, mask=mask)
        return jnp.sum(output), output[:, 3]

    for run in (FLOAT, applied(), applied(straight_through=False)):
        gradient, row = slope(q, run.layer(0))
        assert not np.any(row) and np.all(np.isfinite(gradient)) and np.any(gradient)
    one = tensors(tokens=1)
    # One token attends to itself alone: its value comes back, to half a step of its 16 bit.
    output, counted = run_attention(*one, applied(attention_bits=16.0).layer(0))
    np.testing.assert_allclose(output, one[2], atol=8.0 / 2**15 / 2 + ROUNDING)
    assert counted.counts.operations["softmax.exp"].count.tolist() == [[1.0, 1.0]] * BATCH


def test_linear_by_hand() -> None:
    # 3 bit: codes -3 to 3. Activations: 0.5 * 3 = 1.5 to the even 2, i.e. 2/3; -1 is code -3.
    # Weights, by column: 1 is code 3, 0.5 to 2, i.e. 2/3. Then 2/3 * 1 - 1 * 2/3 + 0.25 = 0.25.
    start = policy_for(calibration(qkv=1.0), HEADS, MECHANISMS["dense"], linear_bits=3.0)
    layer = start.replace(relaxation=tiny_model.relaxation()).layer(0)
    x, kernel = jnp.asarray([[[0.5, -1.0]]]), jnp.asarray([[1.0], [0.5]])
    y, counted = linear(x, kernel, jnp.asarray([0.25]), layer, "qkv")
    np.testing.assert_allclose(y, [[[0.25]]], atol=ROUNDING)
    product = counted.gemms["qkv"]
    assert (product.rows.tolist(), product.inner, product.outer) == ([1.0], 2, 1)
    assert (product.activation_bits.item(), product.weight_bits.item()) == (3.0, 3.0)


def test_rows_of_linear_layers() -> None:
    kernel = jnp.ones((WIDTH, 3))
    valid = jnp.asarray([[1, 1, 1, 0], [1, 0, 0, 0]])
    ends = AppliedPolicy(valid=valid).ends()
    for shape, rows in (((2, 4, WIDTH), [3, 1]), ((2, WIDTH), [1, 1]), ((2, 3, WIDTH), [3, 3])):
        _, counted = linear(jnp.ones(shape), kernel, None, ends, "head")
        assert counted.gemms["head"].rows.tolist() == rows


def test_separate_projections_count_as_one() -> None:
    x = jax.random.normal(jax.random.key(0), (BATCH, TOKENS, WIDTH))
    kernels = jax.random.normal(jax.random.key(1), (3, WIDTH, WIDTH))
    layer = applied().layer(0)
    parts = [run_linear(x, kernel, None, layer, site="qkv") for kernel in kernels]
    together, counted = run_linear(x, jnp.concatenate(kernels, axis=1), None, layer, site="qkv")
    np.testing.assert_allclose(jnp.concatenate([y for y, _ in parts], -1), together, rtol=1e-5)
    summed = sum((part for _, part in parts), start=LayerCounts())
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.array_equal(a, b), summed, counted))
    assert summed.gemms["qkv"].outer == counted.gemms["qkv"].outer == 3 * WIDTH


def test_scan_over_layers_equals_a_loop() -> None:
    (x, kernels), run = inputs(), applied()

    @compiled
    def scanned(run: AppliedPolicy) -> Any:
        def step(x: jax.Array, layer: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, LayerCounts]:
            return one_layer(run.layer(layer[0]), x, layer[1])

        last, counts = jax.lax.scan(step, x, (jnp.arange(LAYERS), kernels))
        y, head = linear(jnp.mean(last, axis=1), kernels[0, :, :3], None, run.ends(), "head")
        return y, collect(counts, head)

    loop = compiled(two_layers)(run, x, kernels)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), scanned(run), loop)
    workload = loop[1][0]
    assert workload.operations["softmax.exp"].count.shape == (BATCH, LAYERS, HEADS)
    assert workload.operations["softmax.exp"].bits_a.shape == (1, LAYERS, 1)
    assert workload.end_gemms["head"].rows.tolist() == [[1.0]] * BATCH
    assert not loop[1][1].layers  # nothing was measured


def test_vmap_over_another_axis() -> None:
    kernels, run = inputs()[1], applied()
    x = jnp.stack([inputs(seed)[0] for seed in (1, 2, 3)])
    mapped = compiled(jax.vmap(lambda x: two_layers(run, x, kernels)[0]))(x)
    single = compiled(lambda x: two_layers(run, x, kernels)[0])
    np.testing.assert_allclose(mapped, jnp.stack([single(part) for part in x]), rtol=1e-5)


def test_gradients_reach_every_knob() -> None:
    x, kernels = inputs()

    @compiled
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def slopes(run: AppliedPolicy, x: jax.Array, kernels: jax.Array) -> jax.Array:
        y, (workload, _) = two_layers(run, x, kernels)
        counts = sum(jnp.mean(op.count * op.bits_a) for op in workload.operations.values())
        widths = sum(jnp.sum(part.weight_bits) for part in workload.block_gemms.values())
        return jnp.sum(jnp.sin(y)) + 1e-3 * (counts + widths)

    gradient, by_x, by_kernels = slopes(applied(linear_bits=4.5, attention_bits=8.5), x, kernels)
    assert np.all(np.isfinite(by_x)) and np.any(by_x) and np.any(by_kernels)
    unused = {
        f"{site}.{kind}"
        for site in ("up", "down", "out")
        for kind in ("weight_bits", "weight_clip", "activation_bits", "activation_clip")
    }
    for name, value in (gradient.policy.layers | gradient.policy.ends).items():
        assert np.all(np.isfinite(value))
        if name not in unused and not name.startswith("embed"):
            assert np.all(np.any(np.reshape(value, (len(np.atleast_1d(value)), -1)), axis=1)), name


def test_relaxed_threshold_gradient_is_that_of_finite_differences() -> None:
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(x, jnp.float64) for x in tensors(4))
        run = applied(straight_through=False)
        layer = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), run.layer(0))

        @compiled
        @jax.value_and_grad
        def kept(threshold: jax.Array) -> jax.Array:
            tried = layer.replace(knobs=layer.knobs | {"threshold": threshold})
            counts = attention(q, k, v, tried)[1].counts
            return jnp.mean(counts.operations["softmax.exp"].count)

        start = jnp.asarray([[-0.3, 0.1], [0.2, -0.1]], jnp.float64)
        # The second round's: its gate's width, held constant, does not depend on them.
        step = jnp.asarray([[0.0, -3e-6], [0.0, 5e-6]], jnp.float64)
        slope = jnp.sum(kept(start)[1] * step)
        difference = (kept(start + step)[0] - kept(start - step)[0]) / 2.0
        assert abs(slope) > 1e-7
        np.testing.assert_allclose(difference, slope, rtol=1e-6)
