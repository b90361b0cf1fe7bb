"""ESACT: similar rows and votes by hand, whole models on the integer path against the emulator and against training."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import existing, tensors
from tiny_policies import policy_of, run_hard, run_soft

from codesign.mechanisms import MECHANISMS
from codesign.mechanisms.esact import (
    OFF_CODE,
    WINDOW,
    codes,
    from_setting,
    from_strength,
    score_shift,
    to_strength,
)
from codesign.references import integers
from codesign.references.esact import (
    reference_sources,
    reference_top,
    reference_votes,
    score_shift as reference_shift,
)
from codesign.similarity import hard_sources, hard_votes, row_distances, soft_sources, soft_votes

VARIANTS = pytest.mark.parametrize("variant", ["patches", "bert", "decoder"])
SOFT_VARIANTS = pytest.mark.parametrize("variant", ["patches", "decoder"])
"""Without padding and with it, all pairs and causal ones: what soft paths tell apart, at two thirds of the compilation."""
SCALE = MECHANISMS["esact"].thresholds
OFF = (1.0, 0.0, 1.0)


# By hand


PREDICTED = np.asarray([[9, 1, 6, 0], [8, 2, 6, 1], [1, 9, 0, 7], [9, 0, 5, 1]])
"""The specification's predicted scores of a window of four rows, of which two keys stay."""


def places(sources: Any) -> np.ndarray:
    """The row of its window that each row takes."""
    return np.argmax(np.asarray(sources), axis=-1)


@pytest.mark.parametrize(
    ("similarity", "expected"),
    [(4, (0, 1, 2, 3)), (5, (0, 0, 2, 0)), (127, (0, 0, 2, 0)), (OFF_CODE, (0, 1, 2, 3))],
)
def test_similar_rows_of_the_worked_example(similarity: int, expected: tuple[int, ...]) -> None:
    exists = np.ones((1, 1, 4, 4), np.bool_)
    kept = reference_top(PREDICTED[None, None], exists, np.asarray([512]))
    rows = np.where(kept, PREDICTED, 0)
    np.testing.assert_array_equal(
        rows[0, 0], [[9, 0, 6, 0], [8, 0, 6, 0], [0, 9, 0, 7], [9, 0, 5, 0]]
    )
    stored = np.asarray([similarity])
    np.testing.assert_array_equal(reference_sources(rows, stored, 4)[0, 0], expected)
    ours = hard_sources(
        row_distances(jnp.asarray(rows, jnp.int32), 4), jnp.asarray(stored), OFF_CODE, 4
    )
    np.testing.assert_array_equal(places(ours)[0, 0], expected)


MAPS = np.asarray([[0, 0, 2, 0], [0, 0, 2, 2], [0, 1, 2, 0], [0, 0, 2, 3]])
"""The rows that four heads name for each of four tokens."""


@pytest.mark.parametrize(
    ("cut", "expected"), [(3, (0, 0, 2, 3)), (2, (0, 0, 2, 0)), (4, (0, 1, 2, 3)), (5, range(4))]
)
def test_votes_of_the_worked_example(cut: int, expected: Any) -> None:
    np.testing.assert_array_equal(reference_votes(MAPS[None], cut)[0], list(expected))
    votes = (MAPS[..., None] == np.arange(4)).sum(axis=0)
    ours = hard_votes(jnp.asarray(votes[None], jnp.int32), jnp.asarray(cut))
    np.testing.assert_array_equal(places(ours)[0], list(expected))


def random_rows(seed: int, num_rows: int = 21, keys: int = 12) -> np.ndarray:
    """Sparse rows, every third like the one before it, `[2, 3, T, S]`."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-500, 2000, (2, 3, num_rows, keys)) * (rng.random((keys,)) < 0.5)
    near = rows[:, :, :-1] + rng.integers(-40, 40, rows[:, :, :-1].shape)
    rows[:, :, 2::3] = near[:, :, 1::3]
    return rows


@pytest.mark.parametrize("similarity", [0, 6, 40, 127])
def test_windows_of_any_rows_against_a_plain_loop(similarity: int) -> None:
    rows = random_rows(similarity)
    stored = np.asarray([similarity, max(similarity - 3, 0), OFF_CODE])
    expected = reference_sources(rows, stored)
    ours = places(
        hard_sources(
            row_distances(jnp.asarray(rows, jnp.int32), WINDOW),
            jnp.asarray(stored),
            OFF_CODE,
            rows.shape[2],
        )
    )
    first = np.arange(rows.shape[2]) // WINDOW * WINDOW
    np.testing.assert_array_equal(ours + first, expected)
    # What a row takes is computed, and a window's first row always is.
    np.testing.assert_array_equal(np.take_along_axis(expected, expected, axis=-1), expected)
    assert np.all(expected[:, :, ::WINDOW] == np.arange(0, rows.shape[2], WINDOW))
    for cut in (1, 2, 3):
        tokens = reference_votes(expected, cut)
        np.testing.assert_array_equal(np.take_along_axis(tokens, tokens, axis=-1), tokens)
        votes = (ours[..., None] == np.arange(WINDOW)).sum(axis=1)
        mine = places(hard_votes(jnp.asarray(votes, jnp.int32), jnp.asarray(cut))) + first
        np.testing.assert_array_equal(mine, tokens)


def test_a_looser_threshold_never_makes_the_second_row_critical_nor_a_higher_cut_copy_more() -> (
    None
):
    rows = random_rows(7)
    found = [reference_sources(rows, np.full(3, similarity)) for similarity in range(0, 128, 9)]
    second = np.asarray([sources[:, :, 1::WINDOW] % WINDOW == 1 for sources in found], int)
    assert np.all(np.diff(second, axis=0) <= 0) and second.min() == 0 < second.max()
    own = np.arange(rows.shape[2])
    copied = [(reference_votes(found[5], cut) != own).sum() for cut in (1, 2, 3, 4)]
    assert all(np.diff(copied) <= 0) and copied[0] > 0 == copied[-1]


def test_soft_rows_tend_to_the_decided_ones() -> None:
    rows = random_rows(3)
    stored = np.asarray([5, 21, 64])
    apart = jnp.asarray(rows, jnp.float32)
    decided = reference_sources(rows, stored)
    is_on = jnp.asarray([True, True, True])
    with jax.enable_x64(True):
        # Half a step of the sum, so that no row lies on the threshold.

        @jax.jit
        def sources(apart: jax.Array, similarity: jax.Array, width: jax.Array) -> jax.Array:
            return soft_sources(
                row_distances(apart, WINDOW), similarity, is_on, width, apart.shape[2]
            )

        soft = sources(
            apart.astype(jnp.float64), jnp.asarray(stored / 64 + 1e-7), jnp.asarray(1e-8)
        )
        own = np.arange(rows.shape[2])
        np.testing.assert_allclose(np.sum(soft, axis=-1), 1.0, atol=1e-9)
        np.testing.assert_array_equal(places(soft) + own // WINDOW * WINDOW, decided)
        assert np.max(np.minimum(soft, 1.0 - soft)) < 1e-6
        votes = jnp.sum(soft, axis=1)
        for cut in (1.5, 2.5):
            tokens = soft_votes(votes, jnp.asarray(cut), jnp.asarray(True), jnp.asarray(1e-4))
            np.testing.assert_array_equal(
                places(tokens) + own // WINDOW * WINDOW,
                reference_votes(decided, int(np.ceil(cut))),
            )
        off = soft_votes(votes, jnp.asarray(1.0), jnp.asarray(False), jnp.asarray(0.1))
        assert np.all(places(off) == own % WINDOW)


def test_a_larger_threshold_cheapens_two_near_rows() -> None:
    """Derivative of the expected computed rows to s against finite differences, in float64."""
    with jax.enable_x64(True):
        rows = jnp.asarray([[[[9.0, 0.0, 6.0, 0.0], [8.0, 0.0, 6.0, 0.0]]]])
        is_on, width = jnp.asarray([True]), jnp.asarray(0.1)

        def computed(s: jax.Array) -> jax.Array:
            sources = soft_sources(row_distances(rows, 2), s[None], is_on, width, 2)
            return jnp.sum(jnp.diagonal(sources, axis1=-2, axis2=-1))

        s = jnp.asarray(0.2)
        slope = float(jax.grad(computed)(s))
        step = 1e-6
        finite = float((computed(s + step) - computed(s - step)) / (2 * step))
        assert slope < 0.0
        assert slope == pytest.approx(finite, rel=1e-6)


def test_derivatives_of_distances() -> None:
    """In float64 against finite differences, where no two entries are equal."""
    with jax.enable_x64(True):
        rows = jnp.asarray(np.random.default_rng(0).permutation(80).reshape(1, 1, 10, 8) * 7.0)
        weights = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, 3, 4, 4)))

        def total(rows: jax.Array) -> jax.Array:
            found = row_distances(rows, 4)
            return jnp.sum(weights * found.apart) + jnp.sum(weights[..., 0] * found.sizes)

        slope = jax.grad(total)(rows)
        for place in ((0, 0, 0, 0), (0, 0, 3, 2), (0, 0, 5, 7), (0, 0, 9, 1)):
            up, down = (total(rows.at[place].add(step)) for step in (1.0, -1.0))
            assert float(slope[place]) == pytest.approx(float(up - down) / 2.0), place


def test_codes_and_strengths() -> None:
    setting = np.asarray([0.15, 0.25, 0.75])
    knob = {"threshold": from_setting(tuple(setting), (1, 4, 3), {})}
    stored = codes(knob, {})
    np.testing.assert_array_equal(stored["threshold"], [[[154, 16]] * 4])
    np.testing.assert_array_equal(stored["vote_cut"], [3])
    off = codes({"threshold": from_setting(OFF, (1, 4, 3), {})}, {})
    np.testing.assert_array_equal(off["threshold"], [[[1024, OFF_CODE]] * 4])
    np.testing.assert_array_equal(off["vote_cut"], [5])
    start = codes({k: np.asarray(v) for k, v in MECHANISMS["esact"].knobs(1, 4).items()}, {})
    for name, value in stored.items():
        np.testing.assert_array_equal(start[name], value)
    strength = np.linspace(0.0, 1.0, 9)
    np.testing.assert_allclose(to_strength(from_strength(strength, {}), {}), strength, atol=1e-3)


@pytest.mark.parametrize(("head_dim", "shift"), [(16, 0), (32, 0), (33, 1), (64, 1), (128, 2)])
def test_the_largest_predicted_scores_fill_twenty_bits(head_dim: int, shift: int) -> None:
    assert score_shift(head_dim) == reference_shift(head_dim) == shift


def test_the_emulators_hybrid_logarithm() -> None:
    values = np.arange(-127, 128)
    rounded = [integers.hybrid_log(values), np.sign(values) * integers.hybrid_log(np.abs(values))]
    np.testing.assert_array_equal(*rounded)
    for number, level in (
        (5, 6),
        (7, 8),
        (9, 8),
        (10, 12),
        (13, 12),
        (14, 16),
        (100, 96),
        (112, 128),
    ):
        assert integers.hybrid_log(np.asarray([number]))[0] == level


# Whole models


@VARIANTS
def test_integer_path_equals_the_emulator(variant: str) -> None:
    model = tiny_model.random_model(variant)
    valid, pairs = existing(model)
    for seed, bits in ((0, 16.0), (1, 9.0)):
        deployment, output = run_hard(
            model, policy_of(model, "esact", seed=seed, bits=bits), "esact"
        )
        got = tiny_model.emulated(model, deployment, output)
        rows = np.broadcast_to(valid[None, :, None], got["source"].shape)
        critical = (got["source"] == np.arange(got["source"].shape[-1]))[rows].mean()
        assert 0.3 < critical < 0.98
        # What is copied is the same, bit for bit.
        heads = deployment.structure.num_heads
        for layer, context in enumerate(got["context"]):
            split = context.reshape(*context.shape[:2], heads, -1)
            taken = np.swapaxes(got["source"][layer], 1, 2)[..., None]
            np.testing.assert_array_equal(np.take_along_axis(split, taken, axis=1), split)


@SOFT_VARIANTS
def test_straight_through_decides_as_the_integer_path(variant: str) -> None:
    model = tiny_model.random_model(variant)
    valid, pairs = existing(model)
    policy = policy_of(model, "esact", seed=3)
    hard, soft = run_hard(model, policy, "esact")[1], run_soft(model, policy, "esact")
    for name, mask in (
        ("keep", pairs[None, None, :, None]),
        ("source", valid[None, :, None]),
        ("ffn_source", valid[None]),
    ):
        mask = np.broadcast_to(mask, hard.trace[name].shape)
        agree = np.asarray(soft.trace[name]) == np.asarray(hard.trace[name])
        # Float32 rounds a code the other way now and then, and every layer adds to it.
        assert np.mean(agree[mask]) > 0.97, name
    for key, operation in hard.workload.operations.items():
        other = soft.workload.operations[key]
        np.testing.assert_allclose(
            np.sum(other.count, 0), np.sum(operation.count, 0), rtol=0.1, err_msg=key
        )
        np.testing.assert_allclose(other.bits_a, operation.bits_a, err_msg=key)


@VARIANTS
def test_all_off_is_dense_bit_for_bit(variant: str) -> None:
    model = tiny_model.random_model(variant)
    policy = policy_of(model, "esact")
    _, whole = run_hard(model, policy, "esact")
    _, dense = run_hard(model, policy, "dense")
    for name, value in tensors(dense).items():
        np.testing.assert_array_equal(tensors(whole)[name], value, err_msg=name)
    assert SCALE is not None
    np.testing.assert_array_equal(SCALE.kept(whole.workload), 1.0)
    for name in ("similarity.add", "copy.bytes", "ffn.bytes"):
        np.testing.assert_array_equal(whole.workload.operations[name].count, 0.0)


def test_identical_tokens_share_one_row_of_a_window() -> None:
    model = tiny_model.random_model("bert")
    tokens = np.full_like(model.inputs["tokens"], 3)
    same = {"tokens": tokens, "valid": np.ones_like(model.inputs["valid"])}
    params = model.params | {"position": jnp.zeros_like(model.params["position"])}
    alike = tiny_model.Model(model.config, params, model.calibration, same)
    output = run_hard(alike, policy_of(alike, "esact", setting=(0.5, 0.25, 0.75)), "esact")[1]
    first = np.arange(tokens.shape[1]) // WINDOW * WINDOW
    for name in ("source", "ffn_source"):
        np.testing.assert_array_equal(
            output.trace[name], np.broadcast_to(first, output.trace[name].shape)
        )
    share = len(np.unique(first)) / len(first)
    queries = output.workload.rows["attention"].queries
    np.testing.assert_allclose(queries, share * tokens.shape[1])
    np.testing.assert_allclose(output.workload.block_gemms["up"].rows, share * tokens.shape[1])


@VARIANTS
def test_counts_are_those_of_a_plain_loop(variant: str) -> None:
    model = tiny_model.random_model(variant)
    _, output = run_hard(model, policy_of(model, "esact", seed=5), "esact")
    shape, trace = model.structure, output.trace
    width, depth = shape.width, shape.head_dim
    valid, pairs = existing(model)
    operations, gemms = output.workload.operations, output.workload.block_gemms
    for layer in range(shape.num_layers):
        for example in range(len(valid)):
            tokens = int(valid[example].sum())
            computed = [trace["ffn_source"][layer, example, t] == t for t in range(tokens)]
            assert gemms["up"].rows[example, layer] == sum(computed)
            criticals = 0
            for head in range(shape.num_heads):
                keep = trace["keep"][layer, 0, example, head] & pairs[example]
                source = trace["source"][layer, example, head]
                critical = [t for t in range(tokens) if source[t] == t]
                criticals += len(critical)
                compared = sum(
                    int(keep[t].sum() + keep[c].sum())
                    for t in range(tokens)
                    for c in critical
                    if t // WINDOW * WINDOW <= c < t
                )
                wanted = keep[critical].any(axis=0).sum()
                shared = sum(
                    int(keep[[c for c in critical if c // WINDOW == window]].any(axis=0).sum())
                    for window in {c // WINDOW for c in critical}
                )
                kept = keep[critical].sum()
                expected = {
                    "encode.encode": tokens * (width / shape.num_heads + 2 * depth),
                    "predict.shift_add": 2 * tokens * width * depth,
                    "filter0.shift_add": pairs[example].sum() * depth,
                    "select.compare": pairs[example].sum(),
                    "similarity.add": compared,
                    "generate.mac": 2 * wanted * width * depth,
                    "generate.bytes": wanted * depth * (12 + 12) / 8,
                    "fetch.bytes": shared * depth * (12 + 12) / 8,
                    "qk.mac": kept * depth,
                    "softmax.exp": kept,
                    "pv.mac": kept * depth,
                    "output.divide": len(critical) * depth,
                    "copy.bytes": (tokens - len(critical)) * depth,
                    "ffn.bytes": (tokens - sum(computed)) * width * 2 / shape.num_heads,
                }
                assert operations.keys() == expected.keys()
                for key, count in expected.items():
                    assert operations[key].count[example, layer, head] == pytest.approx(count), key
            assert gemms["qkv"].rows[example, layer] == pytest.approx(criticals / shape.num_heads)


def test_every_entry_of_the_knob_has_a_gradient() -> None:
    model = tiny_model.random_model("bert")
    slopes = tiny_model.knob_slopes(model, policy_of(model, "esact", seed=6, bits=11.4), "esact")
    for knob in ("threshold", "qk_bits", "qkv.weight_bits", "qkv.activation_bits"):
        assert np.all(np.isfinite(slopes[knob])), knob
        assert np.any(slopes[knob] != 0.0), knob
    assert np.all(np.any(slopes["threshold"] != 0.0, axis=(0, 1)))
