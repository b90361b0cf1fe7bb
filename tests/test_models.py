"""The deployed integer path against the emulator, against itself in another batch, and against training's path.

Of every way of building a model: images, padded text, causal text.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import random_deployment
import tiny_model

from codesign.calibration import Calibration
from codesign.hw import emulator
from codesign.mechanisms import MECHANISMS
from codesign.models import deploy
from codesign.models.model import apply, apply_hard
from codesign.models.parameters import init_params
from codesign.models.transformer import ModelOutput
from codesign.policy import Policy
from codesign.references import layer_shapes
from codesign.tables import exp_table, quotient

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
    inputs = {"pixels": pixels}
    wanted = emulator.emulate(deployment.structure, deployment.layers, deployment.ends, inputs)
    got = tensors(output)
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
    policy = tiny_model.shared_policy(
        digits_model.structure, linear_bits=linear_bits, attention_bits=attention_bits
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
            {"pixels": pixels},
            tensors=("scores", "keep", "logits"),
        )
        for name, value in wanted.items():
            assert np.sum(tensors(output)[name] != value) == 0, name
        num_decisions += wanted["keep"].size
        kept += int(wanted["keep"].sum())
    assert num_decisions >= 10_000_000
    assert 0.1 < kept / num_decisions < 0.9


def test_division_of_a_normalisation_is_correctly_rounded() -> None:
    """A compiler may divide by multiplying with a reciprocal, which is off by a unit in the last place."""
    rng = np.random.default_rng(0)
    above = rng.integers(-(10**9), 10**9, (200, 64)).astype(np.float64)
    variance = rng.integers(1, 10**15, (200, 1)).astype(np.float64)
    with jax.enable_x64(True):
        found = jax.jit(lambda a, v: quotient(a, jnp.sqrt(v)))(above, variance)
    np.testing.assert_array_equal(np.asarray(found), above / np.sqrt(variance))


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
    scale = runs[0][0].logit_scale / digits_model.structure.max_tokens
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
        inputs = {"pixels": pixels}
        params = jax.eval_shape(
            lambda key, *, shape=shape: init_params(shape, key=key), jax.random.key(0)
        )
        observed = jax.eval_shape(
            functools.partial(tiny_model.run_float, setup, calibrating=True), params, inputs
        ).observed

        def loss(
            policy: Any, weights: Any, ranges: Any, images: Any, *, setup: Any = setup
        ) -> jax.Array:
            output = apply(
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
            tiny_model.energon_policy(shape), params, observed, inputs
        )
        training.append(num_equations(jaxpr.jaxpr))

        filtering = dataclasses.replace(shape, mechanism="energon", num_rounds=2)
        tables = {
            "exp_table": exp_table().shape,
            "reciprocal_table": deploy.reciprocal_table().shape,
        }
        with jax.enable_x64(True):
            layers, ends = (
                {name: jax.ShapeDtypeStruct(size, np.int64) for name, size in shapes.items()}
                for shapes in (layer_shapes(filtering), filtering.end_shapes() | tables)
            )
            jaxpr = jax.make_jaxpr(
                functools.partial(apply_hard, structure=filtering, mechanism=MECHANISMS["energon"])
            )(layers, ends, inputs)
        deployed.append(num_equations(jaxpr.jaxpr))
    assert training[0] == training[1] > 1000
    assert deployed[0] == deployed[1] > 100


def policy_of(model: tiny_model.Model, mechanism: str) -> Policy:
    """8-bit linear layers, 16-bit attention, the mechanism's own start knobs."""
    policy = tiny_model.shared_policy(model.structure)
    own = MECHANISMS[mechanism].knobs(model.structure.num_layers, model.structure.num_heads)
    return Policy(layers=policy.layers | own, ends=policy.ends)


@pytest.mark.parametrize("variant", random_deployment.VARIANTS)
def test_every_kind_of_model_deploys_as_it_trains(variant: str) -> None:
    model = tiny_model.random_model(variant)
    policy = tiny_model.shared_policy(model.structure)
    deployment, hard = tiny_model.run_hard(model, policy, model.inputs, mechanism="dense")
    soft = tiny_model.run_soft(
        model.params,
        policy,
        model.calibration,
        model.inputs,
        tiny_model.relaxation(),
        setup=model.config,
        mechanism="dense",
    )
    valid = model.inputs.get("valid")
    real, logits = deployment.real_logits(hard.logits, hard.num_pooled), np.asarray(soft.logits)
    if model.structure.pooling == "all":
        real, logits = real[valid], logits[valid]
    # Codes on the other side of a rounding: steps of 1/127; a pooler's table has steps of 1/511 of its range in front.
    assert np.linalg.norm(real - logits) < 0.03 * np.linalg.norm(real)
    centred = real - real.mean(-1, keepdims=True)
    assert np.linalg.norm(real - logits) < 0.1 * np.linalg.norm(centred)


NUM_EARLIER = 5


@pytest.mark.parametrize("path", ["float", "straight-through", "dense", "energon", "acceltran"])
def test_later_tokens_change_nothing_earlier(path: str) -> None:
    model = tiny_model.random_model("decoder")
    valid = np.ones_like(model.inputs["valid"])
    tokens = model.inputs["tokens"]
    later = np.concatenate([tokens[:, :NUM_EARLIER], (tokens[:, NUM_EARLIER:] + 7) % 23], axis=1)
    first, second = (run_on(model, path, {"tokens": t, "valid": valid}) for t in (tokens, later))
    if path == "float":
        # Sums over keys whose probability is 0 may be grouped differently: a few units in the last place.
        np.testing.assert_allclose(first[:, :NUM_EARLIER], second[:, :NUM_EARLIER], rtol=1e-5)
    else:
        np.testing.assert_array_equal(first[:, :NUM_EARLIER], second[:, :NUM_EARLIER])
    assert np.all(np.any(first[:, NUM_EARLIER:] != second[:, NUM_EARLIER:], axis=-1))


def run_on(model: tiny_model.Model, path: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the logits of a path: in floating point, straight-through (energon), or of a mechanism's integers."""
    if path == "float":
        return np.asarray(tiny_model.run_float(model.config, model.params, inputs).logits)
    if path != "straight-through":
        policy = policy_of(model, path)
        return np.asarray(tiny_model.run_hard(model, policy, inputs, mechanism=path)[1].logits)
    soft = tiny_model.run_soft(
        model.params,
        policy_of(model, "energon"),
        model.calibration,
        inputs,
        tiny_model.relaxation(),
        setup=model.config,
    )
    return np.asarray(soft.logits)


@pytest.mark.parametrize(
    ("variant", "mechanism"),
    [
        ("bert", "energon"),
        ("pooler", "dense"),
        ("decoder", "energon"),
        ("decoder", "acceltran"),
    ],
)
def test_padding_changes_no_integer(variant: str, mechanism: str) -> None:
    """An example alone, without padding, and in a batch of longer ones; the last of them has one token."""
    model = tiny_model.random_model(variant)
    policy = policy_of(model, mechanism)
    deployment, padded = tiny_model.run_hard(model, policy, model.inputs, mechanism=mechanism)
    batch_axis = {"embedded": 0, "logits": 0, "scores": 2, "keep": 2}
    lengths = model.inputs["valid"].sum(axis=1)
    assert lengths[-1] == 1
    for index in (3, len(lengths) - 1):
        inputs = {
            name: value[index : index + 1, : lengths[index]] for name, value in model.inputs.items()
        }
        alone = tiny_model.run_hard(model, policy, inputs, mechanism=mechanism)[1]
        assert alone.trace.keys() == padded.trace.keys()
        for name, value in tensors(alone).items():
            whole = np.take(tensors(padded)[name], [index], batch_axis.get(name, 1))
            cut = whole[tuple(slice(size) for size in value.shape)]
            np.testing.assert_array_equal(cut, value, err_msg=f"{name} of example {index}")
        for name, counted in alone.workload.operations.items():
            in_batch, own = padded.workload.operations[name].count[index], counted.count[0]
            np.testing.assert_array_equal(in_batch, own, err_msg=name)
    # One token attends to itself alone; the table of reciprocals is right to a code of 16 bits.
    if mechanism != "acceltran":
        np.testing.assert_allclose(alone.trace["probabilities"], 2**15 - 1, atol=1)
    if mechanism == "energon":
        assert np.all(alone.trace["keep"])
    real = deployment.real_logits(alone.logits, alone.num_pooled)
    assert np.all(np.isfinite(real)) and np.ptp(real) > 0.0


@pytest.mark.parametrize("variant", ["bert", "pooler", "decoder"])
def test_padding_changes_no_float(variant: str) -> None:
    model = tiny_model.random_model(variant)
    padded = np.asarray(tiny_model.run_float(model.config, model.params, model.inputs).logits)
    lengths = model.inputs["valid"].sum(axis=1)
    for index in (3, len(lengths) - 1):
        inputs = {
            name: value[index : index + 1, : lengths[index]] for name, value in model.inputs.items()
        }
        alone = np.asarray(tiny_model.run_float(model.config, model.params, inputs).logits)
        cut = padded[index : index + 1][tuple(slice(size) for size in alone.shape)]
        np.testing.assert_allclose(cut, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "mechanism", "straight_through"),
    [
        pytest.param("pooler", "energon", True, marks=pytest.mark.slow),
        pytest.param("decoder", "energon", True, marks=pytest.mark.slow),
        ("decoder", "energon", False),
        pytest.param("decoder", "acceltran", True, marks=pytest.mark.slow),
    ],
)
def test_rows_without_any_key_make_no_nan(
    variant: str, mechanism: str, straight_through: bool
) -> None:
    """An example without a token has no key in any row; its outputs do not matter, its gradients must not spread."""
    model = tiny_model.random_model(variant)
    valid = model.inputs["valid"].copy()
    valid[3] = False
    inputs = model.inputs | {"valid": valid}
    policy = policy_of(model, mechanism)
    counted = jnp.asarray(valid.any(axis=1), jnp.float32)

    @functools.partial(jax.jit, compiler_options=tiny_model.FAST_COMPILE)
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def slope(params: Any, policy: Policy) -> tuple[jax.Array, jax.Array]:
        output = apply(
            params,
            policy,
            model.calibration,
            inputs,
            config=model.config,
            mechanism=MECHANISMS[mechanism],
            relaxation=tiny_model.relaxation(straight_through=straight_through),
        )
        values = jnp.reshape(output.logits, (len(valid), -1))
        return jnp.sum(jnp.square(values) * counted[:, None]), output.logits

    # Moderate logits: the gradient of a key dropped far below its score grows with the exponential of the distance.
    params = jax.tree.map(lambda leaf: leaf / 3.0, model.params)
    gradients, logits = slope(params, policy)
    assert np.all(np.isfinite(logits))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)
    assert np.any(gradients[0]["blocks"]["qkv"]["kernel"] != 0.0)
    hard = tiny_model.run_hard(model, policy, inputs, mechanism=mechanism)[1]
    whole = tiny_model.run_hard(model, policy, model.inputs, mechanism=mechanism)[1]
    others = np.flatnonzero(valid.any(axis=1))
    np.testing.assert_array_equal(hard.logits[others], whole.logits[others])
    for counted_operation in hard.workload.operations.values():
        np.testing.assert_array_equal(counted_operation.count[3], 0.0)


@pytest.mark.parametrize("variant", ["prefix", "decoder"])
def test_other_values_compile_nothing_again(variant: str) -> None:
    model = tiny_model.random_model(variant)

    traced = []

    @functools.partial(jax.jit, compiler_options=tiny_model.FAST_COMPILE)
    def soft(params: Any, policy: Policy, ranges: Calibration, inputs: Any, heat: Any) -> Any:
        output = apply(
            params,
            policy,
            ranges,
            inputs,
            config=model.config,
            mechanism=MECHANISMS["energon"],
            relaxation=tiny_model.relaxation(heat),
        )
        traced.append("soft")
        return output.logits

    filtering = dataclasses.replace(model.structure, mechanism="energon", num_rounds=2)

    @functools.partial(jax.jit, compiler_options=tiny_model.FAST_COMPILE)
    def hard(layers: Any, ends: Any, inputs: Any) -> Any:
        traced.append("hard")
        return apply_hard(
            layers, ends, inputs, structure=filtering, mechanism=MECHANISMS["energon"]
        ).logits

    results = []
    for seed in range(2):
        policy = tiny_model.random_policy(model.structure, num_rounds=2, seed=seed)
        params = jax.tree.map(lambda leaf, seed=seed: leaf * (1.0 + 0.1 * seed), model.params)
        ranges = jax.tree.map(lambda leaf, seed=seed: leaf * (1.0 + 0.1 * seed), model.calibration)
        inputs = random_deployment.random_inputs(model.structure, seed=seed)
        heat = jnp.asarray(0.5 - 0.1 * seed)
        found = [np.asarray(soft(params, policy, ranges, tiny_model.as_inputs(inputs), heat))]
        deployed = deploy.harden(params, policy, ranges, model.config, MECHANISMS["energon"])
        with jax.enable_x64(True):
            found.append(np.asarray(hard(*deployed.hard_arrays(), inputs)))
        results.append(found)
    assert traced == ["soft", "hard"]
    for first, second in zip(*results, strict=True):
        assert np.any(first != second)
