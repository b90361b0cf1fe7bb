"""Policies for models of one's own: calibration, start values, a mechanism of one's own, and what is refused."""

import dataclasses
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
    TOKENS,
    WIDTH,
    applied,
    calibration,
    compiled,
    inputs,
    run_attention,
    run_linear,
    tensors,
    two_layers,
)

import codesign
from codesign.applied import AppliedPolicy, policy_for
from codesign.calibration import MIN_RANGE
from codesign.errors import CodesignError, UnknownNameError
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.spec import load_preset
from codesign.hw.surrogate import cost
from codesign.layer_counts import LayerCounts, collect
from codesign.layers import at_site, attention, linear
from codesign.mechanisms import MECHANISMS
from codesign.mechanisms.acceltran import PRUNED_SITES
from codesign.mechanisms.protocol import (
    Context,
    Counts,
    Hooks,
    Mechanism,
    Operands,
    Plan,
    Selection,
    keep_all,
)


def test_calibration_measures_tokens_that_exist() -> None:
    x, kernels = inputs()
    valid = jnp.ones((BATCH, TOKENS)).at[1, 4:].set(0.0)
    loud = x.at[1, 4:].set(100.0)  # padding
    run = AppliedPolicy(valid=valid, calibrating=True)
    _, (_, measured) = compiled(two_layers)(run, loud, kernels)
    assert set(measured.layers) == {"qkv", "query", "key", "value", "scores"}
    assert set(measured.ends) == {"head"}
    exists = np.asarray(valid)[:, :, None] > 0.0
    projected = np.asarray(x @ kernels[0]).reshape(BATCH, TOKENS, 3, HEADS, HEAD_DIM)
    projected = projected * exists[..., None, None]
    scores = np.einsum("bthd,bshd->bhts", projected[:, :, 0], np.asarray(projected[:, :, 1]))
    np.testing.assert_allclose(measured.layers["qkv"][0], np.max(np.abs(x * exists)), rtol=1e-6)
    for index, name in enumerate(("query", "key", "value")):
        largest = np.max(np.abs(projected[:, :, index]))
        np.testing.assert_allclose(measured.layers[name][0], largest, rtol=1e-5)
    assert measured.layers["scores"][0] >= np.max(np.abs(scores)) * (1.0 - 1e-5)
    silent = compiled(two_layers)(AppliedPolicy(calibrating=True), 0.0 * x, kernels)[1][1]
    assert silent.layers["query"].tolist() == pytest.approx([MIN_RANGE] * LAYERS)


def test_start_of_a_policy() -> None:
    start = policy_for(calibration(), HEADS, MECHANISMS["energon"], strength=0.3, linear_bits=6.5)
    policy = start.policy
    assert policy is not None and start.relaxation is None
    # alpha = 2 * 0.3 - 1, stored as tanh v.
    np.testing.assert_allclose(jnp.tanh(policy.layers["threshold"]), -0.4, rtol=1e-5)
    assert policy.layers["threshold"].shape == (LAYERS, HEADS, 2)
    assert policy.layers["up.weight_bits"].tolist() == [6.5] * LAYERS
    assert {name.partition(".")[0] for name in policy.ends} == {"embed", "head"}


def test_cost_of_dense_is_that_of_sixteen_and_eight_bits() -> None:
    x, kernels = inputs()
    machine = accelerator_from_spec(load_preset("energon"))
    at_most_bits = applied("dense", linear_bits=8.0, attention_bits=16.0)

    @compiled
    def energy(run: AppliedPolicy) -> jax.Array:
        workload = two_layers(run, x, kernels)[1][0]
        return cost(workload, machine).energy_pj("end_to_end")

    np.testing.assert_allclose(energy(FLOAT), energy(at_most_bits), rtol=1e-6)
    fewer = energy(applied("dense", linear_bits=4.0, attention_bits=8.0))
    assert np.all(fewer < 0.7 * energy(FLOAT))


def own_filter(
    context: Context, operands: Operands, plan: Plan, carry: Any
) -> tuple[Selection, Counts]:
    """Drops keys whose largest code exceeds half of a range of its own: a user's mechanism."""
    selection, counts = keep_all(context, operands, plan, carry)
    largest, measured = context.calibrated("own_key", jnp.max(jnp.abs(operands.key)))
    is_small = jnp.max(jnp.abs(operands.key), axis=-1) <= 0.5 * largest
    weights = selection.weights * is_small[:, :, None, :]
    return selection.replace(weights=weights), counts + measured


def flip(context: Context, x: jax.Array, plan: Plan, site: str) -> tuple[jax.Array, Counts]:
    """Changes the sign of every tensor, and says so."""
    scale = context.scales.get("residual" if site.endswith("branch") else site, jnp.zeros(()))
    return -x, Counts(densities={site: jnp.reshape(scale, (1,))})


def test_a_mechanism_of_ones_own_with_its_own_range() -> None:
    mechanism = Mechanism(name="mine", summary="a filter", soft=Hooks(filter=own_filter))
    q, k, v = tensors(2)
    layer = applied(mechanism).replace(calibrating=True).layer(0)
    _, counted = run_attention(q, k, v, layer)
    measured = collect([counted] * LAYERS)[1]
    # Code 32767 is the range 8; the other ranges stay as they were.
    largest = np.max(np.abs(k)) / 8.0 * (2**15 - 1)
    np.testing.assert_allclose(measured.layers["own_key"], [largest] * LAYERS, atol=1.0)
    assert measured.layers["query"].tolist() == [8.0] * LAYERS
    run = dataclasses.replace(applied(mechanism), calibration=measured)
    _, counted = run_attention(q, k, v, run.layer(1))
    small = np.max(np.abs(k), axis=-1) <= 0.5 * np.max(np.abs(k))  # [B, T, H]
    kept = counted.counts.operations["softmax.exp"].count
    np.testing.assert_array_equal(kept, TOKENS * np.sum(small, axis=1))
    with pytest.raises(KeyError, match="own_key"):
        run_attention(q, k, v, applied(mechanism).layer(1))


def test_hooks_run_at_every_site() -> None:
    hooks = Hooks(on_activation=flip, on_output=flip)
    mechanism = Mechanism(name="flipping", summary="changes all signs", soft=hooks)
    ranges = calibration().layers | {"gelu": jnp.ones((LAYERS,)), "ffn_branch": jnp.ones((LAYERS,))}
    run = dataclasses.replace(
        applied(mechanism, attention_bits=16.0, linear_bits=8.0),
        calibration=dataclasses.replace(calibration(), layers=ranges),
    )
    layer = run.layer(0)
    q, k, v = tensors()
    output, counted = run_attention(q, k, v, layer)
    expected = jax.nn.dot_product_attention(-q, k, v)  # the scores change theirs too
    np.testing.assert_allclose(output, expected, atol=2e-3)
    densities = dict(counted.counts.densities)
    x = jax.random.normal(jax.random.key(0), (BATCH, TOKENS, WIDTH))
    y, counted = run_linear(x, jnp.eye(WIDTH), None, layer, site="up")
    np.testing.assert_allclose(y, -x, atol=8.0 / 127 / 2)
    densities |= counted.counts.densities
    for site in ("gelu", "ffn_branch"):
        y, counted = at_site(x, layer, site)
        np.testing.assert_array_equal(y, -x)
        densities |= counted.counts.densities
    scales = {name: value.item() for name, value in densities.items()}
    assert scales == pytest.approx(
        {
            **{name: 8.0 / (2**15 - 1) for name in ("query", "key", "value")},
            **{"scores": 0.0, "attention": 0.0, "up": 8.0 / 127.0},
            **{"gelu": 1.0 / 511.0, "ffn_branch": 1.0 / (2**15 - 1)},
        }
    )
    same, counted = at_site(x, applied().layer(0), "gelu")
    assert np.array_equal(same, x) and not counted.counts.densities
    measured = at_site(x, AppliedPolicy(calibrating=True).layer(0), "ffn_branch")[1]
    assert measured.counts.observed == {"ffn_branch": np.max(np.abs(x))}
    with pytest.raises(CodesignError, match="no range of `attention_branch`"):
        at_site(x, layer, "attention_branch")


def test_half_precision_models_keep_their_dtype() -> None:
    q, k, v = (x.astype(jnp.bfloat16) for x in tensors())
    layer = applied().layer(0)
    output, counted = run_attention(q, k, v, layer)
    exact, _ = run_attention(*(x.astype(jnp.float32) for x in (q, k, v)), layer)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_array_equal(output, exact.astype(jnp.bfloat16))
    assert counted.counts.operations["softmax.exp"].count.dtype == jnp.float32
    y, _ = run_linear(q[..., 0, :], jnp.ones((HEAD_DIM, 3)), jnp.ones(3), layer, site="up")
    assert y.dtype == jnp.bfloat16


def test_integers_come_out_as_real_numbers() -> None:
    pixels = jnp.full((BATCH, 4), 7, jnp.uint8)
    kernel = jnp.linspace(0.1, 0.3, 12).reshape(4, 3)
    y, _ = linear(pixels, kernel, None, FLOAT.ends(), "embed")
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, 7.0 * np.sum(kernel, axis=0)[None].repeat(BATCH, 0), rtol=1e-6)


def pruned_block(run: AppliedPolicy, x: jax.Array) -> tuple[jax.Array, LayerCounts]:
    """A block with every call that AccelTran's sites need."""
    layer, keys = run.layer(0), iter(jax.random.split(jax.random.key(3), 4))
    y, counts = linear(x, random_kernel(next(keys), WIDTH, 3 * WIDTH), None, layer, "qkv")
    q, k, v = jnp.moveaxis(jnp.reshape(y, (BATCH, TOKENS, 3, HEADS, -1)), 2, 0)
    for function, arguments in (
        (attention, (q, k, v, layer)),
        (linear, (random_kernel(next(keys), WIDTH, WIDTH), None, layer, "out")),
        (at_site, (layer, "attention_branch")),
        (linear, (random_kernel(next(keys), WIDTH, 2 * WIDTH), None, layer, "up")),
        (at_site, (layer, "gelu")),
        (linear, (random_kernel(next(keys), 2 * WIDTH, WIDTH), None, layer, "down")),
        (at_site, (layer, "ffn_branch")),
    ):
        if function is not attention:
            arguments = (jnp.reshape(y, (BATCH, TOKENS, -1)), *arguments)
        y, added = function(*arguments)
        counts += added
    return y, counts


def random_kernel(key: jax.Array, inputs: int, outputs: int) -> jax.Array:
    return jax.random.normal(key, (inputs, outputs)) / np.sqrt(inputs)


def test_acceltran_prunes_every_site_of_a_model_of_ones_own() -> None:
    x = jax.random.normal(jax.random.key(2), (BATCH, TOKENS, WIDTH))
    _, counted = compiled(pruned_block)(AppliedPolicy(calibrating=True), x)
    measured = collect([counted])[1]
    start = policy_for(measured, HEADS, MECHANISMS["acceltran"], strength=0.7)
    run = start.replace(relaxation=tiny_model.relaxation())

    def loss(policy: codesign.Policy) -> tuple[jax.Array, LayerCounts]:
        y, counts = pruned_block(run.replace(policy=policy), x)
        return jnp.sum(y**2), counts

    slope, counts = compiled(jax.grad(loss, has_aux=True))(run.policy)
    densities = counts.counts.densities
    assert set(PRUNED_SITES) <= densities.keys()
    assert all(0.0 < float(jnp.mean(densities[site])) < 1.0 for site in PRUNED_SITES)
    assert bool(jnp.all(jnp.isfinite(slope.layers["threshold"])))
    assert float(jnp.max(jnp.abs(slope.layers["threshold"]))) > 0.0


def planned(*arguments: Any) -> Any:
    raise AssertionError("must not be called")


Q, K, V = tensors()
X, KERNEL = jnp.ones((BATCH, TOKENS, WIDTH)), jnp.ones((WIDTH, 3))


def without(knob: str) -> AppliedPolicy:
    """A policy of `energon` that lacks a knob."""
    run = applied("energon")
    assert run.policy is not None
    left = {name: value for name, value in run.policy.layers.items() if name != knob}
    return run.replace(policy=run.policy.replace(layers=left))


PLANS = Mechanism(name="early", summary="plans", soft=Hooks(plan=planned))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("[B, T, H, d]", lambda: attention(Q, K[:, :3], V, FLOAT.layer(0))),
        ("`mask` must be [", lambda: attention(Q, K, V, FLOAT.layer(0), mask=jnp.ones((BATCH, 2, 7, 7), bool))),
        ("`mask` must be boolean", lambda: attention(Q, K, V, FLOAT.layer(0), mask=jnp.zeros((1, 1, 7, 7)))),
        ("`valid` must be", lambda: attention(Q, K, V, AppliedPolicy(valid=jnp.ones((BATCH, 3))).layer(0))),
        ("`early` decides before", lambda: attention(Q, K, V, applied(PLANS).layer(0))),
        ("no range of `gelu`", lambda: at_site(X, applied().replace(calibrating=True).layer(0), "gelu")),
        ("linear layer `mlp`", lambda: linear(X, KERNEL, None, FLOAT.layer(0), "mlp")),
        ("takes x [B, T, inputs]", lambda: linear(X[0], KERNEL, None, FLOAT.layer(0), "up")),
        ("no knobs for `up`", lambda: linear(X, KERNEL, None, applied().ends(), "up")),
        ("no knobs for `pool`", lambda: linear(X, KERNEL, None, applied().ends(), "pool")),
        ("no hook runs at `out`", lambda: at_site(X, FLOAT.layer(0), "out")),
        ("layer 2 is not in `policy`, which has 2", lambda: applied().layer(2)),
        ("needs `policy` and `calibration`", lambda: AppliedPolicy(relaxation=tiny_model.relaxation()).ends()),
        ("`calibration` is empty", lambda: policy_for(codesign.Calibration({}, {}), 2, PLANS)),
        ("`strength` must lie", lambda: policy_for(calibration(), 2, PLANS, strength=1.5)),
        ("`mechanism` must be", lambda: policy_for(calibration(), 2, "energon")),
        ("`num_heads` must be", lambda: policy_for(calibration(), 0, PLANS)),
        ("`linear_bits` must lie in [2, 8]", lambda: policy_for(calibration(), 2, PLANS, linear_bits=20.0)),
        ("attention_branch, gelu, ffn_branch too", lambda: policy_for(calibration(), 2, MECHANISMS["acceltran"])),
        ("the policy has no qk_bits", lambda: without("qk_bits").layer(0)),
        ("the policy has no threshold", lambda: without("threshold").layer(0)),
        ("`layers` is empty", lambda: collect([])),
        ("no layer holds an attention", lambda: collect([LayerCounts()])),
    ],
)  # fmt: skip
def test_mistakes_are_named(message: str, call: Any) -> None:
    with pytest.raises(CodesignError) as error:
        call()
    assert message in str(error.value)


def test_mistakes_in_adding_up_are_named() -> None:
    _, one = run_attention(Q, K, V, FLOAT.layer(0))
    with pytest.raises(CodesignError, match="counted twice in one layer"):
        one + one
    _, product = run_linear(X, KERNEL, None, FLOAT.layer(0), site="up")
    _, other = run_linear(X[..., :4], KERNEL[:4], None, FLOAT.layer(0), site="up")
    with pytest.raises(CodesignError, match="inputs of 8 and 4 elements"):
        product + other
    with pytest.raises(CodesignError, match="layer 1 counts something else"):
        collect([one, one + product])
    odd = LayerCounts(Counts(densities={"nowhere": jnp.ones((1,))}), head_dim=4)
    with pytest.raises(UnknownNameError, match="nowhere"):
        collect([odd])


def test_public_names() -> None:
    for name in codesign.__all__:
        assert getattr(codesign, name) is not None
    assert callable(codesign.attention) and callable(codesign.linear)
