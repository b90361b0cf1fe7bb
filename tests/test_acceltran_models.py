"""DynaTran on whole models: the integer path against the emulator, training's decisions against it, and gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.spec import load_preset
from codesign.hw.surrogate import cost
from codesign.mechanisms import MECHANISMS
from codesign.mechanisms.acceltran import (
    from_setting,
    from_strength,
    weight_quantile,
    with_weight_threshold,
)
from codesign.models import model as models
from codesign.models.transformer import TENSORS, ModelOutput
from codesign.policy import Policy
from codesign.references.acceltran import PRUNED_SITES

VARIANTS = pytest.mark.parametrize("variant", ["patches", "bert", "decoder"])
SCALE = MECHANISMS["acceltran"].thresholds


def policy_of(model: tiny_model.Model, *, seed: int | None, attention_bits: float = 10.0) -> Policy:
    """Thresholds of random shares of each range, or off."""
    shape = model.structure
    policy = tiny_model.shared_policy(shape, attention_bits=attention_bits)
    if seed is None:
        variable = from_setting((0.0, 0.0), (shape.num_layers, 9), model.calibration.layers)
    else:
        strength = np.random.default_rng(seed).uniform(0.4, 0.8, (shape.num_layers, 9))
        variable = from_strength(strength, model.calibration.layers)
    own = {"threshold": jnp.asarray(variable, jnp.float32)}
    return Policy(layers=policy.layers | own, ends=policy.ends)


def tensors(output: ModelOutput) -> dict[str, np.ndarray]:
    return {**output.trace, "logits": output.logits}


def run_hard(model: tiny_model.Model, policy: Policy, inputs: Any) -> tuple[Any, ModelOutput]:
    return tiny_model.run_hard(model, policy, inputs, mechanism="acceltran")


def exists(site: str, model: tiny_model.Model) -> np.ndarray:
    """Elements of a site that exist, broadcast against its tensor `[L, B, ...]`."""
    tokens = model.structure.max_tokens
    valid = np.asarray(model.inputs.get("valid", np.ones((8, tokens), bool)))
    if site in ("scores", "probabilities"):
        pairs = valid[:, None, :, None] & valid[:, None, None, :]
        return (np.tril(pairs) if model.structure.is_causal else pairs)[None]
    if site in ("query", "key", "value"):
        return valid[None, :, None, :, None]
    return valid[None, :, :, None]


@VARIANTS
def test_integer_path_equals_the_emulator_and_counts_its_zeros(variant: str) -> None:
    model = tiny_model.random_model(variant)
    policies = [policy_of(model, seed=seed, attention_bits=8.0 + 4 * seed) for seed in range(3)]
    for policy in (*policies, with_weight_threshold(policies[0], [0.05, 0.4])):
        deployment, output = run_hard(model, policy, model.inputs)
        got = tiny_model.emulated(model, deployment, output)
        for site in (*PRUNED_SITES, "down"):
            tensor = got[TENSORS.get(site, site)]
            mask = np.broadcast_to(exists(site, model), tensor.shape)
            axes = tuple(range(2, tensor.ndim))
            density = np.sum((tensor != 0) & mask, axis=axes) / np.sum(mask, axis=axes)
            np.testing.assert_allclose(output.workload.densities[site], density.T, rtol=1e-12)
        # All pairs count as multiplied; the machine skips zeros by the densities.
        count = output.workload.operations["qk.mac"].count
        assert np.all(count == output.workload.operations["pv.mac"].count)
    pruned = output.workload.densities["up.weight"][0]
    assert 0.2 < pruned[1] < pruned[0] < 0.99


@VARIANTS
def test_straight_through_decides_as_the_integer_path(variant: str) -> None:
    model = tiny_model.random_model(variant)
    policy = with_weight_threshold(policy_of(model, seed=7), 0.1)
    _, hard = run_hard(model, policy, model.inputs)
    soft = tiny_model.run_soft(
        model.params,
        policy,
        model.calibration,
        model.inputs,
        tiny_model.relaxation(),
        setup=model.config,
        mechanism="acceltran",
    )
    for site in PRUNED_SITES:
        name = TENSORS.get(site, site)
        mask = np.broadcast_to(exists(site, model), hard.trace[name].shape)
        agree = (np.asarray(soft.trace[name]) != 0) == (hard.trace[name] != 0)
        # Float32 rounds a code the other way now and then, and every layer adds to it.
        assert np.mean(agree[mask]) > 0.985, site
        kept = np.mean((hard.trace[name] != 0)[mask])
        assert 0.02 < kept < 0.999, site
    for key, left in hard.workload.densities.items():
        other = soft.workload.densities[key]
        # Weights see no activations: equal to the last bit of float32.
        tolerance = 1e-6 if key.endswith("weight") else 0.05
        np.testing.assert_allclose(other, left, atol=tolerance, err_msg=key)
    assert hard.workload.densities.keys() == soft.workload.densities.keys()
    assert SCALE is not None
    kept = SCALE.kept(hard.workload)
    assert kept.shape == (2, 9)
    np.testing.assert_allclose(kept[:, 7], np.mean(hard.workload.densities["gelu"], axis=0))


def test_thresholds_of_zero_are_dense_and_full_ones_leave_the_residual_stream() -> None:
    model = tiny_model.random_model("decoder")
    off = with_weight_threshold(policy_of(model, seed=None), 1e-12)
    deployment, pruned = run_hard(model, off, model.inputs)
    assert not np.any(deployment.layers["threshold"])
    _, dense = tiny_model.run_hard(model, off, model.inputs, mechanism="dense")
    for name, value in tensors(dense).items():
        np.testing.assert_array_equal(tensors(pruned)[name], value, err_msg=name)
    all_of_it = {"threshold": jnp.full((2, 9), 1e4)}
    full = Policy(layers=off.layers | all_of_it, ends=off.ends)
    _, output = run_hard(model, full, model.inputs)
    for site in PRUNED_SITES:
        assert not np.any(output.trace[TENSORS.get(site, site)]), site
    for layer in range(2):
        np.testing.assert_array_equal(output.trace["residual"][layer], output.trace["embedded"])


def test_a_sequence_gives_the_same_integers_alone_and_in_a_padded_batch() -> None:
    model = tiny_model.random_model("bert")
    policy = policy_of(model, seed=8)
    _, batch = run_hard(model, policy, model.inputs)
    place, length = 3, int(np.sum(model.inputs["valid"][3]))
    assert 1 < length < model.structure.max_tokens
    alone_inputs = {name: value[place : place + 1, :length] for name, value in model.inputs.items()}
    _, alone = run_hard(model, policy, alone_inputs)
    np.testing.assert_array_equal(alone.logits[0], batch.logits[place])
    for name in ("residual", "attended", "attention_branch", "ffn_branch", "gelu", "context"):
        rows = batch.trace[name][:, place, :length]
        np.testing.assert_array_equal(alone.trace[name][:, 0], rows, err_msg=name)
    for site in PRUNED_SITES:
        own, other = (run.workload.densities[site] for run in (alone, batch))
        np.testing.assert_allclose(own[0], other[place], rtol=1e-12)


@functools.cache
def gradients() -> tuple[Policy, Policy, Policy]:
    """Slopes of the decoder's output, of the density of `down`, and of that of `gelu`, to the policy."""
    model = tiny_model.random_model("decoder")
    policy = with_weight_threshold(policy_of(model, seed=9), 0.1)

    def terms(policy: Policy) -> jax.Array:
        output = models.apply(
            model.params,
            policy,
            model.calibration,
            tiny_model.as_inputs(model.inputs),
            config=model.config,
            mechanism=MECHANISMS["acceltran"],
            relaxation=tiny_model.relaxation(),
        )
        densities = output.workload.densities
        # The last layer's, which no later layer changes.
        left = (jnp.sum(densities[site][:, 1]) for site in ("down", "gelu"))
        # The first token attends to itself alone: no query or key matters to it.
        return jnp.stack([jnp.sum(output.logits[:, 1:]), *left])

    slopes = jax.jit(jax.jacrev(terms), compiler_options=tiny_model.FAST_COMPILE)(policy)
    first, second, third = (
        jax.tree.map(lambda leaf, index=index: leaf[index], slopes) for index in range(3)
    )
    return first, second, third


def test_every_threshold_has_a_gradient() -> None:
    task = gradients()[0].layers
    for name in ("threshold", "weight_threshold"):
        assert np.all(np.isfinite(task[name]))
        assert np.all(np.abs(task[name]) > 1e-12), name


def test_zeros_that_enter_the_second_dense_layer_are_those_of_the_first() -> None:
    _, down, gelu = gradients()
    assert np.all(gelu.layers["threshold"][1, PRUNED_SITES.index("gelu")] < 0)
    np.testing.assert_allclose(down.layers["threshold"], gelu.layers["threshold"], rtol=1e-6)


def test_helpers_of_weight_thresholds() -> None:
    model = tiny_model.random_model("decoder")
    policy = policy_of(model, seed=None)
    started = with_weight_threshold(policy).layers["weight_threshold"]
    np.testing.assert_allclose(np.logaddexp(0.0, started), [0.025, 0.025], rtol=1e-5)
    quantile = weight_quantile(model.params["blocks"])
    for layer in range(2):
        sizes = [
            np.abs(site["kernel"][layer]).ravel()
            for site in model.params["blocks"].values()
            if "kernel" in site
        ]
        assert abs(np.mean(np.concatenate(sizes) <= quantile[layer]) - 0.1) < 0.001
    per_layer = with_weight_threshold(policy, quantile).layers["weight_threshold"]
    np.testing.assert_allclose(np.logaddexp(0.0, per_layer), quantile, rtol=1e-5)


@pytest.mark.slow
def test_energy_derivative_to_widths_knows_of_the_zeros_they_leave() -> None:
    """One bit more or less, everywhere: the straight-through derivative lies between the two differences, or near."""
    model = tiny_model.random_model("bert")
    policy = policy_of(model, seed=None)
    layers = {
        name: jnp.full_like(value, 3.0 if "weight" in name else 5.0)
        if name.endswith((".weight_bits", ".activation_bits"))
        else value
        for name, value in policy.layers.items()
    }
    machine = accelerator_from_spec(load_preset("acceltran-edge"))

    def logarithm(change: dict[str, jax.Array]) -> jax.Array:
        moved = {k: v + change.get(k.rpartition(".")[2], 0.0) for k, v in layers.items()}
        output = models.apply(
            model.params,
            Policy(layers=moved, ends=policy.ends),
            model.calibration,
            tiny_model.as_inputs(model.inputs),
            config=model.config,
            mechanism=MECHANISMS["acceltran"],
            relaxation=tiny_model.relaxation(),
        )
        price = cost(output.workload, machine, smoothness=8.0)
        return jnp.log(jnp.mean(price.energy_pj("end_to_end")))

    both = jax.jit(jax.value_and_grad(logarithm), compiler_options=tiny_model.FAST_COMPILE)
    nothing = dict.fromkeys(("weight_bits", "activation_bits"), jnp.zeros(()))
    here, slopes = both(nothing)
    for kind, slope in slopes.items():
        more, less = (both(nothing | {kind: jnp.asarray(x, float)})[0] for x in (1.0, -1.0))
        assert 0.0 < more - here < here - less, kind
        assert 0.9 * (more - here) < slope < 1.25 * (here - less), kind
