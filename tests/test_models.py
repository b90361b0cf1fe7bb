"""The deployed integer path against the emulator, against itself in another batch, and against training's path."""

import dataclasses
import functools
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from codesign.calibration import Calibration
from codesign.hw import emulator
from codesign.mechanisms import MECHANISMS
from codesign.models import vit
from codesign.models.parameters import init_params
from codesign.models.transformer import ModelOutput

# All tests but one share it, so that each path compiles once.
BATCH = 16
# Published structure of the digits experiment: 64 tokens.
DIGITS_SHAPE = {
    "num_layers": 3,
    "num_heads": 4,
    "head_dim": 16,
    "width": 64,
    "hidden": 128,
    "patch_size": 3,
    "stride": 1,
    "padding": 1,
}


def tensors(output: ModelOutput) -> dict[str, np.ndarray]:
    return {**output.trace, "logits": np.asarray(output.logits)}


def num_differences(
    model: tiny_model.Model, policy: Any, pixels: np.ndarray, mechanism: str = "energon"
) -> dict[str, int]:
    """Elements in which the integer path and the emulator differ, by tensor."""
    deployment, output = tiny_model.run_hard(model, policy, pixels, mechanism=mechanism)
    wanted = emulator.emulate(deployment.structure, deployment.layers, deployment.ends, pixels)
    got = tensors(output)
    if mechanism == "dense":
        wanted = {name: value for name, value in wanted.items() if value.size}
    assert got.keys() == wanted.keys()
    assert all(got[name].shape == value.shape for name, value in wanted.items())
    return {name: int(np.sum(got[name] != value)) for name, value in wanted.items()}


@pytest.mark.smoke
@pytest.mark.parametrize("num_rounds", [1, 2, 3])
def test_integer_path_equals_the_emulator(digits_model: tiny_model.Model, num_rounds: int) -> None:
    for seed in range(4):
        policy = tiny_model.random_policy(
            digits_model.structure, num_rounds=num_rounds, seed=10 * num_rounds + seed
        )
        differences = num_differences(digits_model, policy, digits_model.pixels[:BATCH])
        assert not any(differences.values()), differences


@pytest.mark.parametrize(("linear_bits", "attention_bits"), [(2.0, 8.0), (8.0, 16.0)])
def test_dense_integer_path_equals_the_emulator(
    digits_model: tiny_model.Model, linear_bits: float, attention_bits: float
) -> None:
    policy = tiny_model.dense_knobs(
        digits_model.structure.num_layers, linear_bits=linear_bits, attention_bits=attention_bits
    )
    differences = num_differences(digits_model, policy, digits_model.pixels[:BATCH], "dense")
    assert not any(differences.values()), differences


@pytest.mark.slow
def test_ten_million_decisions_equal_the_emulator() -> None:
    model = tiny_model.trained(tiny_model.structure(**DIGITS_SHAPE))
    policy = tiny_model.random_policy(model.structure, num_rounds=2, seed=0)
    num_decisions = kept = 0
    for start in range(0, 112, BATCH):
        pixels = model.pixels[start : start + BATCH]
        deployment, output = tiny_model.run_hard(model, policy, pixels)
        wanted = emulator.emulate(
            deployment.structure,
            deployment.layers,
            deployment.ends,
            pixels,
            tensors=("scores", "keep", "logits"),
        )
        for name, value in wanted.items():
            assert np.sum(tensors(output)[name] != value) == 0, name
        num_decisions += wanted["keep"].size
        kept += int(wanted["keep"].sum())
    assert num_decisions >= 10_000_000
    assert 0.1 < kept / num_decisions < 0.9


def test_an_image_gives_the_same_integers_in_any_batch(digits_model: tiny_model.Model) -> None:
    policy = tiny_model.random_policy(digits_model.structure, num_rounds=2, seed=5)
    pixels = digits_model.pixels[:BATCH]
    order = np.random.default_rng(0).permutation(BATCH)
    _, whole = tiny_model.run_hard(digits_model, policy, pixels)
    _, shuffled = tiny_model.run_hard(digits_model, policy, pixels[order])
    _, alone = tiny_model.run_hard(digits_model, policy, pixels[3:4])
    place = int(np.flatnonzero(order == 3)[0])
    batch_axis = {"embedded": 0, "logits": 0, "scores": 2, "keep": 2}
    for name, value in tensors(whole).items():
        axis = batch_axis.get(name, 1)
        np.testing.assert_array_equal(
            np.take(value, order, axis), tensors(shuffled)[name], err_msg=name
        )
        np.testing.assert_array_equal(
            np.take(tensors(shuffled)[name], [place], axis), tensors(alone)[name], err_msg=name
        )


def test_all_rounds_off_is_dense_bit_for_bit(digits_model: tiny_model.Model) -> None:
    policy = tiny_model.energon_policy(digits_model.structure, threshold=tiny_model.OFF)
    pixels = digits_model.pixels[:BATCH]
    deployment, filtered = tiny_model.run_hard(digits_model, policy, pixels)
    _, dense = tiny_model.run_hard(digits_model, policy, pixels, mechanism="dense")
    assert np.all(deployment.layers["threshold"] == -128) and np.all(filtered.trace["keep"])
    for name, value in tensors(dense).items():
        np.testing.assert_array_equal(tensors(filtered)[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("mechanism", "threshold", "tolerance"),
    # Where a code lands on the other side of a rounding, 8 bits are off by a step of 1/127; a score
    # that crosses its threshold adds or drops a whole key.
    [("dense", 0.0, 0.03), ("energon", tiny_model.OFF, 0.03), ("energon", 0.0, 0.06)],
)
def test_straight_through_forward_is_close_to_the_integer_path(
    digits_model: tiny_model.Model, mechanism: str, threshold: float, tolerance: float
) -> None:
    policy = tiny_model.energon_policy(digits_model.structure, threshold=threshold)
    pixels = digits_model.pixels[: 4 * BATCH]
    runs = [
        tiny_model.run_hard(
            digits_model, policy, pixels[start : start + BATCH], mechanism=mechanism
        )
        for start in range(0, 4 * BATCH, BATCH)
    ]
    soft = tiny_model.run_soft(
        digits_model.params,
        policy,
        digits_model.calibration,
        pixels,
        tiny_model.relaxation(),
        setup=digits_model.config,
        mechanism=mechanism,
    )
    scale = runs[0][0].logit_scale / digits_model.structure.num_tokens
    real = np.concatenate([output.logits for _, output in runs]) * scale
    logits = np.asarray(soft.logits)
    assert np.linalg.norm(real - logits) < tolerance * np.linalg.norm(real)
    assert np.mean(np.argmax(real, -1) == np.argmax(logits, -1)) > 0.96
    if mechanism == "energon":
        keep = np.concatenate([output.trace["keep"] for _, output in runs], axis=2)
        assert np.mean(np.asarray(soft.trace["keep"]) == keep) > 0.98


def test_equal_codes_give_equal_decisions(digits_model: tiny_model.Model) -> None:
    policy = tiny_model.random_policy(digits_model.structure, num_rounds=2, seed=2)
    deployment, hard = tiny_model.run_hard(digits_model, policy, digits_model.pixels[:BATCH])
    for layer in range(digits_model.structure.num_layers):
        selection = tiny_model.run_filter(
            hard.trace["query"][layer],
            hard.trace["key"][layer],
            np.asarray(policy.layers["threshold"][layer]),
            widths={
                name: deployment.layers[name][layer]
                for name in ("qk_bits", "v_bits", "query_bits", "key_bits")
            },
            soft=tiny_model.relaxation(),
        )
        np.testing.assert_array_equal(selection.trace["scores"], hard.trace["scores"][layer])
        np.testing.assert_array_equal(selection.trace["keep"], hard.trace["keep"][layer])


def test_trained_accuracy_survives_the_deployment(digits_model: tiny_model.Model) -> None:
    policy = tiny_model.energon_policy(digits_model.structure, threshold=-0.3)
    pixels, labels = digits_model.pixels[:320], digits_model.labels[:320]
    logits = tiny_model.run_float(digits_model.config, digits_model.params, pixels).logits
    right = [
        np.argmax(tiny_model.run_hard(digits_model, policy, images)[1].logits, -1) == targets
        for images, targets in zip(
            np.split(pixels, 320 // BATCH), np.split(labels, 320 // BATCH), strict=True
        )
    ]
    accuracy = np.mean(np.argmax(np.asarray(logits), -1) == labels)
    assert accuracy > 0.88 and np.mean(right) > accuracy - 0.04


def num_equations(jaxpr: Any) -> int:
    """Equations of a jaxpr, those of the jaxprs inside included."""
    return sum(
        1 + sum(num_equations(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
        for equation in jaxpr.eqns
    )


def test_the_program_does_not_grow_with_depth() -> None:
    training, deployed = [], []
    for num_layers in (6, 12):
        shape = tiny_model.structure(num_layers=num_layers)
        setup = tiny_model.config(shape)
        pixels = jax.ShapeDtypeStruct((1, 8, 8), np.int32)
        params = jax.eval_shape(
            lambda key, *, shape=shape: init_params(shape, key=key), jax.random.key(0)
        )
        observed = jax.eval_shape(
            functools.partial(tiny_model.run_float, setup), params, pixels
        ).observed

        def loss(
            policy: Any, weights: Any, ranges: Any, images: Any, *, setup: Any = setup
        ) -> jax.Array:
            output = vit.apply(
                weights,
                policy,
                Calibration(layers=ranges["layers"], ends=ranges["ends"]),
                images,
                config=setup,
                mechanism=MECHANISMS["energon"],
                relaxation=tiny_model.relaxation(),
            )
            return jnp.sum(output.logits)

        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(
            tiny_model.energon_policy(shape), params, observed, pixels
        )
        training.append(num_equations(jaxpr.jaxpr))

        filtering = dataclasses.replace(shape, mechanism="energon", num_rounds=2)
        tables = {"exp_table": (1024,), "reciprocal_table": (4096,)}
        with jax.enable_x64(True):
            layers, ends = (
                {name: jax.ShapeDtypeStruct(size, np.int64) for name, size in shapes.items()}
                for shapes in (filtering.layer_shapes(), filtering.end_shapes() | tables)
            )
            jaxpr = jax.make_jaxpr(
                functools.partial(
                    vit.apply_hard, structure=filtering, mechanism=MECHANISMS["energon"]
                )
            )(layers, ends, pixels)
        deployed.append(num_equations(jaxpr.jaxpr))
    assert training[0] == training[1] > 1000
    assert deployed[0] == deployed[1] > 100
