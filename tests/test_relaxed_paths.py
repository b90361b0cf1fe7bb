"""Relaxed paths of the baselines: derivatives to every knob against finite differences, and the integers they tend to."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from noted_runs import STEP, TERMS, compiled, differentiated, doubled, replayed, small_model, terms
from tiny_policies import policy_of, run_hard

from codesign.gates import Relaxation
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.spec import load_preset
from codesign.mechanisms import MECHANISMS
from codesign.mechanisms.bitserial import soft_planes
from codesign.mechanisms.protocol import Context, Operands, Plan
from codesign.mechanisms.threshold_scale import part_variable
from codesign.models.model import apply
from codesign.models.transformer import ModelOutput
from codesign.policy import Policy
from codesign.references.bitserial import reference_planes

LAYERS = {"bitserial": 1, "sanger": 1, "a3": 1, "spatten": 2, "fact": 1}
"""Layers of the model on which each is tried: SpAtten's first layer knows of no importance yet."""
FRACTIONAL = {"bitserial": {"plane_bits": 9.4}, "a3": {"search_bits": 3.4}}
"""Widths at which a mechanism's own have a derivative."""
WHOLE = {"a3": {"search_bits": 3.0}}
"""Widths at which a mechanism drops something of 9 tokens."""
BITS = 11.4
"""Bits of attention where they have a derivative."""
TOLERANCE = 1e-4
"""Relative error of a difference; that of a sum of sizes has kinks nearby."""


@pytest.fixture(scope="module", autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@dataclasses.dataclass(frozen=True, eq=False)
class Relaxed:
    """A mechanism on its machine and a small model, relaxed, in float64."""

    name: str
    model: tiny_model.Model

    def policy(self, **changes: Any) -> Policy:
        return doubled(policy_of(self.model, self.name, **changes))

    def knobs(self, policy: Policy) -> dict[str, jax.Array]:
        """The knobs that are moved: the mechanism's own, and the bits of attention."""
        own = (*MECHANISMS[self.name].knobs(1, 1), "qk_bits", "v_bits")
        return {name: policy.layers[name] for name in own}

    def run(
        self, policy: Policy, temperature: jax.Array, knobs: dict[str, jax.Array]
    ) -> tuple[jax.Array, ModelOutput]:
        """Terms of the loss, and the model's output."""
        smoothness = jnp.asarray(8.0)
        output = apply(
            self.model.params,
            Policy(layers=policy.layers | knobs, ends=policy.ends),
            self.model.calibration,
            tiny_model.as_inputs(self.model.inputs),
            config=self.model.config,
            mechanism=MECHANISMS[self.name],
            relaxation=Relaxation(
                temperature=temperature, smoothness=smoothness, straight_through=False
            ),
            tracing=True,
        )
        accelerator = accelerator_from_spec(load_preset(self.name))
        assert self.model.labels is not None
        return terms(output, self.model.labels, accelerator, smoothness), output

    @functools.cached_property
    def program(self) -> Callable[..., Any]:
        """`differentiated` by the knobs, at a policy and a temperature."""

        def program(policy: Policy, temperature: jax.Array, knobs: dict[str, jax.Array]) -> Any:
            return differentiated(functools.partial(self.run, policy, temperature), knobs)

        policy = self.policy()
        return compiled(program, policy, jnp.asarray(1.0), self.knobs(policy))


SLOW = ("a3", "bitserial", "spatten")
"""Their programs take one or two minutes to compile."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYERS],
)
def relaxed(request: pytest.FixtureRequest) -> Relaxed:
    name = request.param
    model = small_model(LAYERS[name], factor=1.5)
    if MECHANISMS[name].own_ranges:
        with jax.enable_x64(False):
            single = jax.tree.map(
                lambda leaf: jnp.asarray(np.asarray(leaf, np.float32)),
                (model.params, model.calibration),
            )
            narrow = dataclasses.replace(model, params=single[0], calibration=single[1])
            measured = tiny_model.with_own_ranges(narrow, name).calibration
        calibration = doubled(measured)
        model = dataclasses.replace(model, calibration=calibration)
    return Relaxed(name, model)


def test_every_entry_of_every_knob_against_finite_differences(relaxed: Relaxed) -> None:
    # Of this draw no output of SpAtten's first heads rounds to 0, where their sizes have a kink.
    policy = relaxed.policy(seed=4, bits=BITS, **FRACTIONAL.get(relaxed.name, {}))
    temperature, knobs = jnp.asarray(0.3), relaxed.knobs(policy)
    slopes, value, _, notes = relaxed.program(policy, temperature, knobs)
    point, unravel = jax.flatten_util.ravel_pytree(knobs)

    def replay(notes: list[jax.Array], moved: jax.Array) -> jax.Array:
        run = functools.partial(relaxed.run, policy, temperature)
        found, _ = replayed(run, notes, unravel(moved))
        return found

    steps = STEP * jnp.eye(len(point))
    moved = point[None] + jnp.concatenate([jnp.zeros_like(steps[:1]), steps, -steps])
    replays = compiled(jax.vmap(replay, in_axes=(None, 0)), notes, moved)
    found = np.asarray(replays(notes, moved))
    np.testing.assert_allclose(found[0], value, rtol=1e-12)
    up, down = np.split(found[1:], 2)
    exact = np.concatenate([np.reshape(leaf, (len(TERMS), -1)) for leaf in slopes.values()], axis=1)
    np.testing.assert_allclose(exact.T, (up - down) / (2.0 * STEP), rtol=TOLERANCE, atol=1e-9)
    for name, slope in slopes.items():
        # Something of each entry is trained.
        assert np.all(np.any(slope != 0.0, axis=0)), name


def test_soft_tends_to_the_integer_path(relaxed: Relaxed) -> None:
    """Counts, outputs and decisions. Of predicted scores that are equal the chip takes the first, a gate a half of each."""
    policy = relaxed.policy(seed=1, **WHOLE.get(relaxed.name, {}))
    deployment, hard = run_hard(relaxed.model, policy, relaxed.name)
    logits = deployment.real_logits(hard.logits, hard.num_pooled)
    apart, drift, agree = [], [], []
    for temperature in (1.0, 0.1, 0.01, 1e-9):
        _, _, soft, _ = relaxed.program(policy, jnp.asarray(temperature), relaxed.knobs(policy))
        ratios = [
            np.sum(soft.workload.operations[key].count) / np.sum(operation.count)
            for key, operation in hard.workload.operations.items()
        ]
        apart.append(np.mean(np.abs(np.asarray(ratios) - 1.0)))
        drift.append(np.mean(np.abs(soft.logits - logits)))
        agree.append(np.mean(np.asarray(soft.trace["keep"]) == hard.trace["keep"]))
    assert apart == sorted(apart, reverse=True) and apart[0] > 0.01 > apart[-1]
    assert drift[0] > drift[1] > drift[2] and drift[0] > 0.05 and drift[-1] < 0.02
    assert agree == sorted(agree) and agree[-1] > 0.97
    assert 0.1 < np.mean(hard.trace["keep"]) < 0.9


# What deployed decisions teach

TOKENS, HEADS, HEAD_DIM = 9, 2, 4


def context_of(
    knobs: dict[str, Any], relaxed: Relaxation, **fields: Any
) -> tuple[Context, np.random.Generator]:
    """One example of 9 tokens that all exist, and draws for it; widths are those of the knobs, whole."""
    floats = {name: jnp.asarray(value, jnp.float64) for name, value in knobs.items()}
    widths = {name: jnp.round(value) for name, value in floats.items() if name.endswith("bits")}
    context = Context(
        knobs=floats,
        widths=widths,
        ranges=doubled(fields.pop("ranges", {})),
        relaxation=relaxed,
        valid=jnp.ones((1, TOKENS)),
        pairs=jnp.ones((1, 1, TOKENS, TOKENS)),
        **fields,
    )
    return context, np.random.default_rng(0)


def random_codes(rng: np.random.Generator, limit: int) -> np.ndarray:
    return rng.integers(-limit, limit + 1, (1, HEADS, TOKENS, HEAD_DIM))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def test_a_distance_learns_from_deployed_planes_alone() -> None:
    """A plane's gate is differentiated where its bounds lie, of keys that the planes before it left."""
    planes, distance, temperature = 6, np.asarray([3000.0, 9000.0]), 0.3
    context, rng = context_of({}, tiny_model.relaxation(temperature))
    query, key = random_codes(rng, 300), random_codes(rng, 31)
    scores, slope = query @ np.swapaxes(key, 2, 3), rng.normal(size=(1, HEADS, TOKENS, TOKENS))

    def total(
        distance: jax.Array, scores: jax.Array, relaxed: Relaxation
    ) -> tuple[jax.Array, jax.Array]:
        found = soft_planes(
            jnp.asarray(query, jnp.int32),
            jnp.asarray(key, jnp.int32),
            context.pairs,
            distance,
            jnp.round(distance).astype(jnp.int32),
            jnp.asarray(float(planes)),
            scores,
            context.replace(relaxation=relaxed),
        )
        return jnp.sum(slope * found.weights), found.weights

    grads = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    point = (jnp.asarray(distance), jnp.asarray(scores, jnp.float64))
    (to_distance, to_scores), weights = grads(*point, tiny_model.relaxation(temperature))
    exists = np.ones((1, 1, TOKENS, TOKENS), bool)
    _, keep, (lower, upper) = reference_planes(query, key, exists, distance.astype(int), planes)
    unit = temperature * scores.std(axis=-1, keepdims=True)
    left, moved = np.ones(scores.shape), np.zeros(scores.shape)
    for plane in range(planes):
        largest = np.where(left > 0, lower[plane], -(2**40)).max(axis=-1, keepdims=True)
        gate = sigmoid((upper[plane] - largest + distance[:, None, None] + 0.5) / unit)
        moved = moved * gate + left * gate * (1.0 - gate) / unit
        left = keep[plane].astype(float)
    np.testing.assert_array_equal(weights, left)
    assert 0.1 < left.mean() < 0.9
    np.testing.assert_allclose(to_distance, np.sum(slope * moved, axis=(0, 2, 3)), rtol=1e-9)
    assert not np.any(to_scores)
    soft = tiny_model.relaxation(temperature, straight_through=False)
    assert np.any(grads(*point, soft)[0][1])


def test_a_probability_learns_from_the_deployed_mask_alone() -> None:
    """The gate's derivative, `-g (1 - g) / (temperature std)` times 1, of logarithms of 4-bit probabilities."""
    bits, ranges, tau, temperature = 12, (0.9, 0.8), np.asarray([0.02, 0.1]), 0.3
    stored = np.rint(tau * 2**16) / 2**16
    knobs = {"qk_bits": bits, "threshold": np.log(tau)[:, None]}
    names = {"sanger_query": ranges[0], "sanger_key": ranges[1]}
    context, rng = context_of(knobs, tiny_model.relaxation(), ranges=names)
    query, key = random_codes(rng, 2047), random_codes(rng, 2047)
    logit_scale, slope = 2e-6, rng.normal(size=(1, HEADS, TOKENS, TOKENS))

    def total(
        threshold: jax.Array, query: jax.Array, relaxed: Relaxation
    ) -> tuple[jax.Array, jax.Array]:
        operands = operands_of(query, key, logit_scale)
        changed = context.replace(
            knobs=context.knobs | {"threshold": threshold}, relaxation=relaxed
        )
        selection, _ = MECHANISMS["sanger"].soft.filter(changed, operands, Plan(), ())
        return jnp.sum(slope * selection.weights), selection.weights

    grads = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    point = (context.knobs["threshold"], jnp.asarray(query, jnp.float64))
    (to_threshold, to_query), weights = grads(*point, tiny_model.relaxation(temperature))
    logits = np.full((1, HEADS, TOKENS, TOKENS), logit_scale * 4.0 ** (bits - 8))
    parts = []
    for code, range_ in zip((query, key), ranges, strict=True):
        norm = np.linalg.norm(code, axis=-1, keepdims=True)
        stored_range = np.rint(range_ * 2**15) / 2**15
        low = np.clip(np.rint(code / norm * 7 / stored_range), -7, 7)
        parts.append(low * np.rint(norm / 2.0 ** (bits - 8)) * stored_range / 7)
    logits = logits * (parts[0] @ np.swapaxes(parts[1], 2, 3))
    logarithm = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    above = logarithm - np.log(stored)[:, None, None]
    width = temperature * logits.std(axis=-1, keepdims=True)
    gate = sigmoid(above / width)
    is_first = np.arange(TOKENS) == logits.argmax(axis=-1)[..., None]
    np.testing.assert_array_equal(weights, (above > 0) | is_first)
    assert 0.1 < np.mean(weights) < 0.9
    wanted = np.sum(slope * -gate * (1.0 - gate) / width, axis=(0, 2, 3))
    np.testing.assert_allclose(to_threshold[:, 0], wanted, rtol=1e-9)
    assert not np.any(to_query)
    soft = tiny_model.relaxation(temperature, straight_through=False)
    assert np.any(grads(*point, soft)[0][1])


def test_steps_of_a_search_are_taught_by_twice_as_many() -> None:
    """The derivative to log2 M_s is the difference of two powers of two, and that of what the steps cost is exact."""
    context, rng = context_of(
        # Distances of 3 and 5 logits, which are stored as they are.
        {"qk_bits": 12.0, "search_bits": 2.0, "threshold": part_variable([[3 / 16], [5 / 16]])},
        tiny_model.relaxation(),
        is_uniform=True,
    )
    query, key = random_codes(rng, 2047), random_codes(rng, 2047)
    slope = rng.normal(size=(1, HEADS, TOKENS, TOKENS))

    def total(
        bits: jax.Array, relaxed: Relaxation
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        knobs = {"search_bits": bits}
        changed = context.replace(
            knobs=context.knobs | knobs, widths=context.widths | knobs, relaxation=relaxed
        )
        operands = operands_of(jnp.asarray(query, jnp.float64), key, 3e-6)
        selection, counts = MECHANISMS["a3"].soft.filter(changed, operands, Plan(), ())
        steps = jnp.sum(counts.operations["predict.multiply"].count)
        return jnp.sum(slope * selection.weights), (selection.weights, steps)

    def seen(bits: float, *, straight_through: bool) -> tuple[np.ndarray, ...]:
        relaxed = tiny_model.relaxation(0.3, straight_through=straight_through)
        (value, (weights, steps)), (by_weights, by_steps) = derivatives(jnp.asarray(bits), relaxed)
        return tuple(np.asarray(x) for x in (value, weights, steps, by_weights, by_steps))

    @jax.jit
    def derivatives(bits: jax.Array, relaxed: Relaxation) -> Any:
        out, pull = jax.vjp(lambda bits: total(bits, relaxed), bits)
        zeros = jax.tree.map(jnp.zeros_like, out)
        of_weights = pull((jnp.ones(()), zeros[1]))[0]
        return out, (of_weights, pull((zeros[0], (zeros[1][0], jnp.ones(()))))[0])

    few, many = (seen(bits, straight_through=False) for bits in (2.0, 3.0))
    decided = {bits: seen(bits, straight_through=True)[1] for bits in (2.0, 3.0)}
    assert np.any(decided[2.0] != decided[3.0])
    for bits in (2.3, 2.7):
        soft, hard = (seen(bits, straight_through=own) for own in (False, True))
        np.testing.assert_allclose(soft[3], many[0] - few[0], rtol=1e-9)
        np.testing.assert_allclose(hard[3], many[0] - few[0], rtol=1e-9)
        np.testing.assert_array_equal(hard[1], decided[np.rint(bits)])
        steps = 2.0 * HEADS * TOKENS * 2.0**bits
        np.testing.assert_allclose((soft[2], soft[4]), (steps, steps * np.log(2.0)), rtol=1e-9)


def test_a_cascade_teaches_its_shares_alone() -> None:
    context, rng = context_of({"threshold": [0.3, -0.2, 0.5, 0.1]}, tiny_model.relaxation())
    hooks = MECHANISMS["spatten"].soft
    carry = hooks.start(1, HEADS, TOKENS) | {
        "token": jnp.asarray(np.tile(rng.uniform(size=TOKENS), (1, TOKENS, 1))),
        "head": jnp.asarray(np.tile(rng.uniform(size=HEADS), (1, TOKENS, 1))),
        "exists": jnp.ones((1, TOKENS, TOKENS)),
        "keep": jnp.ones((1, TOKENS, TOKENS)),
        "layer": jnp.ones((), jnp.int32),
    }
    slope = rng.normal(size=(1, HEADS, TOKENS, TOKENS))

    def total(
        threshold: jax.Array, importance: dict[str, jax.Array], relaxed: Relaxation
    ) -> tuple[jax.Array, jax.Array]:
        changed = context.replace(knobs={"threshold": threshold}, relaxation=relaxed)
        plan, _ = hooks.plan(changed, jnp.ones((1, TOKENS, 1)), None, carry | importance)
        return jnp.sum(slope * plan.keep), plan.keep

    assert_decisions_teach_thresholds_alone(
        total,
        context.knobs["threshold"],
        {name: carry[name] for name in ("token", "head")},
        np.asarray([True, True, False, False]),
    )


@dataclasses.dataclass(frozen=True)
class Predicted:
    """Arithmetic whose product has the weight `kernel`, `[D, 3 * H * d]`, and whose estimates stay as they are."""

    kernel: jax.Array

    def codes(self, x: jax.Array, site: str) -> jax.Array:
        return x

    def weight_codes(self, site: str) -> jax.Array:
        return self.kernel

    def estimate(self, accumulator: jax.Array, part: str) -> jax.Array:
        split = jnp.reshape(accumulator, (1, TOKENS, HEADS, HEAD_DIM))
        return jnp.swapaxes(split, 1, 2)


def test_predicted_scores_teach_facts_thresholds_alone() -> None:
    scales = {name: jnp.asarray(4e-3) for name in ("query", "key")}
    knobs = {
        "threshold": [[-0.5, -1.0, 0.2], [0.5, -2.0, 1.0]],
        "qk_bits": 12.0,
        "qkv.activation_bits": 8.0,
    }
    context, rng = context_of(knobs, tiny_model.relaxation(), scales=scales, width=3)
    kernel = rng.integers(-127, 128, (3, 3 * HEADS * HEAD_DIM))
    numbers = Predicted(jnp.asarray(kernel, jnp.float64))
    x = {"x": jnp.asarray(rng.integers(-20, 21, (1, TOKENS, 3)), jnp.float64)}
    slopes = [
        rng.normal(size=shape) for shape in ((HEADS, TOKENS, TOKENS), (HEADS, TOKENS), (TOKENS,))
    ]

    def total(
        threshold: jax.Array, x: dict[str, jax.Array], relaxed: Relaxation
    ) -> tuple[jax.Array, list[jax.Array]]:
        changed = context.replace(
            knobs=context.knobs | {"threshold": threshold}, relaxation=relaxed
        )
        plan, _ = MECHANISMS["fact"].soft.plan(changed, x["x"], numbers, ())
        made = [plan.keep, plan.queries, plan.ffn_full]
        return sum(jnp.sum(a * b[0]) for a, b in zip(slopes, made, strict=True)), made

    assert_decisions_teach_thresholds_alone(
        total, context.knobs["threshold"], x, np.ones((HEADS, 3), bool)
    )


def operands_of(query: jax.Array, key: np.ndarray, logit_scale: float) -> Operands:
    one, keys = jnp.ones(()), jnp.asarray(key, jnp.float64)
    return Operands(
        query=query, key=keys, value=keys, logit_scale=logit_scale * one, value_scale=one
    )


def assert_decisions_teach_thresholds_alone(
    total: Callable[..., Any], threshold: jax.Array, inputs: Any, is_taught: np.ndarray
) -> None:
    """Decisions are 0 or 1 and have derivatives to those entries of the threshold, to `inputs` only if they are soft."""
    grads = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    (to_threshold, to_inputs), decided = grads(threshold, inputs, tiny_model.relaxation())
    for leaf in jax.tree.leaves(decided):
        assert set(np.unique(leaf)) == {0.0, 1.0}
    np.testing.assert_array_equal(to_threshold != 0.0, is_taught)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(to_inputs))
    (to_threshold, to_inputs), _ = grads(
        threshold, inputs, tiny_model.relaxation(straight_through=False)
    )
    np.testing.assert_array_equal(to_threshold != 0.0, is_taught)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(to_inputs))
