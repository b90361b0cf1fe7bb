"""Baselines on whole models: integer path and emulator, training path, dense limit, simulator, gradients."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import existing, tensors

from codesign.experiments.exporting import gemm_shapes, trace_of
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.simulator import simulate
from codesign.hw.spec import load_preset
from codesign.hw.surrogate import SCOPES, cost
from codesign.mechanisms import MECHANISMS, dense_beside
from codesign.policy import Policy
from codesign.references import reference_by_name
from codesign.workload import attention_macs

BASELINES = ("topk", "bitserial", "sanger", "a3", "spatten", "fact")
BASELINE = pytest.mark.parametrize("name", BASELINES)
SOFT_VARIANTS = pytest.mark.parametrize("variant", ["patches", "decoder"])
"""Without padding and with it, all pairs and causal ones: what soft paths tell apart, at two thirds of the compilation."""
SPREAD: dict[str, tuple[Any, Any]] = {
    "topk": (0.3, 0.8),
    "bitserial": (0.75, 0.97),
    "sanger": (0.7, 0.95),
    "a3": (0.7, 0.97),
    "fact": ([0.2, 0.85, 0.22], [0.6, 0.97, 0.28]),
    "spatten": ([0.1, 0.3, 0.2, 0.02], [0.3, 0.5, 0.6, 0.2]),
}
"""Strengths between which random policies drop some pairs of a random model and keep some."""

FRACTIONAL = {"bitserial": {"plane_bits": 9.4}, "a3": {"search_bits": 3.4}}
"""Widths of a mechanism's own at which each has a derivative: no more planes than bits, say."""


def ranges_of(model: tiny_model.Model) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in model.calibration.layers.items()}


def model_of(variant: str, name: str) -> tiny_model.Model:
    """A random model with the ranges that the mechanism wants."""
    model = tiny_model.random_model(variant)
    return tiny_model.with_own_ranges(model, name) if MECHANISMS[name].own_ranges else model


def random_policy(
    model: tiny_model.Model, name: str, *, seed: int, bits: float = 12.0, **own: float
) -> Policy:
    """Random thresholds; every other knob where it starts, or at the value of `own`."""
    shape, scale = model.structure, MECHANISMS[name].thresholds
    assert scale is not None
    knobs = MECHANISMS[name].knobs(shape.num_layers, shape.num_heads)
    strength = np.random.default_rng(seed).uniform(*SPREAD[name], knobs["threshold"].shape)
    knobs["threshold"] = jnp.asarray(scale.from_strength(strength, ranges_of(model)))
    knobs |= {key: jnp.full_like(knobs[key], value) for key, value in own.items()}
    return tiny_model.with_knobs(model, knobs, attention_bits=bits)


def run_hard(model: tiny_model.Model, policy: Policy, name: str) -> tuple[Any, Any]:
    return tiny_model.run_hard(model, policy, model.inputs, mechanism=name)


@BASELINE
def test_integer_path_equals_the_emulator(name: str) -> None:
    """On a decoder as it trains; on random integers of every kind of model: test_bit_exact."""
    model = model_of("decoder", name)
    _, pairs = existing(model)
    deployment, output = run_hard(model, random_policy(model, name, seed=0, bits=16.0), name)
    found = tiny_model.emulated(model, deployment, output)
    assert set(reference_by_name(name).decision_tensors) <= set(found)
    last = found["used"] if "used" in found else found["keep"][:, -1]
    keep = last & pairs[None, :, None]
    share = np.sum(keep) / (np.sum(pairs) * keep.shape[0] * keep.shape[2])
    assert 0.1 < share < 0.9


@SOFT_VARIANTS
@BASELINE
def test_straight_through_decides_as_the_integer_path(name: str, variant: str) -> None:
    model = model_of(variant, name)
    _, pairs = existing(model)
    policy = random_policy(model, name, seed=3)
    hard = run_hard(model, policy, name)[1]
    soft = tiny_model.run_soft(
        model.params,
        policy,
        model.calibration,
        model.inputs,
        tiny_model.relaxation(),
        setup=model.config,
        mechanism=name,
    )
    mask = np.broadcast_to(pairs[None, None, :, None], hard.trace["keep"].shape)
    agree = np.asarray(soft.trace["keep"]) == hard.trace["keep"]
    # Float32 rounds a code the other way now and then, and every layer adds to it.
    assert np.mean(agree[mask]) > 0.99
    assert soft.workload.operations.keys() == hard.workload.operations.keys()
    for key, operation in hard.workload.operations.items():
        other = soft.workload.operations[key]
        np.testing.assert_allclose(
            np.sum(other.count), np.sum(operation.count), rtol=0.01, err_msg=key
        )
        np.testing.assert_allclose(other.bits_a, operation.bits_a, err_msg=key)
        np.testing.assert_allclose(other.bits_b, operation.bits_b, err_msg=key)


@BASELINE
def test_nothing_dropped_is_dense_attention_bit_for_bit(name: str) -> None:
    model = model_of("decoder", name)
    shape, mechanism = model.structure, MECHANISMS[name]
    scale = mechanism.thresholds
    assert scale is not None
    knobs = mechanism.knobs(shape.num_layers, shape.num_heads)
    knobs["threshold"] = jnp.asarray(
        scale.from_setting(scale.settings[0], knobs["threshold"].shape, ranges_of(model))
    )
    policy = tiny_model.with_knobs(model, knobs)
    _, whole = run_hard(model, policy, name)
    _, dense = run_hard(model, policy, "dense")
    for key, value in tensors(dense).items():
        np.testing.assert_array_equal(tensors(whole)[key], value, err_msg=key)
    np.testing.assert_array_equal(scale.kept(whole.workload), 1.0)


@BASELINE
def test_multiplications_without_the_mechanism_are_those_of_dense_attention(name: str) -> None:
    model = model_of("patches", name)
    policy = random_policy(model, name, seed=0)
    _, beside = tiny_model.run_hard(
        model, policy, model.inputs, mechanism=dense_beside(MECHANISMS[name])
    )
    _, dense = run_hard(model, policy, "dense")
    np.testing.assert_allclose(attention_macs(beside.workload), attention_macs(dense.workload))
    _, sparse = run_hard(model, policy, name)
    assert np.all(attention_macs(sparse.workload) < attention_macs(dense.workload))


@BASELINE
def test_every_knob_has_a_gradient(name: str) -> None:
    model = model_of("decoder", name)
    policy = random_policy(model, name, seed=6, bits=11.4, **FRACTIONAL.get(name, {}))
    slopes = tiny_model.knob_slopes(model, policy, name)
    own = MECHANISMS[name].knobs(1, 1)
    for knob in (*own, "qk_bits", "v_bits", "qkv.weight_bits", "qkv.activation_bits"):
        assert np.all(np.isfinite(slopes[knob])), knob
        assert np.all(slopes[knob] != 0.0), knob


@pytest.mark.parametrize(
    ("variant", "is_dense"), [("bert", False), ("decoder", False), ("bert", True)]
)
@BASELINE
def test_simulator_counts_what_the_model_counts(name: str, variant: str, is_dense: bool) -> None:
    """Random thresholds on the machine, and the machine with nothing dropped."""
    model = model_of(variant, name)
    spec = load_preset(name)
    mechanism = dense_beside(MECHANISMS[name]) if is_dense else MECHANISMS[name]
    deployment, output = tiny_model.run_hard(
        model, random_policy(model, name, seed=7), model.inputs, mechanism=mechanism
    )
    inputs = model.inputs if isinstance(model.inputs, Mapping) else {}
    batch: Any = SimpleNamespace(tensors=output.trace, inputs=inputs)
    shape = deployment.structure
    simulation = simulate(
        trace_of(deployment, batch), spec, gemm_shapes(shape), is_causal=shape.is_causal
    )
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), output.workload)
    price = cost(single, accelerator_from_spec(spec))
    counts = {key: one.count.sum(axis=2) for key, one in output.workload.operations.items()}
    assert simulation.operations.keys() == counts.keys()
    for key, count in simulation.operations.items():
        np.testing.assert_array_equal(count, counts[key], key)
    for scope in SCOPES:
        np.testing.assert_allclose(simulation.energy_pj(scope), price.energy_pj(scope), rtol=1e-5)
    if name == "fact":
        return  # Hundreds of lanes on rows of a few keys: every ceil of the simulator is seen.
    for key, cycles in simulation.busy_cycles.items():
        if np.any(cycles):
            np.testing.assert_allclose(cycles, price.unit_busy_cycles[key], rtol=1e-5, err_msg=key)
    # The model lets one row more through the slowest stage; rows are not alike.
    rows = np.sum(output.workload.rows["attention"].queries, axis=2)
    row_cycles = np.max([cycles / rows for cycles in price.unit_busy_cycles.values()], axis=0)
    apart = price.attention_cycles - simulation.attention_cycles
    slack = 0.08 * simulation.attention_cycles
    assert np.all(apart >= -slack) and np.all(apart <= row_cycles + slack)
