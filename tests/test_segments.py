"""Top-k inside segments: hand examples of SOFA's specification, properties, and the derivatives of the soft form."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import FAST_COMPILE

from codesign.gates import Relaxation
from codesign.references.sofa import reference_segments
from codesign.segments import (
    RADIUS_OFF,
    SCORE_LIMIT,
    SHARE_ONE,
    Chosen,
    hard_segments,
    soft_segments,
)

KEYS = 37  # divided by no segment


jit = functools.partial(jax.jit, compiler_options=FAST_COMPILE)


@jit
def hard(scores: Any, pairs: Any, share: Any, radius: Any, tile_bits: Any) -> Chosen:
    return hard_segments(scores, pairs, share, radius, tile_bits)


def soft(
    scores: Any,
    pairs: Any,
    share: Any,
    radius: Any,
    tile_bits: Any,
    temperature: Any = 0.1,
    *,
    straight_through: bool = False,
) -> Chosen:
    relaxation = Relaxation(
        temperature=jnp.asarray(temperature, scores.dtype),
        smoothness=jnp.ones(()),
        straight_through=straight_through,
    )
    return soft_segments(scores, pairs, share, radius, tile_bits, relaxation)


deployed = jit(functools.partial(soft, straight_through=True))


def kept_of_row(
    scores: Sequence[int], share: int, tile_bits: int, radius: int = RADIUS_OFF
) -> set[int]:
    """Indices kept of one row whose keys all exist."""
    row = jnp.asarray(scores, jnp.int32)[None, None, None]
    pairs = jnp.ones((1, 1, 1, len(scores)))
    chosen = hard(row, pairs, jnp.asarray([share]), jnp.asarray([radius]), jnp.asarray(tile_bits))
    return set(np.flatnonzero(chosen.weights[0, 0, 0]).tolist())


def random_rows(seed: int, *, spread: int = 9) -> tuple[jax.Array, jax.Array]:
    """Scores `[2, 3, 5, 37]`, many of them equal, and pairs of which some, in one row all, do not exist."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(-spread, spread + 1, (2, 3, 5, KEYS))
    pairs = rng.random((2, 1, 5, KEYS)) < 0.8
    pairs[0, 0, 0] = False
    return jnp.asarray(scores, jnp.int32), jnp.asarray(pairs, jnp.float32)


def test_the_largest_of_each_segment_stay() -> None:
    assert kept_of_row([9, 3, 7, 1, 8, 2, 6, 5], 512, 2) == {0, 2, 4, 6}
    # The exact top four are 0, 1, 2 and 5.
    assert kept_of_row([9, 8, 7, 1, 2, 3, 1, 0], 512, 2) == {0, 1, 4, 5}
    assert kept_of_row([9, 8, 7, 1, 2, 3, 1, 0], 512, 3) == {0, 1, 2, 5}


def test_the_radius_clips_what_is_far_below_the_maximum() -> None:
    row = [9, 3, 7, 1, 8, 2, 6, 5]
    assert kept_of_row(row, 512, 2, radius=1) == {0, 4}
    assert kept_of_row(row, 512, 2, radius=2) == {0, 2, 4, 6}
    assert kept_of_row([SCORE_LIMIT, -SCORE_LIMIT], SHARE_ONE, 2) == {0, 1}


def test_the_least_share_of_one_segment_is_the_maximum_alone() -> None:
    assert kept_of_row([3, -7, 9, 1, 9, 2], 1, 5) == {2}
    assert kept_of_row([3, -7, 9, 1, 9, 2], SHARE_ONE // 6, 5) == {2}


def test_equal_scores_stay_in_order_of_their_index() -> None:
    assert kept_of_row([5, 5, 5, 5], 512, 2) == {0, 1}
    assert kept_of_row([-4, -4, 1, -4], 512, 2) == {0, 2}


@pytest.mark.parametrize("tile_bits", [2, 3, 5, 6, 8])
def test_bisection_agrees_with_a_stable_sort(tile_bits: int) -> None:
    share, radius = jnp.asarray([1, 300, 1024]), jnp.asarray([3, 9, RADIUS_OFF])
    for seed in range(4):
        scores, pairs = random_rows(seed, spread=[2, 9, 300, SCORE_LIMIT][seed])
        chosen = hard(scores, pairs, share, radius, jnp.asarray(tile_bits))
        largest, kept = reference_segments(
            np.asarray(scores, np.int64),
            np.asarray(pairs) > 0.5,
            np.asarray(share),
            np.asarray(radius),
            2**tile_bits,
        )
        np.testing.assert_array_equal(chosen.largest, largest)
        np.testing.assert_array_equal(chosen.weights, kept)


def test_cycles_and_segments_of_the_sorting_network() -> None:
    scores = jnp.zeros((1, 2, 1, KEYS), jnp.int32)
    share = jnp.asarray([256, 1024])
    chosen = hard(scores, jnp.ones((1, 1, 1, KEYS)), share, share, jnp.asarray(4))
    # Segments of 16, 16 and 5 keys: 2, 2 and 1 loads of 12; winners 4, 4, 2 and 16, 16, 5 in passes of 4.
    np.testing.assert_array_equal(chosen.cycles[0, :, 0], [2 + 2 + 1, 8 + 8 + 2])
    np.testing.assert_array_equal(chosen.segments, [[[3]]])


def test_every_segment_keeps_a_key_and_more_of_everything_keeps_more() -> None:
    scores, pairs = random_rows(1, spread=300)
    none = jnp.zeros((3,), jnp.int32)
    fewer = hard(scores, pairs, none + 200, none + 40, jnp.asarray(3))
    for share, radius in ((500, 40), (200, 90)):
        more = hard(scores, pairs, none + share, none + radius, jnp.asarray(3))
        assert np.all(np.asarray(fewer.weights) <= np.asarray(more.weights))
        assert np.sum(more.weights) > np.sum(fewer.weights)
    least = hard(scores, pairs, none + 1, none, jnp.asarray(3))
    alone = np.sum(np.asarray(least.weights), axis=-1)
    np.testing.assert_array_equal(alone, np.broadcast_to(least.segments, alone.shape))
    assert alone[0, 0, 0] == 0


@pytest.mark.parametrize("tile_bits", [3.0, 3.4, 3.6])
def test_straight_through_decides_as_the_chip_does(tile_bits: float) -> None:
    scores, pairs = random_rows(2)
    share, radius = jnp.asarray([1, 300, 1024]), jnp.asarray([3, 9, RADIUS_OFF])
    expected = hard(scores, pairs, share, radius, jnp.asarray(round(tile_bits)))
    values = scores.astype(jnp.float32)
    chosen = deployed(values, pairs, share / SHARE_ONE, radius * 1.0, jnp.asarray(tile_bits))
    jax.tree.map(np.testing.assert_array_equal, chosen, jax.tree.map(lambda x: x * 1.0, expected))


def test_soft_becomes_hard_as_the_temperature_falls() -> None:
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.permuted(np.tile(np.arange(KEYS), (1, 2, 5, 1)), axis=-1), jnp.float32)
    pairs = jnp.ones((1, 1, 5, KEYS))
    share, radius = jnp.asarray([0.3, 0.55]), jnp.asarray([5.4, 1000.0])
    chosen = jit(
        lambda temperature: soft(scores, pairs, share, radius, jnp.asarray(3.0), temperature)
    )
    kept = hard(
        scores.astype(jnp.int32),
        pairs,
        jnp.ceil(share * SHARE_ONE),
        jnp.floor(radius),
        jnp.asarray(3),
    )
    cold, warm = (chosen(jnp.asarray(temperature)) for temperature in (1e-4, 0.5))
    np.testing.assert_allclose(cold.weights, kept.weights, atol=1e-3)
    np.testing.assert_allclose(cold.largest, kept.largest, atol=1e-3)
    assert np.max(np.abs(warm.weights - kept.weights)) > 0.2


def test_derivatives_match_finite_differences() -> None:
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        scores = jnp.asarray(
            rng.permuted(np.tile(np.arange(KEYS) * 7, (2, 2, 3, 1)), axis=-1), float
        )
        pairs = jnp.asarray(rng.random((2, 1, 3, KEYS)) < 0.9, float)
        slope = jnp.asarray(rng.normal(size=(2, 2, 3, KEYS)))
        point = (jnp.asarray([0.31, 0.62]), jnp.asarray([40.3, 90.7]), jnp.asarray(3.4))

        def total(share: jax.Array, radius: jax.Array, bits: jax.Array) -> jax.Array:
            chosen = soft(scores, pairs, share, radius, bits, 0.2)
            return jnp.sum(slope * chosen.weights) + 0.3 * jnp.sum(slope * chosen.largest)

        value = jit(total)
        gradients = jit(jax.grad(total, argnums=(0, 1, 2)))(*point)
        for index, gradient in enumerate(gradients):
            flat = np.ravel(point[index])
            for place in range(flat.size):
                step = np.zeros_like(flat)
                step[place] = 1e-6
                sides = []
                for sign in (1.0, -1.0):
                    moved = list(point)
                    moved[index] = jnp.reshape(flat + sign * step, np.shape(point[index]))
                    sides.append(float(value(*moved)))
                expected = (sides[0] - sides[1]) / 2e-6
                assert float(np.ravel(gradient)[place]) == pytest.approx(expected, rel=1e-4)
                assert expected != 0.0


def test_scores_have_the_derivatives_of_gates_and_thresholds() -> None:
    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        scores = jnp.asarray(rng.permuted(np.arange(KEYS) * 7.0))[None, None, None]
        pairs = jnp.ones_like(scores)
        slope = jnp.asarray(rng.normal(size=(1, 1, 1, KEYS)))
        share, radius = jnp.asarray([0.41]), jnp.asarray([60.5])

        def total(scores: jax.Array) -> jax.Array:
            # The width of the gates is a constant for differentiation.
            return jnp.sum(
                slope * soft(scores, pairs, share, radius, jnp.asarray(4.0), 0.2).weights
            )

        gradient = np.ravel(jit(jax.grad(total))(scores))
    assert np.all(np.isfinite(gradient)) and np.max(np.abs(gradient)) > 0.0
    # A constant added to all scores of a row changes nothing.
    assert np.sum(gradient) == pytest.approx(0.0, abs=1e-9)


def test_straight_through_derivatives_are_those_of_the_soft_form() -> None:
    scores, pairs = random_rows(5, spread=300)
    values, share = scores.astype(jnp.float32), jnp.asarray([0.25, 0.5, 0.75])
    radius, bits = jnp.asarray([90.0, 150.0, 400.0]), jnp.asarray(4.0)

    def total(straight_through: bool, share: jax.Array, radius: jax.Array) -> jax.Array:
        chosen = soft(values, pairs, share, radius, bits, 0.3, straight_through=straight_through)
        weights = jnp.cos(values) * chosen.weights
        return jnp.sum(weights) + jnp.sum(chosen.cycles)

    hard_slopes, soft_slopes = (
        jit(jax.grad(lambda s, r, st=st: total(st, s, r), argnums=(0, 1)))(share, radius)
        for st in (True, False)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), hard_slopes, soft_slopes)


def test_the_width_of_a_place_has_the_difference_of_both_decisions() -> None:
    scores, pairs = random_rows(6, spread=300)
    values, share, radius = scores.astype(jnp.float32), jnp.full((3,), 0.25), jnp.full((3,), 1e5)
    slope = jnp.cos(values)

    def total(bits: jax.Array) -> jax.Array:
        chosen = soft(values, pairs, share, radius, bits, straight_through=True)
        return jnp.sum(slope * chosen.weights) + jnp.sum(chosen.cycles)

    both = jit(jax.value_and_grad(total))
    low, high = (float(both(jnp.asarray(bits))[0]) for bits in (3.0, 4.0))
    for bits in (3.2, 3.7):
        value, gradient = both(jnp.asarray(bits))
        assert float(value) == pytest.approx(high if bits > 3.5 else low)
        assert float(gradient) == pytest.approx(high - low, rel=1e-4)
