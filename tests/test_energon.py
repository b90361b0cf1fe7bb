"""Energon's filter in JAX: the specification's tests on the hard and the relaxed functions."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import WIDTHS, all_pairs, run_filter

from codesign.gates import Relaxation
from codesign.mechanisms.energon import alpha_code, codes
from codesign.mechanisms.energon_round import (
    OFF_CODE,
    deployed_round,
    exact_total,
    filter_operand,
    hard_round,
    soft_round,
)
from codesign.references.energon import reference_filter

# Hand example of the specification: d = 2, S = 6.
HAND_QUERY = [24576, -12288]
HAND_KEYS = [[7, -8], [4, -4], [1, 2], [-3, 1], [-6, 5], [5, 3]]


hard_keep = jax.jit(hard_round)
soft_gate = jax.jit(soft_round)


def keep_one_row(scores: Sequence[int], code: int) -> set[int]:
    """Indices that one round keeps of a row whose keys are all alive."""
    row = jnp.asarray(scores, jnp.int32)[None, None, None, :]
    keep = hard_keep(row, jnp.ones_like(row, bool), jnp.asarray([code], jnp.int32))
    return set(np.flatnonzero(keep[0, 0, 0]).tolist())


def rational_keep(scores: np.ndarray, alive: np.ndarray, code: np.ndarray) -> np.ndarray:
    """The definition in 64-bit integers, `[N, S]`, one code per row `[N]`; no division."""
    a = code[:, None]
    number = alive.sum(-1, keepdims=True)
    total = np.where(alive, scores, 0).sum(-1, keepdims=True)
    top = np.where(alive, scores, np.iinfo(np.int64).min).max(-1, keepdims=True)
    bottom = np.where(alive, scores, np.iinfo(np.int64).max).min(-1, keepdims=True)
    right = np.where(
        a >= 0, a * number * top + (128 - a) * total, -a * number * bottom + (128 + a) * total
    )
    is_top = alive & (scores == top)
    is_first_top = is_top & (np.cumsum(is_top, axis=-1) == 1)
    keep: np.ndarray = alive & ((128 * number * scores > right) | is_first_top | (a == OFF_CODE))
    return keep


def random_rows(seed: int, num_rows: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Rows of integer scores from narrow (many ties) to wide and shifted either way, and alive keys."""
    rng = np.random.default_rng(seed)
    spread = rng.choice([1, 3, 40, 1000], size=(num_rows, 1))
    offset = rng.choice([-3000, -7, 0, 5, 3000], size=(num_rows, 1))
    scores = np.rint(rng.normal(size=(num_rows, 37)) * spread + offset).astype(np.int64)
    alive = rng.random(scores.shape) < rng.choice([0.1, 0.5, 1.0], size=(num_rows, 1))
    alive[np.arange(num_rows), rng.integers(37, size=num_rows)] = True
    return scores, alive


def by_head(rows: np.ndarray) -> jax.Array:
    """`[N, S]` as `[1, N, 1, S]`: every row a head, so that each has its own threshold."""
    return jnp.asarray(rows)[None, :, None, :]


def random_codes(seed: int, bits: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Codes of Q `[2, 3, 20, 16]` and K `[2, 3, 33, 16]`."""
    rng = np.random.default_rng(seed)
    limit = 2 ** (bits - 1) - 1
    query, key = (
        np.clip(np.rint(rng.normal(size=shape) * limit / 3), -limit, limit).astype(np.int64)
        for shape in ((2, 3, 20, 16), (2, 3, 33, 16))
    )
    return query, key


@pytest.mark.parametrize("width", [2, 4, 8])
def test_filter_operands_are_the_top_bits(width: int) -> None:
    every = np.arange(-32767, 32768)
    low = filter_operand(
        jnp.asarray(every, jnp.float32),
        jnp.asarray(float(width)),
        jnp.asarray(float(width)),
        jnp.asarray(16.0),
        straight_through=True,
    )
    np.testing.assert_array_equal(low, every >> (16 - width))
    relaxed = filter_operand(
        jnp.asarray(every, jnp.float32),
        jnp.asarray(float(width)),
        jnp.asarray(float(width)),
        jnp.asarray(16.0),
        straight_through=False,
    )
    np.testing.assert_array_equal(relaxed, low)


def test_second_round_equals_reuse_of_the_first() -> None:
    query, key = random_codes(0)
    trace = run_filter(query, key, np.full((3, 2), OFF_CODE)).trace
    query_4, key_4, key_2 = query >> 12, key >> 12, key >> 14
    rest = key_4 - 4 * key_2
    assert rest.min() == 0 and rest.max() == 3
    first = np.einsum("bhtd,bhsd->bhts", query_4, key_2)
    np.testing.assert_array_equal(trace["scores"][0], first)
    reused = 4 * first + np.einsum("bhtd,bhsd->bhts", query_4, rest)
    np.testing.assert_array_equal(trace["scores"][1], reused)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("code", "kept"),
    # Round 1 over scores 66, 36, 21 (sum 123): 128 * 3 * S = 25344, 13824, 8064 against 18144,
    # 13824 (strict) and 13344.
    [(32, {0}), (-32, {0}), (-40, {0, 1})],
)
def test_hand_example(code: int, kept: set[int]) -> None:
    query = np.asarray(HAND_QUERY)[None, None, None, :]
    key = (np.asarray(HAND_KEYS) << 12)[None, None]
    threshold = np.asarray([[0, code]])
    variable = np.arctanh(threshold / 128)
    for selection in (
        run_filter(query, key, threshold),
        run_filter(query, key, variable, soft=tiny_model.relaxation()),
    ):
        scores = np.asarray(selection.trace["scores"])[:, 0, 0, 0]
        keep = np.asarray(selection.trace["keep"])[:, 0, 0, 0]
        assert scores[0].tolist() == [12, 9, 0, -6, -15, 6]
        assert scores[1, [0, 1, 5]].tolist() == [66, 36, 21]
        assert np.flatnonzero(keep[0]).tolist() == [0, 1, 5]
        assert set(np.flatnonzero(keep[1]).tolist()) == kept
        np.testing.assert_array_equal(selection.weights[0, 0, 0], keep[1])


def test_hand_example_with_a_negative_sum() -> None:
    # q = -6, rest 2: (-600 - 528 + 44) >> 7 = -9.
    assert keep_one_row([-15, -6, 0, -1], -40) == {1, 2, 3}


@pytest.mark.parametrize("seed", range(3))
def test_integer_threshold_equals_the_rational_definition(seed: int) -> None:
    scores, alive = random_rows(seed)
    code = np.random.default_rng(seed + 50).integers(-128, 128, size=len(scores))
    keep = hard_keep(by_head(scores.astype(np.int32)), by_head(alive), jnp.asarray(code, jnp.int32))
    wanted = rational_keep(scores, alive, code)
    np.testing.assert_array_equal(keep[0, :, 0], wanted)
    assert 0.1 < wanted[alive].mean() < 0.9
    # Ties at the threshold and at the maximum, and negative sums, occur.
    is_tie = np.diff(np.sort(np.where(alive, scores, -(10**9)), axis=-1)[:, -2:], axis=-1) == 0
    assert is_tie.sum() > 100 and (np.where(alive, scores, 0).sum(-1) < 0).sum() > 1000


def test_limits() -> None:
    assert keep_one_row([3, -3, 0, 3], OFF_CODE) == {0, 1, 2, 3}
    # (127 * 100 + 66 // 4) >> 7 = 99: a score of 99 is not above it; a theta of 98 lets it stay.
    assert keep_one_row([-41, 99, 100, -100], 127) == {2}
    assert keep_one_row([-400, 99, 100, -100], 127) == {1, 2}
    for code in (-127, -1, 0, 1, 127):
        assert keep_one_row([5, 5, 5], code) == {0}
        assert keep_one_row([-7], code) == {0}


@pytest.mark.parametrize("seed", range(2))
def test_raising_the_threshold_never_adds_a_key(seed: int) -> None:
    scores, alive = random_rows(seed, num_rows=500)
    before = alive
    for code in range(-128, 128, 5):
        keep = np.asarray(
            hard_keep(
                by_head(scores.astype(np.int32)),
                by_head(alive),
                jnp.full(len(scores), code, jnp.int32),
            )
        )[0, :, 0]
        assert not np.any(keep & ~before)
        assert keep.any(axis=-1).all()
        before = keep


def test_survivors_are_nested() -> None:
    query, key = random_codes(1)
    rng = np.random.default_rng(2)
    widths = WIDTHS | {"key_bits": [2, 4, 7]}
    keep = np.asarray(
        run_filter(query, key, rng.integers(-127, 128, (3, 3)), widths=widths).trace["keep"]
    )
    assert not np.any(keep[1] & ~keep[0]) and not np.any(keep[2] & ~keep[1])


@pytest.mark.parametrize("code", [-100, -3, 0, 60])
def test_a_factor_or_offset_changes_nothing(code: int) -> None:
    scores, alive = random_rows(7, num_rows=300)
    a = jnp.full(len(scores), code, jnp.int32)
    keep = hard_keep(by_head(scores.astype(np.int32)), by_head(alive), a)
    for changed in (7 * scores, scores - 1234):
        np.testing.assert_array_equal(
            hard_keep(by_head(changed.astype(np.int32)), by_head(alive), a), keep
        )


def test_threshold_codes() -> None:
    # 128 tanh(v): off only below -127.5; the ends of the scale are +-127.
    variables = np.asarray([[[-6.0, -2.77, -0.1, 0.0, 0.5, 6.0]]])
    stored = codes({"threshold": variables}, {})["threshold"]
    assert stored.ravel().tolist() == [-128, -127, -13, 0, 59, 127]
    np.testing.assert_array_equal(alpha_code(np.tanh(variables)), stored)


@pytest.mark.parametrize("alpha", [-0.6, -0.1, 0.2, 0.7])
def test_derivative_of_the_threshold(alpha: float) -> None:
    with jax.enable_x64(True):
        scores = jax.random.normal(jax.random.key(0), (2, 1, 3, 25), jnp.float64)
        weights, pairs = jnp.ones_like(scores), jnp.ones_like(scores)
        temperature = 0.7
        relaxed = tiny_model.relaxation(temperature, straight_through=False)

        def run(value: jax.Array) -> jax.Array:
            return soft_gate(scores, weights, pairs, value[None], relaxed)

        gate = run(jnp.asarray(alpha))
        slope = jax.jacfwd(run)(jnp.asarray(alpha))
        # gate = sigmoid((S - theta) / (tau std)): d theta / d alpha from d gate / d alpha.
        width = temperature * jnp.std(scores, axis=-1, keepdims=True)
        of_theta = -slope * width / (gate * (1.0 - gate))
        mean = jnp.mean(scores, axis=-1, keepdims=True)
        if alpha >= 0:
            wanted = jnp.max(scores, axis=-1, keepdims=True) - mean
        else:
            wanted = mean - jnp.min(scores, axis=-1, keepdims=True)
        np.testing.assert_allclose(of_theta, jnp.broadcast_to(wanted, of_theta.shape), rtol=1e-6)


def test_soft_round_tends_to_the_hard_one() -> None:
    scores, _ = random_rows(3, num_rows=300)
    code = np.random.default_rng(4).integers(-127, 128, size=len(scores))
    hard = rational_keep(scores, np.ones_like(scores, bool), code)
    a = code[:, None]
    extreme = np.where(a >= 0, scores.max(-1, keepdims=True), scores.min(-1, keepdims=True))
    theta = (np.abs(a) * extreme + (128 - np.abs(a)) * scores.mean(-1, keepdims=True)) / 128
    is_off_threshold = np.abs(scores - theta) > 0.01
    ones = jnp.ones_like(by_head(scores), jnp.float32)
    distances = []
    for temperature in (1.0, 0.1, 1e-2, 1e-5):
        gate = soft_gate(
            by_head(scores.astype(np.float32)),
            ones,
            ones,
            jnp.asarray(code / 128, jnp.float32),
            tiny_model.relaxation(temperature, straight_through=False),
        )
        distances.append(np.abs(gate[0, :, 0] - hard)[is_off_threshold].max())
    assert distances[-1] < 1e-3
    assert is_off_threshold.mean() > 0.8


def has_tie(scores: np.ndarray, keep: np.ndarray, code: int) -> np.ndarray:
    """Whether a score of an image lies exactly on its threshold, `[B]`; traces are `[L, R, B, H, T, S]`.

    A row with one key alive is no tie: the softmax gives it 1 whatever its gate.
    """
    alive = np.concatenate([np.ones_like(keep[:, :1]), keep[:, :-1]], axis=1)
    number = alive.sum(-1, keepdims=True)
    extreme = np.where(alive, np.sign(code) * scores, -np.inf).max(-1, keepdims=True) * np.sign(
        code
    )
    mean = np.where(alive, scores, 0).sum(-1, keepdims=True) / number
    theta = (abs(code) * extreme + (128 - abs(code)) * mean) / 128
    is_tie = alive & (number > 1) & (np.abs(scores - theta) < 1e-6)
    result: np.ndarray = is_tie.any(axis=(0, 1, 3, 4, 5))
    return result


@pytest.mark.parametrize("attention_bits", [pytest.param(8.0, marks=pytest.mark.slow), 16.0])
def test_soft_path_tends_to_the_hard_one_on_real_activations(
    digits_model: tiny_model.Model, attention_bits: float
) -> None:
    code = -37
    policy = tiny_model.energon_policy(
        digits_model.structure,
        attention_bits=attention_bits,
        threshold=float(np.arctanh(code / 128)),
    )

    def run(relaxed: Relaxation) -> tuple[dict[str, np.ndarray], np.ndarray]:
        output = tiny_model.run_soft(
            digits_model.params,
            policy,
            digits_model.calibration,
            digits_model.pixels[:64],
            relaxed,
            setup=digits_model.config,
        )
        return jax.tree.map(np.asarray, (output.trace, output.logits))

    hard, logits = run(tiny_model.relaxation())
    # One key alive lies on its own threshold: gate 1/2, kept or not is the same.
    is_alone = hard["keep"].sum(-1, keepdims=True) == 1
    is_sure = ~has_tie(hard["scores"], hard["keep"], code)
    assert is_sure.sum() > 16 and 0.1 < hard["keep"].mean() < 0.9
    differing, drift = [], []
    for temperature in (0.3, 0.03, 1e-6):
        soft, soft_logits = run(tiny_model.relaxation(temperature, straight_through=False))
        is_different = (soft["keep"] != hard["keep"]) & ~is_alone
        differing.append(is_different[:, :, is_sure].mean())
        drift.append(np.abs(soft_logits - logits)[is_sure].max(axis=-1))
    # What is left are sums in single precision beside those of integers: one on the edge of a code may round otherwise.
    assert differing[0] > differing[1] > differing[2] and differing[2] < 1e-4
    assert drift[0].mean() > drift[1].mean() > drift[2].mean()
    assert np.mean(drift[2] > 1e-4) < 0.1 and drift[2].max() < 0.05


@pytest.mark.parametrize("seed", range(2))
def test_deployed_round_has_decisions_of_the_hard_and_derivatives_of_the_soft_one(
    seed: int,
) -> None:
    """Ties, rows with one key or none, rounds that are off, and both signs of alpha included."""
    with jax.enable_x64(True):
        rows, alive = random_rows(seed, num_rows=200)
        alive[:20] = False
        rng = np.random.default_rng(seed + 9)
        code = rng.integers(-128, 128, size=len(rows))
        scores, weights = (jnp.asarray(by_head(x), jnp.float64) for x in (rows, alive))
        a, slope = jnp.asarray(np.clip(code, -127, 127) / 128), rng.normal(size=scores.shape)
        relaxed = tiny_model.relaxation(0.4, straight_through=False)
        total = jnp.asarray(np.sum(np.where(alive, rows, 0), -1)[None, :, None, None], jnp.int32)

        def deployed(scores: jax.Array, weights: jax.Array, alpha: jax.Array) -> jax.Array:
            stored = jnp.asarray(code, jnp.int32)
            keep = deployed_round(scores, weights, alpha, stored, relaxed.temperature, total)
            return jnp.sum(slope * keep), keep

        def soft(scores: jax.Array, weights: jax.Array, alpha: jax.Array) -> jax.Array:
            gate = soft_round(scores, weights, weights, alpha, relaxed)
            gate = jnp.where((code == OFF_CODE)[None, :, None, None], 1.0, gate)
            return jnp.sum(slope * weights * gate)

        got, keep = jax.jit(jax.grad(deployed, argnums=(0, 1, 2), has_aux=True))(scores, weights, a)
        wanted = jax.jit(jax.grad(soft, argnums=(0, 1, 2)))(scores, weights, a)
        np.testing.assert_array_equal(keep[0, 20:, 0], rational_keep(rows, alive, code)[20:])
        assert not np.any(keep[0, :20])
        for x, y in zip(got, wanted, strict=True):
            rows_with_keys = (slice(None), slice(20, None)) if x.ndim > 1 else slice(20, None)
            np.testing.assert_allclose(x[rows_with_keys], y[rows_with_keys], rtol=1e-9, atol=1e-9)
            assert np.all(np.isfinite(x)) and np.any(x != 0.0)


def test_totals_of_the_widest_scores_are_exact() -> None:
    """8-bit operands in single precision: the plain sum of the scores rounds."""
    rng = np.random.default_rng(0)
    query, key = (rng.integers(100, 128, size=(1, 2, n, 64)) for n in (20, 512))
    alive = rng.random((1, 2, 20, 512)) < 0.9
    scores = np.einsum("bhtd,bhsd->bhts", query, key)
    wanted = np.sum(np.where(alive, scores, 0), axis=-1, keepdims=True)
    single = np.sum(np.where(alive, scores, 0).astype(np.float32), axis=-1, keepdims=True)
    assert np.any(single != wanted)
    total = exact_total(
        jnp.asarray(query, jnp.float32),
        jnp.asarray(np.swapaxes(key, 2, 3), jnp.float32),
        jnp.asarray(alive, jnp.float32),
    )
    np.testing.assert_array_equal(total, wanted)


@pytest.mark.parametrize("seed", range(2))
def test_straight_through_forward_equals_the_hard_filter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = int(rng.integers(8, 17))
    query, key = random_codes(seed, bits)
    variable = rng.normal(scale=0.5, size=(3, 3))
    variable[0, 0] = tiny_model.OFF
    widths = {"qk_bits": bits, "v_bits": 16, "query_bits": 5, "key_bits": [2, 5, 8]}
    hard = run_filter(query, key, codes({"threshold": variable}, {})["threshold"], widths=widths)
    soft = run_filter(query, key, variable, widths=widths, soft=tiny_model.relaxation())
    np.testing.assert_array_equal(soft.trace["scores"], hard.trace["scores"])
    np.testing.assert_array_equal(soft.trace["keep"], hard.trace["keep"])
    np.testing.assert_array_equal(soft.weights, hard.weights)
    np.testing.assert_array_equal(soft.fetched, hard.fetched)


def test_padded_keys_are_not_seen() -> None:
    query, key = random_codes(5)
    query = key[:, :, :20]
    valid = np.random.default_rng(6).random((2, 33)) < 0.7
    valid[:, 0] = True
    threshold = np.asarray([[0, 20], [-30, 0], [60, OFF_CODE]])
    pairs = np.broadcast_to(valid[:, None, None, :], (2, 1, 20, 33))
    got = run_filter(query, key, threshold, pairs=pairs)
    scores, keep = reference_filter(query, key, pairs, threshold, 4, [2, 4], 16)
    np.testing.assert_array_equal(got.trace["scores"], scores)
    np.testing.assert_array_equal(got.trace["keep"], keep)
    # Padded keys may hold anything.
    other = np.where(valid[:, None, :, None], key, 32767)
    again = run_filter(query, other, threshold, pairs=pairs)
    np.testing.assert_array_equal(again.trace["keep"], keep)


def test_later_keys_are_not_seen_under_a_causal_mask() -> None:
    query, key = random_codes(8)
    key = key[:, :, :20]
    threshold = np.asarray([[0, 20], [-30, 0], [60, -90]])
    pairs = np.broadcast_to(np.tri(20)[None, None], (2, 1, 20, 20))
    keep = np.asarray(run_filter(query, key, threshold, pairs=pairs).weights)
    assert not np.any(keep * (1.0 - pairs)) and keep.any(axis=-1).all()
    for row in (0, 7):
        alone = run_filter(query[:, :, row : row + 1], key[:, :, : row + 1], threshold)
        np.testing.assert_array_equal(keep[:, :, row, : row + 1], alone.weights[:, :, 0])


def test_a_row_without_keys_keeps_none_and_has_finite_gradients() -> None:
    query, key = random_codes(9)
    pairs = all_pairs(2, 20, 33)
    pairs[0, :, 3:] = 0.0
    hard = run_filter(query, key, np.zeros((3, 2)), pairs=pairs)
    assert not np.any(hard.weights[0, :, 3:]) and np.all(np.any(hard.weights[1], axis=-1))
    weights = jnp.asarray(np.broadcast_to(pairs, (2, 3, 20, 33)), jnp.float32)
    scores = jax.random.normal(jax.random.key(0), weights.shape)

    def total(alpha: jax.Array, scores: jax.Array) -> jax.Array:
        relaxed = tiny_model.relaxation(straight_through=False)
        gate = soft_gate(scores, weights, jnp.asarray(pairs, jnp.float32), alpha, relaxed)
        return jnp.sum(gate * weights)

    for alpha in (-0.2, 0.2):
        gradients = jax.grad(total, argnums=(0, 1))(jnp.full((3,), alpha), scores)
        assert all(bool(jnp.all(jnp.isfinite(gradient))) for gradient in gradients)


def test_kept_fraction_and_recall_of_two_rounds_at_zero() -> None:
    fractions, recalls = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        query, key = rng.normal(size=(256, 64)), rng.normal(size=(512, 64))
        query_code, key_code = (
            np.rint(x / np.abs(x).max() * 32767).astype(int)[None, None] for x in (query, key)
        )
        keep = np.asarray(run_filter(query_code, key_code, np.zeros((1, 2))).trace["keep"])[:, 0, 0]
        fractions.append(keep.mean(axis=(1, 2)))
        rank = np.argsort(np.argsort(-(query @ key.T), axis=-1), axis=-1)
        top = rank < keep[1].sum(axis=-1, keepdims=True)
        recalls.append((top & keep[1]).sum() / keep[1].sum())
    np.testing.assert_allclose(np.mean(fractions, axis=0), [0.500, 0.238], atol=0.01)
    assert np.mean(recalls) == pytest.approx(0.82, abs=0.01)
