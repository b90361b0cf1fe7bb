"""Baselines on whole models: integer path and emulator, training path, dense limit, simulator, gradients."""

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import existing, fast_cost, tensors
from tiny_policies import SPREAD, model_of, policy_of, ranges_of, run_hard, run_soft

from codesign.experiments.traced import gemm_shapes, trace_of
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.closed_form import ModelShape
from codesign.hw.operating_points import closed_form_workload, published_setting
from codesign.hw.simulator import simulate
from codesign.hw.spec import load_preset
from codesign.hw.surrogate import SCOPES
from codesign.mechanisms import MECHANISMS, dense_beside
from codesign.references import reference_by_name
from codesign.workload import attention_macs

BASELINES = ("topk", "bitserial", "sanger", "a3", "spatten", "fact")
BASELINE = pytest.mark.parametrize("name", BASELINES)
SOME = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("sanger", "a3") else pytest.mark.slow)
        for name in BASELINES
    ],
)
"""Two by default: what is particular to each of the others is in its own tests."""
FRACTIONAL = {"bitserial": {"plane_bits": 9.4}, "a3": {"search_bits": 3.4}}
"""Widths of a mechanism's own at which each has a derivative: no more planes than bits, say."""


@BASELINE
def test_integer_path_equals_the_emulator(name: str) -> None:
    """On a decoder as it trains; on random integers of every kind of model: test_bit_exact."""
    model = model_of("decoder", name)
    _, pairs = existing(model)
    deployment, output = run_hard(model, policy_of(model, name, seed=0, bits=16.0), name)
    found = tiny_model.emulated(model, deployment, output)
    assert set(reference_by_name(name).decision_tensors) <= set(found)
    last = found["used"] if "used" in found else found["keep"][:, -1]
    keep = last & pairs[None, :, None]
    share = np.sum(keep) / (np.sum(pairs) * keep.shape[0] * keep.shape[2])
    assert 0.1 < share < 0.9


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(name, "patches", marks=() if name == "sanger" else pytest.mark.slow)
        for name in BASELINES
    ]
    + [(name, "decoder") for name in BASELINES],
)
def test_straight_through_decides_as_the_integer_path(name: str, variant: str) -> None:
    """Without padding and with it, all pairs and causal ones: what soft paths tell apart."""
    model = model_of(variant, name)
    _, pairs = existing(model)
    policy = policy_of(model, name, seed=3)
    hard = run_hard(model, policy, name)[1]
    soft = run_soft(model, policy, name)
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
    scale = MECHANISMS[name].thresholds
    assert scale is not None
    policy = policy_of(model, name)
    _, whole = run_hard(model, policy, name)
    _, dense = run_hard(model, policy, "dense")
    for key, value in tensors(dense).items():
        np.testing.assert_array_equal(tensors(whole)[key], value, err_msg=key)
    np.testing.assert_array_equal(scale.kept(whole.workload), 1.0)


@SOME
def test_multiplications_without_the_mechanism_are_those_of_dense_attention(name: str) -> None:
    model = model_of("patches", name)
    policy = policy_of(model, name, seed=0)
    _, beside = tiny_model.run_hard(
        model, policy, model.inputs, mechanism=dense_beside(MECHANISMS[name])
    )
    _, dense = run_hard(model, policy, "dense")
    np.testing.assert_allclose(attention_macs(beside.workload), attention_macs(dense.workload))
    _, sparse = run_hard(model, policy, name)
    assert np.all(attention_macs(sparse.workload) < attention_macs(dense.workload))


@SOME
def test_every_knob_has_a_gradient(name: str) -> None:
    model = model_of("decoder", name)
    policy = policy_of(model, name, seed=6, bits=11.4, **FRACTIONAL.get(name, {}))
    slopes = tiny_model.knob_slopes(model, policy, name)
    own = MECHANISMS[name].knobs(1, 1)
    for knob in (*own, "qk_bits", "v_bits", "qkv.weight_bits", "qkv.activation_bits"):
        assert np.all(np.isfinite(slopes[knob])), knob
        assert np.all(slopes[knob] != 0.0), knob


ENTRIES = [
    (name, entry) for name in BASELINES for entry in range(len(MECHANISMS[name].thresholds.names))
]


@pytest.mark.parametrize(("name", "entry"), ENTRIES)
def test_more_that_is_kept_never_costs_less(name: str, entry: int) -> None:
    """One entry of a layer's thresholds, its input the same; SpAtten's first layer keeps all tokens and heads."""
    model, layer = model_of("patches", name), 1 if name == "spatten" else 0
    policy, scale = policy_of(model, name, seed=0), MECHANISMS[name].thresholds
    threshold = np.array(policy.layers["threshold"])
    if name == "spatten" and entry < 3:
        # A key more may be a row's largest and spare its low bits: none are read.
        threshold[:, 3] = scale.from_strength(np.ones(2), {})
    low, high = np.broadcast_arrays(*SPREAD[name], np.zeros(len(scale.names)))[:2]
    workloads = []
    for strength in np.linspace(high[entry], 0.2 * low[entry], 4):
        threshold[layer, ..., entry] = scale.from_strength(strength, ranges_of(model))
        knob = {"threshold": jnp.asarray(threshold)}
        changed = policy.replace(layers=policy.layers | knob)  # type: ignore[attr-defined]
        workloads.append(run_hard(model, changed, name)[1].workload)
    moved = []
    for key in workloads[0].operations:
        steps = np.diff([one.operations[key].count[:, layer] for one in workloads], axis=0)
        assert np.all(steps >= 0.0), key
        moved += [key] if np.any(steps) else []
    # FACT's narrow rows are seen in its dense products alone.
    rows = [np.sum(one.block_gemms["up"].rows[:, layer]) for one in workloads]
    assert moved or rows == sorted(set(rows))


OPERAND_BITS = {
    "qk_bits": (8.0, 9.0, 10.5, 12.0),
    "v_bits": (8.0, 9.0, 10.5, 12.0),
    "weight_bits": (2.0, 4.0, 6.5, 8.0),
    "activation_bits": (2.0, 4.0, 6.5, 8.0),
    "search_bits": (3.0, 4.0, 5.5, 6.0),
}


@SOME
def test_wider_operands_and_longer_searches_never_cost_less(name: str) -> None:
    spec = load_preset(name)
    accelerator = accelerator_from_spec(spec)
    shape = ModelShape(num_layers=1, num_tokens=64, num_heads=2, head_dim=16, width=32, hidden=64)
    start = {key: values[1] for key, values in OPERAND_BITS.items()}
    base = dataclasses.replace(published_setting(spec), generation_bits=None, **start)
    energy, latency = np.empty((2, len(OPERAND_BITS), 4))
    for place, (key, values) in enumerate(OPERAND_BITS.items()):
        for index, value in enumerate(values):
            setting = dataclasses.replace(base, **{key: value})
            price = fast_cost(closed_form_workload(spec, shape, setting), accelerator)
            energy[place, index] = price.energy_pj("end_to_end")[0]
            latency[place, index] = price.latency_cycles("end_to_end")[0]
    assert np.all(np.diff(energy) >= 0.0) and np.all(np.diff(latency) >= 0.0)
    is_idle = np.asarray([key == "search_bits" and name != "a3" for key in OPERAND_BITS])
    np.testing.assert_array_equal(energy[:, -1] > energy[:, 0], ~is_idle)


@pytest.mark.parametrize(
    ("variant", "is_dense"),
    [pytest.param("bert", False, marks=pytest.mark.slow), ("decoder", False), ("bert", True)],
)
@BASELINE
def test_simulator_counts_what_the_model_counts(name: str, variant: str, is_dense: bool) -> None:
    """Random thresholds on the machine, and the machine with nothing dropped."""
    model = model_of(variant, name)
    spec = load_preset(name)
    mechanism = dense_beside(MECHANISMS[name]) if is_dense else MECHANISMS[name]
    deployment, output = tiny_model.run_hard(
        model, policy_of(model, name, seed=7), model.inputs, mechanism=mechanism
    )
    inputs = model.inputs if isinstance(model.inputs, Mapping) else {}
    batch: Any = SimpleNamespace(tensors=output.trace, inputs=inputs)
    shape = deployment.structure
    simulation = simulate(
        trace_of(deployment, batch), spec, gemm_shapes(shape), is_causal=shape.is_causal
    )
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), output.workload)
    price = fast_cost(single, accelerator_from_spec(spec))
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
