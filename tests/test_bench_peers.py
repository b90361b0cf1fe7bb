"""Peers are timed on what we are timed on, and left out with a line where they are not installed."""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.experiments import bench_peers, bench_sizes, bench_steps
from codesign.experiments.bench_cost import log_cost
from codesign.experiments.model_choice import model_shape
from codesign.experiments.teacher import float_path
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.closed_form import workload_from_fractions
from codesign.hw.operating_points import published_setting
from codesign.hw.spec import load_preset
from codesign.models.config import ModelConfig
from codesign.models.parameters import init_params
from codesign.structure import TokenInput

SHAPE = bench_sizes.TextShape(
    structure=dataclasses.replace(
        bench_sizes.SMALL,
        num_heads=2,
        head_dim=4,
        width=8,
        hidden=16,
        input=TokenInput(vocabulary_size=32, max_tokens=8),
    ),
    batch_size=2,
    num_tokens=8,
)
TINY = bench_sizes.BenchSizes(repeats=1, num_steps=1, small=SHAPE, num_trials=2, num_gradients=3)
SPEC = load_preset("energon")
ACCELERATOR = accelerator_from_spec(SPEC)
# Qwix asks Flax for a name that Flax has replaced.
ignores_alias = pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")


@pytest.mark.parametrize("name", ["qwix", "optuna"])
def test_missing_peer_is_left_out_with_a_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert getattr(bench_peers, f"bench_{name}")(TINY) == []
    printed = capsys.readouterr()
    assert not printed.out
    (line,) = printed.err.splitlines()
    assert f"`{name}` is left out" in line and "codesign[bench]" in line


def twin_params(params: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Our parameters under the names that Flax gives those of the twin."""
    named = {"Embed_0": {"embedding": params["embed"]["table"]}, "position": params["position"]}
    dense, norms = [], []
    for layer in range(num_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        dense += [block[site] for site in ("qkv", "out", "up", "down")]
        norms += [block["attention_norm"], block["ffn_norm"]]
    named |= {f"Dense_{i}": own for i, own in enumerate([*dense, params["head"]])}
    named |= {f"LayerNorm_{i}": own for i, own in enumerate([*norms, params["norm"]])}
    return {"params": named}


def test_twin_is_our_model() -> None:
    structure = SHAPE.structure
    config, twin = ModelConfig(structure=structure), bench_peers.Twin(structure=structure)
    inputs = bench_steps.random_text(SHAPE).part("train").inputs
    leaves, tree = jax.tree.flatten(init_params(structure, key=jax.random.key(0)))
    noise = 0.3 * jax.random.normal(jax.random.key(1), (len(leaves),))
    with jax.enable_x64(True):
        # Biases and gains that are not 0 and 1.
        wide = [leaf.astype(jnp.float64) + own for leaf, own in zip(leaves, noise, strict=True)]
        params = tree.unflatten(wide)
        ours, _ = float_path(params, inputs, config)
        theirs = twin.apply(twin_params(params, structure.num_layers), inputs["tokens"])
    np.testing.assert_allclose(theirs, ours, rtol=1e-6)


def test_twin_step_trains() -> None:
    timed = bench_peers.twin_step(bench_peers.Twin(structure=SHAPE.structure), SHAPE)
    call = timed.compiled().steps(30)
    first = float(call()["task"])
    assert float(call()["task"]) < first


def test_knobs_are_factors_on_sizes_and_widths() -> None:
    shape = dataclasses.replace(model_shape(bench_sizes.MINILM, 128), head=None)
    setting = published_setting(SPEC)
    narrow = dataclasses.replace(setting, weight_bits=0.75 * setting.weight_bits)
    num_sizes, num_linear = len(ACCELERATOR.sizes) - 1, 4 * shape.num_layers  # The clock stays.
    logarithms = [np.log(1.25)] * num_sizes + [np.log(0.75)] * num_linear
    knobs = jnp.zeros(52).at[: len(logarithms)].set(jnp.asarray(logarithms, jnp.float32))
    function = functools.partial(
        bench_peers.moved_cost,
        workload=workload_from_fractions(shape, setting),
        accelerator=ACCELERATOR,
    )
    value, gradient = jax.jit(jax.value_and_grad(function))(knobs)
    sizes = {
        name: size if name == "clock" else 1.25 * size for name, size in ACCELERATOR.sizes.items()
    }
    expected = log_cost((workload_from_fractions(shape, narrow), sizes), ACCELERATOR)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert np.all(gradient != 0.0)
    widths = gradient[num_sizes:]
    assert np.all(widths > 0.0)  # a wider operand never costs less
    # All layers are alike, so are the slopes.
    by_layer = np.reshape(widths, (bench_peers.NUM_WIDTHS, shape.num_layers))
    np.testing.assert_allclose(by_layer, np.tile(by_layer[:, :1], 6), rtol=1e-4)


def test_search_is_timed_beside_the_gradient() -> None:
    pytest.importorskip("optuna")
    (record,) = bench_peers.bench_optuna(TINY)
    assert record["name"] == "cost_gradient_52_knobs"
    assert record["unit"] == "evaluation/s" and record["value"] > 0.0
    assert record["baseline"]["name"] == "Optuna TPE trials"


@ignores_alias
def test_qwix_is_timed_beside_our_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("qwix")
    joint = bench_peers.twin_step(bench_peers.Twin(structure=SHAPE.structure), SHAPE)
    # Ours takes seconds to compile and has its own tests.
    monkeypatch.setattr(bench_peers, "budgeted_step", lambda *problem: joint)
    records = bench_peers.bench_qwix(TINY)
    assert [(record["name"], record["baseline"]["name"]) for record in records] == [
        ("qwix_int8", "plain Flax twin"),
        ("small_joint", "float fine-tuning"),
        ("small_joint_beside_qwix", "Qwix int8"),
    ]
    assert records[2]["value"] == records[1]["value"]
    assert records[2]["baseline"]["value"] == records[0]["value"]


@ignores_alias
def test_qwix_quantises_every_product() -> None:
    qwix = pytest.importorskip("qwix")
    twin = bench_peers.Twin(structure=SHAPE.structure)
    quantised = bench_peers.int8_twin(qwix, twin)
    tokens = bench_steps.random_text(SHAPE).part("train").inputs["tokens"]
    params = jax.eval_shape(twin.init, jax.random.key(0), tokens)

    def num_integer_products(model: Any) -> int:
        text = str(jax.make_jaxpr(model.apply)(params, tokens))
        return text.count("preferred_element_type=int32")

    # Per layer: four linear layers, scores and values; then the head.
    assert num_integer_products(quantised) == 2 * 6 + 1
    assert num_integer_products(twin) == 0  # though it is traced after the other
