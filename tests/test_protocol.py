"""A stub mechanism uses every hook of the protocol, on the float and on the integer path."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from codesign import gates, structure
from codesign.calibration import Calibration, floored
from codesign.mechanisms import MECHANISMS
from codesign.mechanisms.protocol import (
    Carry,
    Context,
    Counts,
    Hooks,
    Mechanism,
    Numbers,
    Operands,
    Plan,
    Selection,
    exact_execution,
    keep_all,
    keep_probabilities,
    reuse_rows,
)
from codesign.models import deploy, vit
from codesign.models.parameters import init_params
from codesign.models.transformer import ModelOutput
from codesign.policy import Policy, dense_knobs
from codesign.vocabulary import SITES
from codesign.workload import operation

BATCH, LAYERS, HEADS, HEAD_DIM, TOKENS = 3, 2, 2, 4, 9
WIDTH, HIDDEN = 12, 16
SHAPE = tiny_model.structure(
    num_layers=LAYERS,
    num_heads=HEADS,
    head_dim=HEAD_DIM,
    width=WIDTH,
    hidden=HIDDEN,
    image_size=6,
    patch_size=2,
    stride=2,
    padding=0,
)
CONFIG = tiny_model.config(SHAPE)
GONE = TOKENS - 1  # the plan drops the last token in every layer, so it is gone from layer 0 on
COPY = 1  # row 1 takes the results of row 0, in attention and in the feed-forward network
CUT = 0.5  # activations below this share of their range become 0
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
    *("on_activation out", "on_output out"),
    *("on_activation up", "on_activation gelu", "on_activation down", "on_output down"),
]


class Stub:
    """Records its calls; `uses` names the hooks that do something, all others are the identity."""

    def __init__(self, *uses: str):
        self.uses = uses
        self.calls: list[str] = []
        self.seen: dict[str, Any] = {}

    def start(self, batch: int, num_heads: int, num_tokens: int) -> Carry:
        self.calls.append("start")
        return {"importance": jnp.zeros((batch, num_tokens)), "layer": jnp.zeros((), jnp.int32)}

    def plan(
        self, context: Context, x: jax.Array, numbers: Numbers, carry: Carry
    ) -> tuple[Plan, Counts]:
        self.calls.append("plan")
        rows = jnp.ones_like(context.valid)
        source = jnp.eye(TOKENS, dtype=rows.dtype).at[COPY].set(jnp.eye(TOKENS)[0])
        per_head = jnp.broadcast_to(rows[:, None, :], (rows.shape[0], HEADS, TOKENS))
        fields: dict[str, jax.Array] = {}
        if "tokens" in self.uses:
            fields["tokens"] = rows.at[:, GONE].set(0.0)
        if "heads" in self.uses:
            fields["heads"] = rows[:, :HEADS].at[:, 1].set(0.0)
        if "queries" in self.uses:
            fields["queries"] = per_head.at[:, :, COPY].set(0.0)
            fields["attention_source"] = jnp.broadcast_to(source, (*per_head.shape, TOKENS))
        if "keep" in self.uses:
            causal = jnp.tril(jnp.ones((TOKENS, TOKENS), rows.dtype))
            fields["keep"] = jnp.broadcast_to(causal, (*per_head.shape, TOKENS))
        if "ffn" in self.uses:
            fields["ffn_source"] = jnp.broadcast_to(source, (*rows.shape, TOKENS))
        if "ffn_bits" in self.uses:
            fields["ffn_bits"] = (8.0 * rows).at[:, 0].set(4.0)
        notes, counts = {}, Counts()
        if "estimate" in self.uses:
            # Powers of two for activations, as the leading-one predictors have; no multiplier.
            codes, weights = numbers.codes(x, "qkv"), numbers.weight_codes("qkv")
            exact = jnp.einsum("btk,kn->btn", codes, weights)
            self.seen |= {"codes": codes, "weights": weights}
            notes["key"] = numbers.estimate(exact).key
            size = jnp.sum(context.valid, axis=-1)[:, None] * WIDTH * HEAD_DIM
            products = jnp.broadcast_to(size, (rows.shape[0], HEADS))
            counts = Counts(operations={"predict.shift_add": operation(products, 8.0, 4.0)})
        return Plan(**fields, notes=notes), counts

    def filter(
        self, context: Context, operands: Operands, plan: Plan, carry: Carry
    ) -> tuple[Selection, Counts]:
        self.calls.append("filter")
        selection, counts = keep_all(context, operands, plan, carry)
        if "estimate" in self.uses:
            self.seen |= {"estimate": plan.notes["key"], "key": operands.key}
        if "filter" in self.uses:
            weights = selection.weights * (jnp.arange(TOKENS) != 2)[None, None, None, :]
            need = 1.0 - jnp.prod(1.0 - weights, axis=2)
            selection = selection.replace(weights=weights, keys=need)
        if "carry" in self.uses:  # after the first layer, the least important key goes
            least = jnp.argmin(carry["importance"], axis=-1)
            kept = jnp.arange(TOKENS)[None, :] != least[:, None]
            kept = kept | (carry["layer"] == 0)
            selection = selection.replace(weights=selection.weights * kept[:, None, None, :])
        return selection, counts

    def on_probabilities(
        self, context: Context, probabilities: jax.Array, selection: Selection
    ) -> tuple[jax.Array, jax.Array, Counts]:
        self.calls.append("on_probabilities")
        if "probabilities" not in self.uses:
            return keep_probabilities(context, probabilities, selection)
        is_top = probabilities == jnp.max(probabilities, axis=-1, keepdims=True)
        used = selection.weights * is_top
        return probabilities * is_top, used, Counts()

    def on_activation(
        self, context: Context, x: jax.Array, plan: Plan, site: str
    ) -> tuple[jax.Array, Counts]:
        self.calls.append(f"on_activation {site}")
        if site not in self.uses:
            return x, Counts()
        kept = jnp.abs(x) > CUT * jnp.max(jnp.abs(x))
        density = jnp.mean(kept, axis=tuple(range(1, x.ndim)), dtype=context.valid.dtype)
        return x * kept, Counts(densities={site: density})

    def execution(
        self,
        context: Context,
        operands: Operands,
        selection: Selection,
        plan: Plan,
        value_weights: jax.Array,
    ) -> Counts:
        self.calls.append("execution")
        return exact_execution(context, operands, selection, plan, value_weights)

    def on_output(
        self, context: Context, y: jax.Array, plan: Plan, site: str
    ) -> tuple[jax.Array, Counts]:
        self.calls.append(f"on_output {site}")
        y, counts = reuse_rows(context, y, plan, site)
        if site == "out" and "output" in self.uses:
            y = jnp.zeros_like(y)
        return y, counts

    def carry(
        self, context: Context, carry: Carry, probabilities: jax.Array, attended: jax.Array
    ) -> Carry:
        self.calls.append("carry")
        received = jnp.sum(probabilities * context.valid[:, None, :, None], axis=(1, 2))
        importance = carry["importance"] + received.astype(carry["importance"].dtype)
        return {"importance": importance, "layer": carry["layer"] + 1}

    def mechanism(self, **changes: Any) -> Mechanism:
        hooks = Hooks(
            start=self.start,
            plan=self.plan,
            filter=self.filter,
            on_probabilities=self.on_probabilities,
            on_activation=self.on_activation,
            execution=self.execution,
            on_output=self.on_output,
            carry=self.carry,
            **changes,
        )
        return Mechanism(name="stub", summary="every hook", soft=hooks, hard=hooks)


@pytest.fixture(autouse=True)
def _may_deploy_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "DEPLOYED_MECHANISMS", ("dense", "energon", "stub"))


@functools.cache
def setup() -> tuple[Any, Policy, Calibration, np.ndarray]:
    params = init_params(SHAPE, key=jax.random.key(3))
    # Far from the identity, so that every row, head and key matters.
    params = jax.tree.map(lambda leaf: 3.0 * leaf, params)
    pixels = np.random.default_rng(0).integers(0, 17, size=(BATCH, 6, 6))
    calibration = tiny_model.calibrate(CONFIG, params, pixels)
    policy = dense_knobs(LAYERS, linear_bits=8.0, attention_bits=12.0)
    return params, policy, calibration, pixels


def soft(mechanism: Mechanism, *, straight_through: bool = True, **changes: Any) -> ModelOutput:
    params, policy, calibration, pixels = setup()

    @jax.jit
    def run(pixels: jax.Array) -> ModelOutput:
        return vit.apply(
            params,
            policy,
            changes.get("calibration", calibration),
            pixels,
            config=CONFIG,
            mechanism=mechanism,
            relaxation=tiny_model.relaxation(straight_through=straight_through),
            calibrating=changes.get("calibrating", False),
        )

    return run(pixels)


def hard(mechanism: Mechanism) -> ModelOutput:
    params, policy, calibration, pixels = setup()
    deployment = deploy.harden(params, policy, calibration, CONFIG, mechanism)
    layers, ends = deployment.hard_arrays()
    with jax.enable_x64(True):

        @jax.jit
        def run(pixels: jax.Array) -> ModelOutput:
            return vit.apply_hard(
                {name: jnp.asarray(value) for name, value in layers.items()},
                {name: jnp.asarray(value) for name, value in ends.items()},
                pixels,
                structure=deployment.structure,
                mechanism=mechanism,
                tracing=True,
            )

        return jax.tree.map(np.asarray, run(pixels))


PATHS = pytest.mark.parametrize("run", [soft, hard], ids=["soft", "hard"])
Run = Callable[[Mechanism], ModelOutput]


def rows(output: ModelOutput, site: str) -> np.ndarray:
    return np.asarray(output.workload.block_gemms[site].rows)


def count(output: ModelOutput, key: str) -> np.ndarray:
    return np.asarray(output.workload.operations[key].count)


@PATHS
def test_hooks_are_called_in_order_once_per_traced_block(run: Run) -> None:
    stub = Stub()
    run(stub.mechanism())
    calls = stub.calls
    assert calls[0] == "start"
    # A scan traces its body once or twice, never once per layer.
    assert calls[1:] in (ORDER, 2 * ORDER)
    sites = {call.split()[1] for call in ORDER if " " in call} | {"probabilities"}
    assert sites == set(SITES)


@PATHS
def test_identity_hooks_change_nothing(run: Run) -> None:
    stubbed, dense = run(Stub().mechanism()), run(MECHANISMS["dense"])
    jax.tree.map(np.testing.assert_array_equal, stubbed, dense)


@PATHS
@pytest.mark.parametrize(
    "use",
    [
        *("tokens", "heads", "queries", "keep", "ffn", "filter", "carry", "probabilities"),
        *("qkv", "query", "key", "value", "scores", "out", "up", "gelu", "down", "output"),
    ],
)
def test_every_effect_reaches_the_result(run: Run, use: str) -> None:
    changed, dense = run(Stub(use).mechanism()), run(MECHANISMS["dense"])
    assert np.all(np.any(np.asarray(changed.logits) != np.asarray(dense.logits), axis=-1))


@PATHS
def test_dropped_tokens_are_gone_for_good(run: Run) -> None:
    output = run(Stub("tokens").mechanism())
    for site in ("qkv", "out", "up", "down"):
        np.testing.assert_array_equal(rows(output, site), TOKENS - 1)
    np.testing.assert_allclose(count(output, "softmax.exp"), (TOKENS - 1) ** 2)
    np.testing.assert_allclose(count(output, "softmax.reciprocal"), TOKENS - 1)
    np.testing.assert_allclose(output.workload.rows["attention"].queries, TOKENS - 1)


@PATHS
def test_dropped_token_has_no_influence(run: Run) -> None:
    params, policy, calibration, pixels = setup()
    changed = pixels.copy()
    changed[:, 4:, 4:] = 16 - changed[:, 4:, 4:]  # the last of nine patches of 2 x 2
    before = np.asarray(run(Stub("tokens").mechanism()).logits)
    dense = np.asarray(run(MECHANISMS["dense"]).logits)
    pixels[...], kept = changed, pixels.copy()
    try:
        np.testing.assert_allclose(run(Stub("tokens").mechanism()).logits, before, rtol=1e-6)
        assert np.any(np.asarray(run(MECHANISMS["dense"]).logits) != dense)
    finally:
        pixels[...] = kept


@PATHS
def test_skipped_queries_and_ffn_rows_are_not_counted(run: Run) -> None:
    output = run(Stub("queries", "ffn").mechanism())
    np.testing.assert_allclose(rows(output, "qkv"), (TOKENS - 1 + 2 * TOKENS) / 3, rtol=1e-6)
    np.testing.assert_allclose(rows(output, "out"), TOKENS)
    np.testing.assert_allclose(rows(output, "up"), TOKENS - 1)
    np.testing.assert_allclose(rows(output, "down"), TOKENS - 1)
    np.testing.assert_allclose(count(output, "qk.mac"), (TOKENS - 1) * TOKENS * HEAD_DIM)
    vectors = np.asarray(output.workload.streams["query"].vectors)
    np.testing.assert_allclose(vectors, TOKENS - 1)


def test_reused_rows_are_copies_of_the_same_codes() -> None:
    output = hard(Stub("queries", "ffn").mechanism())
    trace = output.trace
    # attended = residual before + branch: the two rows get the same branch in both networks.
    ffn = trace["residual"] - trace["attended"]
    np.testing.assert_array_equal(ffn[:, :, COPY], ffn[:, :, 0])
    before = np.concatenate([trace["embedded"][None], trace["residual"][:-1]])
    attention = trace["attended"] - before
    np.testing.assert_array_equal(attention[:, :, COPY], attention[:, :, 0])
    dense = hard(MECHANISMS["dense"]).trace
    assert np.any(dense["residual"] - dense["attended"] != ffn)


@PATHS
def test_dropped_heads_leave_the_output_projection(run: Run) -> None:
    np.testing.assert_allclose(rows(run(Stub("heads").mechanism()), "out"), TOKENS / HEADS)


@PATHS
def test_plan_keeps_pairs_and_shrinks_their_fetch(run: Run) -> None:
    output = run(Stub("keep").mechanism())
    np.testing.assert_allclose(count(output, "softmax.exp"), TOKENS * (TOKENS + 1) / 2)
    vectors = np.asarray(output.workload.streams["value"].vectors)
    np.testing.assert_allclose(vectors[..., 0], TOKENS * (TOKENS + 1) / 2)
    # Blocks of 16 queries: all keys once.
    np.testing.assert_allclose(vectors[..., -1], TOKENS)


@PATHS
def test_keys_on_demand(run: Run) -> None:
    output = run(Stub("filter").mechanism())
    np.testing.assert_allclose(rows(output, "qkv"), (TOKENS + 2 * (TOKENS - 1)) / 3, rtol=1e-6)
    made = run(Stub("filter").mechanism(generates_keys=True))
    np.testing.assert_allclose(rows(made, "qkv"), TOKENS / 3, rtol=1e-6)


@PATHS
def test_pruned_probabilities_only_save_values(run: Run) -> None:
    output = run(Stub("probabilities").mechanism())
    assert np.all(count(output, "pv.mac") < count(output, "qk.mac"))
    np.testing.assert_allclose(count(output, "qk.mac"), TOKENS * TOKENS * HEAD_DIM)


@PATHS
def test_rows_of_mixed_width_count_their_mean(run: Run) -> None:
    output = run(Stub("ffn_bits").mechanism())
    bits = np.asarray(output.workload.block_gemms["up"].activation_bits)
    np.testing.assert_allclose(bits, np.full((BATCH, LAYERS), 8 - 4 / TOKENS), rtol=1e-6)
    both = run(Stub("ffn_bits", "ffn").mechanism())
    bits = np.asarray(both.workload.block_gemms["down"].activation_bits)
    np.testing.assert_allclose(bits, np.full((BATCH, LAYERS), 8 - 4 / (TOKENS - 1)), rtol=1e-6)
    assert np.asarray(both.workload.block_gemms["qkv"].activation_bits).shape == (1, LAYERS)


@PATHS
def test_carry_passes_from_layer_to_layer(run: Run) -> None:
    kept = count(run(Stub("carry").mechanism()), "softmax.exp")
    np.testing.assert_allclose(kept[:, 0], TOKENS**2)
    np.testing.assert_allclose(kept[:, 1], TOKENS * (TOKENS - 1))


@PATHS
@pytest.mark.parametrize("site", ["qkv", "query", "scores", "gelu", "down"])
def test_activation_hook_reports_its_density(run: Run, site: str) -> None:
    density = np.asarray(run(Stub(site).mechanism()).workload.densities[site])
    assert density.shape == (BATCH, LAYERS)
    assert np.all((density > 0) & (density < 1))


@PATHS
def test_plan_sees_codes_and_estimates_with_the_real_scales(run: Run) -> None:
    stub = Stub("estimate")
    with jax.disable_jit():
        output = run(stub.mechanism())
    codes, weights = np.asarray(stub.seen["codes"]), np.asarray(stub.seen["weights"])
    for values in (codes, weights):
        np.testing.assert_array_equal(values, np.rint(values))
        assert 100 < np.abs(values).max() <= 127
    # The exact accumulator gives the real keys; float32 may round a code the other way.
    difference = np.abs(np.asarray(stub.seen["estimate"]) - np.asarray(stub.seen["key"]))
    assert difference.max() <= (0 if run is hard else 1)
    np.testing.assert_array_equal(
        count(output, "predict.shift_add"), np.full((BATCH, LAYERS, HEADS), TOKENS * WIDTH * 4)
    )


def test_unknown_counts_are_refused() -> None:
    def plan(*_: Any) -> tuple[Plan, Counts]:
        unknown = operation(jnp.zeros((BATCH, HEADS)), 1.0, 1.0)
        return Plan(), Counts(operations={"guess.mac": unknown})

    with pytest.raises(ValueError, match="guess.mac"):
        soft(Mechanism(name="stub", summary="", soft=Hooks(plan=plan)))


def test_count_of_the_same_key_twice_is_refused() -> None:
    one = Counts(densities={"key": jnp.ones(2)})
    with pytest.raises(AssertionError):
        one + one


@pytest.mark.parametrize("straight_through", [True, False])
def test_gradient_passes_through_every_hook(straight_through: bool) -> None:
    params, policy, calibration, pixels = setup()
    stub = Stub("tokens", "queries", "ffn", "keep", "qkv", "down", "carry", "heads", "ffn_bits")

    @jax.jit
    @jax.grad
    def gradient(knobs: Policy) -> jax.Array:
        output = vit.apply(
            params,
            knobs,
            calibration,
            pixels,
            config=CONFIG,
            mechanism=stub.mechanism(),
            relaxation=tiny_model.relaxation(straight_through=straight_through),
        )
        return jnp.sum(output.logits[:, 0])

    got = gradient(jax.tree.map(lambda leaf: leaf - 0.3, policy))
    for name, leaf in got.layers.items():
        assert np.all(np.isfinite(leaf)) and np.any(np.asarray(leaf) != 0), name


def test_mechanism_calibrates_a_range_of_its_own() -> None:
    read: list[jax.Array] = []

    def plan(context: Context, x: jax.Array, numbers: Numbers, carry: Carry) -> tuple[Plan, Counts]:
        largest, counts = context.calibrated("stub_key", jnp.max(jnp.abs(gates.detach(x))))
        read.append(largest)
        return Plan(), counts

    def codes(
        knobs: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        return {"limit": np.rint(tensors["stub_key"] / tensors["qkv"]).astype(np.int64)}

    mechanism = Mechanism(name="stub", summary="", codes=codes, soft=Hooks(plan=plan))
    params, policy, calibration, _ = setup()
    with pytest.raises(KeyError, match="stub_key"):
        soft(mechanism)
    measured = soft(mechanism, calibrating=True).observed["layers"]["stub_key"]
    assert measured.shape == (LAYERS,)
    layers = calibration.layers | {"stub_key": measured}
    complete = floored(Calibration(layers=layers, ends=calibration.ends))
    soft(mechanism, calibration=complete)
    deployment = deploy.harden(params, policy, complete, CONFIG, mechanism)
    # The calibration run saw the batch that gave the site its range: its largest code is 127.
    np.testing.assert_array_equal(deployment.layers["limit"], np.full(LAYERS, 127))
