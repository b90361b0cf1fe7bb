"""A stub mechanism uses every hook of the protocol, on the float and on the integer path."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from stub_mechanism import (
    BATCH,
    CONFIG,
    COPY,
    HEAD_DIM,
    HEADS,
    LAYERS,
    SHAPE,
    TOKENS,
    WIDTH,
    Stub,
)

from codesign.calibration import Calibration
from codesign.errors import UnknownNameError
from codesign.mechanisms import MECHANISMS
from codesign.mechanisms.protocol import Context, Counts, Hooks, Mechanism, Plan
from codesign.models import deploy, model as models
from codesign.models.parameters import init_params
from codesign.models.transformer import ModelOutput
from codesign.policy import Policy
from codesign.vocabulary import BLOCK_SITES, SITES
from codesign.workload import operation

# Calls while one block is traced.
ORDER = [
    "on_activation qkv",
    "plan",
    *("on_activation query", "on_activation key", "on_activation value"),
    "filter",
    "on_activation scores",
    "on_probabilities",
    "execution",
    "on_output attention",
    "carry",
    *("on_activation out", "on_output attention_branch"),
    *("on_activation up", "on_activation gelu", "on_activation down", "on_output ffn_branch"),
]


@functools.cache
def setup() -> tuple[Any, Policy, Calibration, np.ndarray]:
    params = init_params(SHAPE, key=jax.random.key(3))
    # Far from the identity, so that every row, head and key matters.
    params = jax.tree.map(lambda leaf: 3.0 * leaf, params)
    pixels = np.random.default_rng(0).integers(0, 17, size=(BATCH, 6, 6))
    calibration = tiny_model.calibrate(CONFIG, params, pixels)
    policy = tiny_model.shared_policy(SHAPE, attention_bits=12.0)
    return params, policy, calibration, pixels


def apply_soft(
    mechanism: Mechanism,
    pixels: jax.Array | np.ndarray,
    *,
    knobs: Policy | None = None,
    calibrating: bool = False,
) -> ModelOutput:
    params, policy, calibration, _ = setup()
    return models.apply(
        params,
        policy if knobs is None else knobs,
        calibration,
        {"pixels": jnp.asarray(pixels)},
        config=CONFIG,
        mechanism=mechanism,
        relaxation=tiny_model.relaxation(),
        calibrating=calibrating,
    )


@functools.cache
def deployment() -> deploy.Deployment:
    """The stub stores nothing of its own, so its integers are those of dense."""
    params, policy, calibration, _ = setup()
    return deploy.harden(params, policy, calibration, CONFIG, MECHANISMS["dense"])


def apply_hard(mechanism: Mechanism, pixels: jax.Array | np.ndarray) -> ModelOutput:
    """Call in 64-bit mode."""
    layers, ends = deployment().hard_arrays()
    return models.apply_hard(
        {name: jnp.asarray(value) for name, value in layers.items()},
        {name: jnp.asarray(value) for name, value in ends.items()},
        {"pixels": jnp.asarray(pixels)},
        structure=deployment().structure,
        mechanism=mechanism,
        tracing=True,
    )


# Compiling takes most of these tests' time.
quick_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)
APPLY: dict[str, Callable[..., ModelOutput]] = {"soft": apply_soft, "hard": apply_hard}
SWITCHES = (
    *("tokens", "heads", "queries", "keep", "ffn", "ffn_full", "filter", "carry"),
    *("probabilities", "output", "own_scores"),
    *("qkv", "query", "key", "value", "scores", "out", "up", "gelu", "down", "weight"),
)


def in_mode(path: str, fn: Callable[..., ModelOutput], *arguments: Any) -> ModelOutput:
    deployment()  # made in 32-bit mode, outside the trace
    with jax.enable_x64(path == "hard"):
        return jax.tree.map(np.asarray, fn(*arguments))


@functools.cache
def compiled(path: str) -> Callable[..., ModelOutput]:
    def run(pixels: jax.Array, switches: dict[str, jax.Array]) -> ModelOutput:
        return APPLY[path](Stub(switches).mechanism(), pixels)

    return quick_jit(run)


def stubbed(path: str, *uses: str, pixels: np.ndarray | None = None) -> ModelOutput:
    """Runs the stub with the effects that `uses` names."""
    switches = {name: np.float32(name in uses) for name in SWITCHES}
    return in_mode(path, compiled(path), setup()[3] if pixels is None else pixels, switches)


def static(path: str, mechanism: Mechanism) -> ModelOutput:
    """Runs another mechanism."""
    return in_mode(path, quick_jit(lambda x: APPLY[path](mechanism, x)), setup()[3])


@functools.cache
def dense(path: str) -> ModelOutput:
    return static(path, MECHANISMS["dense"])


PATHS = pytest.mark.parametrize("path", ["soft", "hard"])


def rows(output: ModelOutput, site: str) -> np.ndarray:
    return output.workload.block_gemms[site].rows


def count(output: ModelOutput, key: str) -> np.ndarray:
    return output.workload.operations[key].count


@PATHS
def test_hooks_are_called_in_order_once_per_traced_block_and_change_nothing(path: str) -> None:
    stub = Stub()
    output = static(path, stub.mechanism())
    assert stub.calls[0] == "start"
    # A scan traces its body once or twice, never once per layer.
    assert stub.calls[1:] in (ORDER, 2 * ORDER)
    # The chip stores the weights that the soft path prunes.
    assert stub.weights in ([], list(BLOCK_SITES), 2 * list(BLOCK_SITES))
    assert bool(stub.weights) == (path == "soft")
    sites = {call.split()[1] for call in ORDER if " " in call} | {"probabilities"}
    assert sites == set(SITES)
    jax.tree.map(np.testing.assert_array_equal, output, dense(path))


@PATHS
def test_weights_of_one_change_nothing(path: str) -> None:
    output = stubbed(path)
    # Float32 sums are ordered otherwise; integers are not.
    tolerance = {"soft": 1e-5, "hard": 0.0}[path]
    np.testing.assert_allclose(output.logits, dense(path).logits, rtol=tolerance, atol=tolerance)
    for site in ("qkv", "out", "up", "down"):
        np.testing.assert_allclose(rows(output, site), TOKENS, rtol=1e-6)
    for key, same in dense(path).workload.operations.items():
        np.testing.assert_allclose(count(output, key), same.count, rtol=1e-6)


@PATHS
@pytest.mark.parametrize("use", [use for use in SWITCHES if use != "ffn_full"])
def test_every_effect_reaches_the_result(path: str, use: str) -> None:
    changed = np.abs(stubbed(path, use).logits - stubbed(path).logits)
    # The stub stores its weights whole.
    wanted = (path, use) != ("hard", "weight")
    assert np.all((np.max(changed, axis=-1) > 0) == wanted)


@PATHS
def test_dropped_tokens_are_gone_for_good(path: str) -> None:
    output = stubbed(path, "tokens")
    for site in ("out", "up", "down"):
        np.testing.assert_allclose(rows(output, site), TOKENS - 1)
    np.testing.assert_allclose(rows(output, "qkv"), TOKENS - 1, rtol=1e-6)
    np.testing.assert_allclose(count(output, "softmax.exp"), (TOKENS - 1) ** 2)
    np.testing.assert_allclose(count(output, "softmax.reciprocal"), TOKENS - 1)
    np.testing.assert_allclose(output.workload.rows["attention"].queries, TOKENS - 1)
    # Nor does it influence the others: its pixels, the last of nine patches of 2 x 2, do not matter.
    pixels = setup()[3].copy()
    pixels[:, 4:, 4:] = 16 - pixels[:, 4:, 4:]
    np.testing.assert_array_equal(stubbed(path, "tokens", pixels=pixels).logits, output.logits)
    assert np.any(stubbed(path, pixels=pixels).logits != stubbed(path).logits)


@PATHS
def test_skipped_queries_and_ffn_rows_are_not_counted(path: str) -> None:
    output = stubbed(path, "queries", "ffn")
    np.testing.assert_allclose(rows(output, "qkv"), (TOKENS - 1 + 2 * TOKENS) / 3, rtol=1e-6)
    np.testing.assert_allclose(rows(output, "out"), TOKENS)
    np.testing.assert_allclose(rows(output, "up"), TOKENS - 1)
    np.testing.assert_allclose(rows(output, "down"), TOKENS - 1)
    np.testing.assert_allclose(count(output, "qk.mac"), (TOKENS - 1) * TOKENS * HEAD_DIM)
    np.testing.assert_allclose(output.workload.streams["query"].vectors, TOKENS - 1)
    np.testing.assert_allclose(output.workload.rows["attention"].queries, TOKENS - 1)


def test_reused_rows_are_copies_of_the_same_codes() -> None:
    trace, plain = stubbed("hard", "queries", "ffn").trace, stubbed("hard").trace

    def branches(tensors: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        before = np.concatenate([tensors["embedded"][None], tensors["residual"][:-1]])
        return tensors["attended"] - before, tensors["residual"] - tensors["attended"]

    for reused, own in zip(branches(trace), branches(plain), strict=True):
        np.testing.assert_array_equal(reused[:, :, COPY], reused[:, :, 0])
        assert np.any(own[:, :, COPY] != own[:, :, 0])


@PATHS
def test_dropped_heads_leave_the_output_projection(path: str) -> None:
    np.testing.assert_allclose(rows(stubbed(path, "heads"), "out"), TOKENS / HEADS)


@PATHS
def test_plan_keeps_pairs_and_shrinks_their_fetch(path: str) -> None:
    output = stubbed(path, "keep")
    np.testing.assert_allclose(count(output, "softmax.exp"), TOKENS * (TOKENS + 1) / 2)
    vectors = output.workload.streams["value"].vectors
    np.testing.assert_allclose(vectors[..., 0], TOKENS * (TOKENS + 1) / 2)
    # Blocks of 16 queries: every key once.
    np.testing.assert_allclose(vectors[..., -1], TOKENS)


@PATHS
def test_keys_are_generated_on_demand(path: str) -> None:
    output = stubbed(path, "filter")
    np.testing.assert_allclose(rows(output, "qkv"), (TOKENS + 2 * (TOKENS - 1)) / 3, rtol=1e-6)
    # A mechanism that makes K and V on units of its own leaves only Q to the dense product.
    own = static(path, Mechanism(name="stub", summary="", **{path: Hooks(generates_keys=True)}))
    np.testing.assert_allclose(rows(own, "qkv"), TOKENS, rtol=1e-6)
    assert own.workload.block_gemms["qkv"].outer == HEADS * HEAD_DIM


@PATHS
def test_pruned_probabilities_save_values_only(path: str) -> None:
    output = stubbed(path, "probabilities")
    assert np.all(count(output, "pv.mac") < count(output, "qk.mac"))
    np.testing.assert_allclose(count(output, "qk.mac"), TOKENS * TOKENS * HEAD_DIM)


@PATHS
def test_narrow_rows_share_products(path: str) -> None:
    """Two rows of four bits take the place of one of eight."""
    for uses, number in ((("ffn_full",), TOKENS), (("ffn_full", "ffn"), TOKENS - 1)):
        for site in ("up", "down"):
            np.testing.assert_allclose(rows(stubbed(path, *uses), site), number - 0.5, rtol=1e-6)
    np.testing.assert_allclose(rows(dense(path), "up"), TOKENS, rtol=1e-6)


@PATHS
def test_carry_passes_from_layer_to_layer(path: str) -> None:
    kept = count(stubbed(path, "carry"), "softmax.exp")
    np.testing.assert_allclose(kept[:, 0], TOKENS**2)
    np.testing.assert_allclose(kept[:, 1], TOKENS * (TOKENS - 1))


@PATHS
def test_densities_reach_the_workload(path: str) -> None:
    for site in ("qkv", "query", "scores", "gelu", "down"):
        density = stubbed(path, site).workload.densities[site]
        assert density.shape == (BATCH, LAYERS)
        assert np.all((density > 0) & (density < 1))
        np.testing.assert_allclose(stubbed(path).workload.densities[site], 1.0)


def test_zeros_of_weights_are_counted_where_a_machine_skips_them() -> None:
    sites = {f"{site}.weight" for site in BLOCK_SITES}
    assert not sites & stubbed("soft").workload.densities.keys()
    for path in ("soft", "hard"):
        skipping = Mechanism(name="stub", summary="", **{path: Hooks(skips_zeros=True)})
        densities = static(path, skipping).workload.densities
        assert densities.keys() == sites
        layers = deployment().layers
        for site in BLOCK_SITES:
            wanted = np.mean(layers[f"{site}_weight"] != 0, axis=(1, 2))
            np.testing.assert_allclose(densities[f"{site}.weight"], wanted[None], rtol=1e-6)


@PATHS
def test_plan_sees_codes_and_estimates_with_the_real_scales(path: str) -> None:
    output = stubbed(path)
    for largest in ("encode.encode", "encode.multiply"):
        assert np.all((count(output, largest) > 100) & (count(output, largest) <= 127))
    assert not np.any(count(output, "encode.compare"))
    # Float32 may round a key's code the other way.
    assert np.all(count(output, "similarity.compare") <= {"soft": 1, "hard": 0}[path])
    predicted = np.full((BATCH, LAYERS, HEADS), TOKENS * WIDTH * HEAD_DIM)
    np.testing.assert_array_equal(count(output, "predict.shift_add"), predicted)


def test_unknown_counts_are_refused() -> None:
    def plan(*_: Any) -> tuple[Plan, Counts]:
        unknown = operation(jnp.zeros((BATCH, HEADS)), 1.0, 1.0)
        return Plan(), Counts(operations={"guess.mac": unknown})

    with pytest.raises(UnknownNameError, match=r"guess\.mac"):
        static("soft", Mechanism(name="stub", summary="", soft=Hooks(plan=plan)))


def test_counting_the_same_thing_twice_is_refused() -> None:
    one = Counts(densities={"key": jnp.ones(2)})
    with pytest.raises(AssertionError):
        one + one


def test_gradient_passes_through_every_hook() -> None:
    _, policy, _, pixels = setup()
    on = {"tokens", "queries", "ffn", "keep", "carry", "heads", "ffn_full", "filter"}
    stub = Stub({name: np.float32(name in on) for name in SWITCHES})

    @quick_jit
    @jax.grad
    def gradient(knobs: Policy) -> jax.Array:
        output = apply_soft(stub.mechanism(), pixels, knobs=knobs)
        return jnp.sum(output.logits[:, 0])

    got = gradient(jax.tree.map(lambda leaf: leaf - 0.3, policy))
    for name, leaf in got.layers.items():
        assert np.all(np.isfinite(leaf)) and np.any(np.asarray(leaf) != 0), name


def test_mechanism_calibrates_a_range_of_its_own() -> None:
    def plan(context: Context, x: jax.Array, *_: Any) -> tuple[Plan, Counts]:
        _, counts = context.calibrated("stub_key", jnp.max(jnp.abs(x)))
        return Plan(), counts

    def codes(
        knobs: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        return {"limit": np.rint(tensors["stub_key"] / tensors["qkv"]).astype(np.int64)}

    mechanism = Mechanism(name="stub", summary="", codes=codes, soft=Hooks(plan=plan))
    params, policy, calibration, pixels = setup()
    with pytest.raises(KeyError, match="stub_key"):
        apply_soft(mechanism, pixels)
    measure = quick_jit(functools.partial(apply_soft, mechanism, calibrating=True))
    measured = measure(pixels).observed["layers"]["stub_key"]
    assert measured.shape == (LAYERS,)
    layers = calibration.layers | {"stub_key": measured}
    complete = Calibration(layers=layers, ends=calibration.ends)
    layers = deploy.harden(params, policy, complete, CONFIG, mechanism).layers
    # The run saw the batch that gave the site its range: its largest code is 127, or 1 less where
    # quantised layers before it shrank the tensor.
    np.testing.assert_allclose(layers["limit"], 127, atol=1)
