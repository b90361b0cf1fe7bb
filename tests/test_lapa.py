"""LAPA: the specification's examples of its rounds, whole models against the emulator and against training, and counts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import existing, tensors
from tiny_policies import policy_of, run_hard, run_soft

from codesign.gates import Relaxation, gate_width
from codesign.log_codes import leading_one
from codesign.mechanisms import MECHANISMS
from codesign.mechanisms.energon_round import hard_round as energon_round
from codesign.mechanisms.lapa import (
    OFF_CODE,
    codes,
    from_setting,
    from_strength,
    hard_round,
    knobs,
    plane_operand,
    soft_filter,
    soft_round,
    to_strength,
)
from codesign.mechanisms.on_demand import top_code
from codesign.mechanisms.protocol import Context, Operands, Plan
from codesign.references import integers
from codesign.references.lapa import reference_rounds, top_planes

VARIANTS = pytest.mark.parametrize("variant", ["patches", "bert", "decoder"])
SOFT_VARIANTS = pytest.mark.parametrize("variant", ["patches", "decoder"])
"""Without padding and with it, all pairs and causal ones: what soft paths tell apart, at two thirds of the compilation."""
SCALE = MECHANISMS["lapa"].thresholds
survivors = jax.jit(hard_round)

# Hand example of the specification: d = 2, S = 5.
HAND_QUERY = np.asarray([5, -12])
HAND_KEYS = np.asarray([[100, -70], [40, -20], [-90, 64], [70, 30], [20, -110]])


def relaxation(temperature: float = 0.1, *, straight_through: bool = False) -> Relaxation:
    return Relaxation(
        temperature=jnp.asarray(temperature),
        smoothness=jnp.ones(()),
        straight_through=straight_through,
    )


def one_row(scores: Any, alive: Any, code: int) -> set[int]:
    """Indices that one round keeps of a row."""
    row = jnp.asarray(scores, jnp.int32)[None, None, None]
    keep = survivors(row, jnp.asarray(alive, bool)[None, None, None], jnp.asarray([code]))
    return set(np.flatnonzero(keep[0, 0, 0]).tolist())


def random_rounds(seed: int) -> tuple[jax.Array, jax.Array]:
    """Scores `[2, 3, 5, 37]` from narrow (many ties) to wide, and alive keys, in one row none."""
    rng = np.random.default_rng(seed)
    spread = rng.choice([1, 3, 40, 100000], size=(2, 3, 5, 1))
    scores = np.rint(rng.normal(size=(2, 3, 5, 37)) * spread)
    alive = rng.random(scores.shape) < rng.choice([0.1, 0.5, 1.0], size=(2, 3, 5, 1))
    alive[0, 0, 0] = False
    return jnp.asarray(scores, jnp.int32), jnp.asarray(alive)


# Rounds


def test_the_hand_example() -> None:
    powers = np.asarray(leading_one(jnp.asarray(HAND_QUERY)))
    np.testing.assert_array_equal(powers, [4, -8])
    planes = [top_planes(HAND_KEYS, bits) for bits in (2, 4, 8)]
    scores = [part @ powers for part in planes]
    np.testing.assert_array_equal(scores[0], [768, 0, -768, 256, 512])
    np.testing.assert_array_equal(scores[1][[0, 3, 4]], [896, 128, 832])
    np.testing.assert_array_equal(scores[2], [960, 320, -872, 40, 960])
    alive = np.ones(5, bool)
    for code, row, kept in (
        (128, scores[0], {0, 3, 4}),
        (102, scores[1], {0, 4}),
        (128, scores[2], {0, 4}),
    ):
        assert one_row(row, alive, code) == kept
        alive = np.isin(np.arange(5), list(kept))


def test_a_product_with_a_leading_one_is_the_papers() -> None:
    """`aloc(x, y) = x sign(y) 2^floor(log2 |y|)`, half of SOFA's `dlzs`."""
    for x, y, product in ((5, 6, 20), (-3, -4, 12), (7, 1, 7)):
        assert x * int(integers.leading_one(np.asarray(y))) == product
    y = np.concatenate([np.arange(-127, 0), np.arange(1, 128)])
    ratio = integers.leading_one(y) / y
    assert ratio.min() > 0.5 and ratio.max() == 1.0
    np.testing.assert_array_equal(ratio == 1.0, np.abs(y) & (np.abs(y) - 1) == 0)


def test_rounds_add_up_what_the_planes_add() -> None:
    """The chip adds what each plane brings; here a round's scores are made anew: the same numbers, of all pairs."""
    rng = np.random.default_rng(11)
    query, key = (rng.integers(-127, 128, (2, 3, size, 16)) for size in (5, 40))
    exists = np.ones((2, 1, 5, 40), bool)
    widths, alpha = (2, 4, 8), np.asarray([[140, 128, 128]] * 3)
    scores, keep = reference_rounds(query, key, exists, alpha, widths)
    powers, total, before = integers.leading_one(query), np.zeros((2, 3, 5, 40), np.int64), 0
    for number, bits in enumerate(widths):
        plane = top_planes(key, bits)
        total = total + powers @ np.swapaxes(plane - before, -1, -2)
        np.testing.assert_array_equal(scores[number], total)
        before = plane
    np.testing.assert_array_equal(total, powers @ np.swapaxes(key, -1, -2))
    # Who is dropped never comes back, and what later planes would add to its score decides nothing.
    assert np.all(keep[1] <= keep[0]) and np.all(keep[2] <= keep[1])
    assert 0 < keep[2].sum() < keep[1].sum() < keep[0].sum() < keep[0].size
    for row in range(5):
        dead = ~keep[0][:, :, row]
        changed = np.where(dead[..., None], top_planes(key, 2), key)
        _, again = reference_rounds(query, changed, exists, alpha, widths)
        np.testing.assert_array_equal(again[:, :, :, row], keep[:, :, :, row])


def test_the_last_plane_is_the_whole_key() -> None:
    every = np.arange(-127, 128)
    np.testing.assert_array_equal(top_planes(every, 8), every)
    np.testing.assert_array_equal(top_planes(np.asarray([100, -70, 63]), 2), [64, -64, 0])


@pytest.mark.parametrize("seed", range(4))
def test_a_round_is_its_rational_definition(seed: int) -> None:
    scores, alive = random_rounds(seed)
    code = jnp.asarray([[0, 128, 255], [1, 77, OFF_CODE], [200, 3, 254], [128, 128, 128]][seed])
    kept = np.asarray(survivors(scores, alive, code))
    wide, there = np.asarray(scores, np.int64), np.asarray(alive)
    number = there.sum(-1, keepdims=True)
    total = np.where(there, wide, 0).sum(-1, keepdims=True)
    top = np.where(there, wide, -(2**40)).max(-1, keepdims=True)
    a = np.asarray(code)[None, :, None, None]
    right = 128 * number * top - a * (number * top - total)
    expected = there & ((128 * number * wide >= right) | (a == OFF_CODE))
    np.testing.assert_array_equal(kept, expected)
    # A row never empties; a constant, or a positive factor on all scores, changes nothing.
    np.testing.assert_array_equal(kept.any(-1), there.any(-1))
    np.testing.assert_array_equal(survivors(scores + 1000, alive, code), kept)
    np.testing.assert_array_equal(survivors(3 * scores, alive, code), kept)


def test_limits_of_alpha() -> None:
    row = [3, 9, 9, -4, 0]
    everything = np.ones(5, bool)
    assert one_row(row, everything, 0) == {1, 2}
    assert one_row(row, everything, 128) == {1, 2}
    assert one_row(row, everything, OFF_CODE) == {0, 1, 2, 3, 4}
    assert one_row([7] * 5, everything, 0) == {0, 1, 2, 3, 4}


def test_a_larger_alpha_never_drops_a_key() -> None:
    scores, alive = random_rounds(7)
    before = np.zeros(scores.shape, bool)
    for code in (0, 40, 128, 200, 255, OFF_CODE):
        kept = np.asarray(survivors(scores, alive, jnp.full((3,), code)))
        assert np.all(before <= kept)
        before = kept


def test_up_to_one_it_is_energons_threshold_but_for_keys_on_it() -> None:
    rng = np.random.default_rng(3)
    scores = jnp.asarray(rng.normal(size=(4, 3, 5, 37)) * 1e5, jnp.int32)
    alive = jnp.ones(scores.shape, bool)
    for code in (0, 30, 128):
        theirs = energon_round(scores, alive, jnp.full((3,), 128 - code))
        ours = survivors(scores, alive, jnp.full((3,), code))
        assert np.mean(np.asarray(theirs) != np.asarray(ours)) < 1e-3


def test_statistics_on_gaussian_rows() -> None:
    kept, recalls = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        query, key = rng.standard_normal((256, 64)), rng.standard_normal((512, 64))
        query, key = (np.rint(x / np.abs(x).max() * 127).astype(np.int64) for x in (query, key))
        exists = np.ones((1, 1, 256, 512), bool)
        _, keep = reference_rounds(
            query[None, None], key[None, None], exists, np.full((1, 3), 128), (2, 4, 8)
        )
        kept.append(keep.mean(axis=(1, 2, 3, 4)))
        rank = np.argsort(np.argsort(-(query @ key.T), axis=-1, kind="stable"), axis=-1)
        found = keep[-1, 0, 0]
        best = rank < found.sum(-1, keepdims=True)
        recalls.append(np.mean((best & found).sum(-1) / found.sum(-1)))
    np.testing.assert_allclose(np.mean(kept, axis=0), [0.503, 0.250, 0.110], atol=0.01)
    assert np.mean(recalls) == pytest.approx(0.732, abs=0.01)


# Soft forms


def test_threshold_falls_with_alpha_by_the_distance_of_the_maximum_from_the_mean() -> None:
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        scores = jnp.asarray(rng.normal(size=(1, 1, 1, 20)))
        ones, zero = jnp.ones_like(scores), jnp.zeros((1, 1, 1, 1))

        def total(alpha: jax.Array) -> jax.Array:
            return jnp.sum(soft_round(scores, ones, ones, alpha, relaxation(0.5), zero))

        alpha, step = jnp.asarray([0.8]), 1e-6
        gradient = float(jax.grad(total)(alpha)[0])
        difference = float(total(alpha + step) - total(alpha - step)) / (2 * step)
        # Of a gate g of width w: d g / d alpha = g (1 - g) / w * -(d theta / d alpha).
        row = np.ravel(scores)
        gate = np.ravel(soft_round(scores, ones, ones, alpha, relaxation(0.5), zero))
        width = 0.5 * float(gate_width(jnp.asarray(row.std())))
        slope = row.max() - row.mean()
    assert gradient == pytest.approx(difference, rel=1e-6)
    assert gradient == pytest.approx(np.sum(gate * (1.0 - gate)) / width * slope, rel=1e-6)
    assert gradient > 0.0


def test_bit_operations_move_with_what_is_left_for_each_plane() -> None:
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        widths = {"qk_bits": jnp.asarray(8.0), "key_bits": jnp.asarray([2.0, 4.0, 8.0])}
        query, key = (
            jnp.asarray(np.rint(rng.normal(size=(1, 1, size, 4)) * 40)) for size in (3, 12)
        )

        @jax.jit
        def counted(threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Products of each round per pair, and bits of its plane."""
            context = Context(
                knobs={"threshold": threshold, "key_bits": widths["key_bits"]},
                widths=widths,
                ranges={},
                relaxation=relaxation(0.3),
                valid=jnp.ones((1, 12)),
                pairs=jnp.ones((1, 1, 12, 12)),
                tracing=False,
            )
            padded = jnp.pad(query, ((0, 0), (0, 0), (0, 9), (0, 0)))
            operands = Operands(
                query=padded, key=key, value=key, logit_scale=jnp.ones(()), value_scale=jnp.ones(())
            )
            _, counts = soft_filter(context, operands, Plan(notes={"key": key}), ())
            rounds = [counts.operations[f"filter{index}.shift_add"] for index in range(3)]
            number = jnp.stack([jnp.sum(one.count) for one in rounds]) / (12 * 12 * 4)
            return number, jnp.stack([one.bits_a[0, 0] for one in rounds])

        def total(threshold: jax.Array) -> jax.Array:
            number, bits = counted(threshold)
            return jnp.sum(number * bits)

        threshold = jnp.asarray([[0.2, -0.3, 0.1]])
        slope = np.ravel(jax.grad(total)(threshold))
        left, bits = jax.jacobian(lambda v: counted(v)[0])(threshold), counted(threshold)[1]
        np.testing.assert_array_equal(bits, [1.0, 2.0, 4.0])
        np.testing.assert_allclose(slope, np.asarray(bits) @ np.asarray(left)[:, 0], rtol=1e-12)
        steps = 1e-6 * np.eye(3)[:, None]
        for place, step in enumerate(steps):
            difference = float(total(threshold + step) - total(threshold - step)) / 2e-6
            # The widths of later gates are constants for differentiation.
            assert slope[place] == pytest.approx(difference, rel=5e-3, abs=1e-8)
    # The last threshold decides about no later plane; a larger alpha leaves more for those that follow.
    assert slope[2] == 0.0 and np.all(slope[:2] > 0.0)


def test_soft_round_becomes_hard_as_the_temperature_falls() -> None:
    rng = np.random.default_rng(1)
    scores = jnp.asarray(rng.normal(size=(2, 3, 5, 37)) * 1000, jnp.int32)
    alive = jnp.asarray(rng.random(scores.shape) < 0.7)
    code = jnp.asarray([40, 128, 200])
    hard = survivors(scores, alive, code)
    weights, spread = alive.astype(jnp.float32), jnp.full((2, 3, 5, 1), 1000.0)
    soft = weights * soft_round(
        scores.astype(jnp.float32), weights, weights, code / 128, relaxation(1e-5), spread
    )
    np.testing.assert_allclose(soft, hard, atol=1e-3)


def test_planes_and_top_codes_have_straight_through_derivatives() -> None:
    code = jnp.asarray([100.0, -70.0, 3.0])
    deployed = relaxation(straight_through=True)

    def seen(code: jax.Array, bits: jax.Array) -> jax.Array:
        return plane_operand(code, bits, jnp.asarray(4.0), deployed)

    np.testing.assert_array_equal(
        seen(code, jnp.asarray(3.7)), top_planes(np.asarray(code, np.int64), 4)
    )
    slope, of_bits = jax.vjp(seen, code, jnp.asarray(3.7))[1](jnp.ones((3,)))
    np.testing.assert_array_equal(slope, 1.0)
    gap = top_planes(np.asarray(code, np.int64), 4) - top_planes(np.asarray(code, np.int64), 3)
    assert float(of_bits) == pytest.approx(float(np.sum(gap)))
    wide = jnp.asarray([32767.0, -32767.0, 300.0, -1.0])
    np.testing.assert_array_equal(top_code(wide, jnp.asarray(16.0)), [127, -127, 1, -1])


def test_codes_of_alpha() -> None:
    stored = codes({"threshold": np.asarray(knobs(1, 1)["threshold"])}, {})["threshold"]
    np.testing.assert_array_equal(stored, [[[160, 141, 128]]])
    off = from_setting((2.0, 1.0, 0.0), (1, 1, 3), {})
    np.testing.assert_array_equal(
        codes({"threshold": off}, {})["threshold"], [[[OFF_CODE, 128, 0]]]
    )
    strength = np.linspace(0.0, 1.0, 9)
    assert np.all(np.diff(from_strength(strength, {})) < 0.0)
    np.testing.assert_allclose(to_strength(from_strength(strength, {}), {}), strength, atol=1e-3)


# Whole models


PLANES = (3.0, 5.0, 7.0)
"""Bits of a key after each round."""


def test_next_to_equal_scores_do_not_drown_the_others() -> None:
    """Two equal keys alive, or one, of scores that spread over thousands."""
    scores = jnp.asarray([9000.0, 9000.0, -7000.0, 4000.0, -2000.0, 500.0])
    pairs = jnp.ones((1, 1, 1, 6))
    relaxed, spread = tiny_model.relaxation(0.1), jnp.full((1, 1, 1, 1), jnp.std(scores))

    def left(weights: jax.Array) -> jax.Array:
        rows = (jnp.reshape(one, (1, 1, 1, 6)) for one in (scores, weights))
        return jnp.sum(soft_round(*rows, pairs, jnp.asarray([1.0]), relaxed, spread))

    for alive in ([1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]):
        slopes = jax.grad(left)(jnp.asarray(alive))
        # A key that returned would move the mean by three spreads, so the gate by 3 / (4 * 0.1 * 1/2) and what follows.
        assert 0.0 < float(jnp.max(jnp.abs(slopes))) < 50.0


def test_thresholds_learn_from_deployed_rounds_and_predictions_do_not() -> None:
    """Slopes to the first threshold lie where whole keys do; queries and predicted keys get some only if soft."""
    rng = np.random.default_rng(0)
    query, key = (
        jnp.asarray(rng.integers(-size, size + 1, (1, 1, 64, 8)), jnp.float32) for size in (100, 66)
    )
    widths = {"qk_bits": jnp.asarray(8.0), "key_bits": jnp.asarray([2.0, 4.0, 8.0])}
    pairs = jnp.ones((1, 1, 64, 64))

    @functools.partial(jax.jit, static_argnums=3)
    def left(
        threshold: jax.Array, query: jax.Array, key: jax.Array, straight_through: bool
    ) -> jax.Array:
        context = Context(
            knobs={"threshold": threshold, "key_bits": widths["key_bits"]},
            widths=widths,
            ranges={},
            relaxation=relaxation(0.05, straight_through=straight_through),
            valid=jnp.ones((1, 64)),
            pairs=pairs,
            tracing=False,
        )
        operands = Operands(
            query=query, key=key, value=key, logit_scale=jnp.ones(()), value_scale=jnp.ones(())
        )
        _, counts = soft_filter(context, operands, Plan(notes={"key": key}), ())
        return jnp.sum(counts.operations["filter1.statistic"].count)

    slopes = jax.jit(jax.grad(left, argnums=(0, 1, 2)), static_argnums=3)
    threshold = jnp.zeros((1, 3))
    assert 0 < left(threshold, query, key, True) < 64 * 64
    to_threshold, to_query, to_key = slopes(threshold, query, key, True)
    powers = jnp.asarray(integers.leading_one(np.asarray(query, np.int64)), jnp.float32)
    whole = jnp.matmul(powers, jnp.swapaxes(key, 2, 3))
    spread = jnp.std(whole, axis=-1, keepdims=True)

    def first(v: jax.Array) -> jax.Array:
        alpha = 2.0 * jax.nn.sigmoid(v)
        return jnp.sum(soft_round(whole, pairs, pairs, alpha, relaxation(0.05), spread))

    expected = jax.grad(first)(threshold[:, 0])
    np.testing.assert_allclose(to_threshold[:, 0], expected, rtol=1e-4)
    np.testing.assert_array_equal(to_threshold[:, 1:], 0.0)
    assert not np.any(to_query) and not np.any(to_key)
    _, to_query, to_key = slopes(threshold, query, key, False)
    assert np.any(to_query) and np.any(to_key)


@VARIANTS
def test_integer_path_equals_the_emulator(variant: str) -> None:
    model = tiny_model.random_model(variant)
    _, pairs = existing(model)
    for seed, bits in ((0, 16.0), (1, 9.0)):
        policy = policy_of(model, "lapa", seed=seed, key_bits=(3.0 + seed, *PLANES[1:]), bits=bits)
        deployment, output = run_hard(model, policy, "lapa")
        got = tiny_model.emulated(model, deployment, output)
        keep = got["keep"] & pairs[None, None, :, None]
        shares = np.sum(keep, axis=(0, 2, 3, 4, 5)) / (
            np.sum(pairs) * keep.shape[0] * keep.shape[3]
        )
        assert 0.1 < shares[2] < shares[1] < shares[0] < 0.99


@SOFT_VARIANTS
def test_straight_through_decides_as_the_integer_path(variant: str) -> None:
    model = tiny_model.random_model(variant)
    _, pairs = existing(model)
    policy = policy_of(model, "lapa", seed=3, key_bits=PLANES)
    _, hard = run_hard(model, policy, "lapa")
    soft = run_soft(model, policy, "lapa")
    mask = np.broadcast_to(pairs[None, None, :, None], hard.trace["keep"].shape)
    agree = np.asarray(soft.trace["keep"]) == hard.trace["keep"]
    # Float32 rounds a code the other way now and then, and every layer adds to it.
    assert np.mean(agree[mask]) > 0.98
    for key, operation in hard.workload.operations.items():
        other = soft.workload.operations[key]
        np.testing.assert_allclose(
            np.sum(other.count), np.sum(operation.count), rtol=0.03, err_msg=key
        )
        np.testing.assert_allclose(other.bits_a, operation.bits_a, err_msg=key)


@VARIANTS
def test_rounds_off_are_dense_attention_bit_for_bit(variant: str) -> None:
    model = tiny_model.random_model(variant)
    policy = policy_of(model, "lapa")
    _, whole = run_hard(model, policy, "lapa")
    _, dense = run_hard(model, policy, "dense")
    for name, value in tensors(dense).items():
        np.testing.assert_array_equal(tensors(whole)[name], value, err_msg=name)
    assert SCALE is not None
    np.testing.assert_array_equal(SCALE.kept(whole.workload), 1.0)


@VARIANTS
def test_counts_are_those_of_a_plain_loop(variant: str) -> None:
    model = tiny_model.random_model(variant)
    deployment, output = run_hard(model, policy_of(model, "lapa", seed=5, key_bits=PLANES), "lapa")
    shape = deployment.structure
    valid, pairs = existing(model)
    keep = output.trace["keep"] & pairs[None, None, :, None]
    operations = output.workload.operations
    widths = [1, *deployment.layers["key_bits"][0]]
    for layer in range(shape.num_layers):
        for example in range(len(valid)):
            tokens = int(valid[example].sum())
            for head in range(shape.num_heads):
                rounds = keep[layer, :, example, head]
                alive = [pairs[example].sum(), *(one.sum() for one in rounds)]
                made = 2 * rounds[-1].any(axis=0).sum() * shape.width * shape.head_dim
                expected = {
                    "predict.shift_add": tokens * shape.width * shape.head_dim,
                    "encode.encode": tokens * shape.head_dim,
                    "generate.mac": made,
                    "qk.mac": alive[-1] * shape.head_dim,
                    "softmax.exp": alive[-1],
                    "pv.mac": alive[-1] * shape.head_dim,
                    "output.divide": tokens * shape.head_dim,
                }
                for index in range(3):
                    expected[f"filter{index}.shift_add"] = alive[index] * shape.head_dim
                    expected[f"filter{index}.statistic"] = alive[index]
                    expected[f"filter{index}.compare"] = alive[index]
                assert operations.keys() == expected.keys()
                for key, count in expected.items():
                    assert operations[key].count[example, layer, head] == count, key
    planes = [float(operations[f"filter{index}.shift_add"].bits_a[0, 0, 0]) for index in range(3)]
    np.testing.assert_array_equal(planes, np.diff(widths))


def test_every_knob_has_a_gradient() -> None:
    model = tiny_model.random_model("bert")
    slopes = tiny_model.knob_slopes(
        model, policy_of(model, "lapa", seed=6, key_bits=PLANES, bits=11.4), "lapa"
    )
    own = "key_bits"
    for knob in ("threshold", own, "qk_bits", "qkv.weight_bits", "qkv.activation_bits"):
        assert np.all(np.isfinite(slopes[knob])), knob
        assert np.any(slopes[knob] != 0.0), knob
