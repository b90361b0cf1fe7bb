"""A mechanism for tests of the hook protocol: it uses every hook, each with an effect that can be switched."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import tiny_model

from codesign.gates import Relaxation
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
    keep_weight,
    part_columns,
    reuse_rows,
)
from codesign.workload import Operation, operation

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
CUT = 0.2  # activations and weights below this share of the largest become 0


class Stub:
    """Uses every hook; `switches` are traced, so that one compilation serves all tests.

    A hook's effect is on where its switch is 1. Without switches all hooks are the identity.
    """

    def __init__(self, switches: Mapping[str, jax.Array] | None = None):
        self.switches = switches
        self.calls: list[str] = []
        self.weights: list[str] = []

    def picked(self, use: str, changed: jax.Array, same: jax.Array) -> jax.Array:
        assert self.switches is not None
        return jnp.where(self.switches[use] > 0, changed, same)

    def start(self, batch: int, num_heads: int, num_tokens: int) -> Carry:
        self.calls.append("start")
        return {"importance": jnp.zeros((batch, num_tokens)), "layer": jnp.zeros((), jnp.int32)}

    def plan(
        self, context: Context, x: jax.Array, numbers: Numbers, carry: Carry
    ) -> tuple[Plan, Counts]:
        self.calls.append("plan")
        if self.switches is None:
            return Plan(), Counts()
        ones = jnp.ones_like(context.valid)
        per_head = jnp.ones((BATCH, HEADS, TOKENS), ones.dtype)
        alone = jnp.eye(TOKENS, dtype=ones.dtype)
        copied = alone.at[COPY].set(alone[0])
        pairs = jnp.ones((TOKENS, TOKENS), ones.dtype)
        keep = self.picked("keep", jnp.tril(pairs), pairs)
        source = self.picked("queries", copied, alone)
        ffn_source = self.picked("ffn", copied, alone)
        codes, weights = numbers.codes(x, "qkv"), numbers.weight_codes("qkv")
        # An exact estimate of the accumulator must become the real keys.
        keys = part_columns(weights, "key")
        estimate = numbers.estimate(jnp.einsum("btk,kn->btn", codes, keys), "key")
        products = jnp.full((BATCH, HEADS), TOKENS * WIDTH * HEAD_DIM, ones.dtype)
        plan = Plan(
            tokens=self.picked("tokens", ones.at[:, GONE].set(0.0), ones),
            heads=self.picked("heads", ones[:, :HEADS].at[:, 1].set(0.0), ones[:, :HEADS]),
            queries=self.picked("queries", per_head.at[:, :, COPY].set(0.0), per_head),
            keep=jnp.broadcast_to(keep, (*per_head.shape, TOKENS)),
            attention_source=jnp.broadcast_to(source, (*per_head.shape, TOKENS)),
            ffn_source=jnp.broadcast_to(ffn_source, (*ones.shape, TOKENS)),
            ffn_full=self.picked("ffn_full", ones.at[:, 0].set(0.0), ones),
            notes={"codes": codes, "weights": weights, "estimate": estimate},
        )
        return plan, Counts(operations={"predict.shift_add": operation(products, 8.0, 4.0)})

    def filter(
        self, context: Context, operands: Operands, plan: Plan, carry: Carry
    ) -> tuple[Selection, Counts]:
        self.calls.append("filter")
        selection, counts = keep_all(context, operands, plan, carry)
        if self.switches is None:
            return selection, counts
        keys = jnp.arange(TOKENS)
        weights = selection.weights
        weights = self.picked("filter", weights * (keys != 2)[None, None, None, :], weights)
        most = jnp.argmax(carry["importance"], axis=-1)
        kept = (keys[None, :] != most[:, None]) | (carry["layer"] == 0)
        weights = self.picked("carry", weights * kept[:, None, None, :], weights)
        need = 1.0 - jnp.prod(1.0 - weights, axis=2)
        scores = jnp.einsum("bhtd,bhsd->bhts", operands.query, operands.key)
        scores = self.picked("own_scores", scores // 2, scores)
        selection = selection.replace(weights=weights, keys=need, scores=scores)
        return selection, counts + Counts(operations=self.facts(context, operands, plan))

    def facts(self, context: Context, operands: Operands, plan: Plan) -> dict[str, Operation]:
        """What the plan saw, as counts `[B, H]`, which both paths return."""
        codes, weights, estimate = (plan.notes[name] for name in ("codes", "weights", "estimate"))
        broken = [jnp.max(jnp.abs(value - jnp.round(value))) for value in (codes, weights)]
        facts = {
            "encode.encode": jnp.max(jnp.abs(codes)),
            "encode.multiply": jnp.max(jnp.abs(weights)),
            "encode.compare": jnp.maximum(*broken),
            "similarity.compare": jnp.max(jnp.abs(estimate - operands.key)),
        }
        dtype = context.valid.dtype
        return {
            key: operation(jnp.broadcast_to(fact.astype(dtype), (BATCH, HEADS)), 1.0, 1.0)
            for key, fact in facts.items()
        }

    def on_probabilities(
        self, context: Context, probabilities: jax.Array, selection: Selection
    ) -> tuple[jax.Array, jax.Array, Counts]:
        self.calls.append("on_probabilities")
        if self.switches is None:
            return keep_probabilities(context, probabilities, selection)
        is_top = probabilities == jnp.max(probabilities, axis=-1, keepdims=True)
        is_used = self.picked("probabilities", is_top, jnp.ones_like(is_top))
        return probabilities * is_used, selection.weights * is_used, Counts()

    def on_activation(
        self, context: Context, x: jax.Array, plan: Plan, site: str
    ) -> tuple[jax.Array, Counts]:
        self.calls.append(f"on_activation {site}")
        if self.switches is None:
            return x, Counts()
        is_large = jnp.abs(x) > CUT * jnp.max(jnp.abs(x))
        kept = self.picked(site, is_large, jnp.ones_like(is_large))
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
        if self.switches is not None and site == "attention_branch":
            y = self.picked("output", jnp.zeros_like(y), y)
        return y, counts

    def on_weight(
        self, knobs: Mapping[str, jax.Array], kernel: jax.Array, site: str, relaxation: Relaxation
    ) -> tuple[jax.Array, jax.Array]:
        self.weights.append(site)
        if self.switches is None:
            return keep_weight(knobs, kernel, site, relaxation)
        is_large = jnp.abs(kernel) > CUT * jnp.max(jnp.abs(kernel))
        kept = self.picked("weight", is_large, jnp.ones_like(is_large))
        return kernel * kept, jnp.mean(kept, dtype=kernel.dtype)

    def carry(
        self,
        context: Context,
        carry: Carry,
        plan: Plan,
        probabilities: jax.Array,
        attended: jax.Array,
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
            on_weight=self.on_weight,
            carry=self.carry,
            **changes,
        )
        return Mechanism(name="stub", summary="every hook", soft=hooks, hard=hooks)
