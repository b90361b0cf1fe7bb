"""Counts: row statistics, fetched vectors, the layer axis, and the closed vocabulary."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.errors import UnknownNameError
from codesign.vocabulary import (
    KINDS,
    MECHANISM_OPERATIONS,
    SITES,
    STAGES,
    check_key,
    matches,
)
from codesign.workload import (
    Trace,
    Workload,
    binary_fetched_vectors,
    fetched_vectors,
    gemm,
    grid_levels,
    layers_second,
    operation,
    row_statistics,
    stream,
)

# The worked masks of Energon's counts: 3 queries, 4 keys.
MASKS = [[1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(("length", "levels"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (512, 10)])
def test_grid_reaches_the_length(length: int, levels: int) -> None:
    assert grid_levels(length) == levels
    assert 2 ** (levels - 1) >= length


def test_fetched_vectors_of_the_worked_masks() -> None:
    vectors = fetched_vectors(jnp.asarray(MASKS, jnp.float32)[None, None])
    # One query per fetch: 5 kept pairs. Two: keys 0, 1, 2, then key 0. All three: keys 0, 1, 2.
    np.testing.assert_array_equal(vectors, [[[5.0, 4.0, 3.0]]])
    kept_fraction, union = np.mean(MASKS), float(vectors[0, 0, -1]) / 4
    assert (kept_fraction, union) == (5 / 12, 0.75)


def test_fetched_vectors_of_random_masks_are_unions_of_blocks(
    getkey: Callable[[], jax.Array],
) -> None:
    masks = np.asarray(jax.random.bernoulli(getkey(), 0.3, (2, 3, 11, 7)))
    vectors = np.asarray(fetched_vectors(jnp.asarray(masks, jnp.float32)))
    assert vectors.shape == (2, 3, 5)
    for level in range(5):
        blocks = [masks[:, :, start : start + 2**level] for start in range(0, 11, 2**level)]
        expected = sum(np.sum(np.any(block, axis=2), axis=-1) for block in blocks)
        np.testing.assert_array_equal(vectors[..., level], expected)


@pytest.mark.parametrize("queries", [1, 2, 5, 16, 20, 32, 33, 70])
def test_packed_decisions_have_values_and_derivatives_of_the_products(queries: int) -> None:
    """Whole and partial words, blocks of one word and of many, padded queries."""
    rng = np.random.default_rng(queries)
    # Many keys wanted by one query, few by most: all cases of a derivative occur.
    chance = rng.choice([0.01, 0.1, 0.9], size=(2, 3, 1, 24))
    weights = jnp.asarray(rng.random((2, 3, queries, 24)) < chance, jnp.float32)
    rows = jnp.asarray(rng.random((2, 1, queries)) < 0.8, jnp.float32)
    slope = jnp.asarray(rng.normal(size=(2, 3, grid_levels(queries))), jnp.float32)
    other = jnp.asarray(rng.normal(size=weights.shape), jnp.float32)

    def total(weights: jax.Array, price: jax.Array, is_binary: bool) -> jax.Array:
        if is_binary:
            weights, vectors = binary_fetched_vectors(weights, rows)
        else:
            vectors = fetched_vectors(weights, rows)
        return jnp.sum(price * vectors) + jnp.sum(other * weights)

    np.testing.assert_array_equal(
        fetched_vectors(weights, rows, is_binary=True), fetched_vectors(weights, rows)
    )
    for price in (slope, jnp.zeros_like(slope)):
        got, wanted = (jax.grad(total)(weights, price, is_binary) for is_binary in (True, False))
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_fetched_vectors_of_soft_weights() -> None:
    vectors = fetched_vectors(jnp.asarray([[0.5, 0.0], [0.5, 1.0]])[None, None])
    # 1 - (1 - .5)(1 - .5) = .75 and 1 - (1 - 0)(1 - 1) = 1.
    np.testing.assert_allclose(vectors[0, 0], [2.0, 1.75])
    gradient = jax.grad(lambda weight: fetched_vectors(jnp.full((1, 1, 2, 1), weight))[0, 0, 1])
    np.testing.assert_allclose(gradient(0.25), 2 * (1 - 0.25))


def test_row_statistics_count_lane_steps() -> None:
    keys = jnp.asarray([[[5.0, 1.0, 0.0]]])
    statistics = row_statistics(keys, jnp.asarray([[[1.0, 1.0, 0.0]]]), 8)
    # ceil(5/g) + ceil(1/g) for g = 1, 2, 4, 8.
    np.testing.assert_array_equal(statistics.segments, [[[6.0, 4.0, 3.0, 2.0]]])
    np.testing.assert_array_equal(statistics.queries, [[2.0]])
    np.testing.assert_array_equal(statistics.maximum, [[5.0]])


def test_row_statistics_of_rows_by_head() -> None:
    rows = jnp.asarray([[[1.0, 0.0], [1.0, 1.0]]])
    statistics = row_statistics(3.0 * rows, rows, 4)
    np.testing.assert_array_equal(statistics.queries, [[1.0, 2.0]])
    np.testing.assert_array_equal(statistics.segments[..., 2], [[1.0, 2.0]])


def test_row_statistics_of_eighths_of_the_rows() -> None:
    # Twelve rows that exist, of 1 to 12 keys, around one that does not: 1.5 rows are an eighth.
    exists = jnp.ones((1, 1, 13)).at[0, 0, 4].set(0.0)
    keys = jnp.asarray([*range(1, 5), 0, *range(5, 13)], float)[None, None]
    found = row_statistics(keys, exists, 16)
    expected = [
        1 + 2 / 2,
        2 / 2 + 3,
        4 + 5 / 2,
        5 / 2 + 6,
        7 + 8 / 2,
        8 / 2 + 9,
        10 + 11 / 2,
        11 / 2 + 12,
    ]
    np.testing.assert_allclose(found.portions[0, 0, :, 0], expected, rtol=1e-6)
    # Lanes of 16 keys take a step a row.
    np.testing.assert_allclose(found.portions[0, 0, :, 4], 1.5, rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(found.portions, axis=2), found.segments, rtol=1e-6)

    def late(keys: jax.Array) -> jax.Array:
        return row_statistics(keys, exists, 16).portions[0, 0, 7, 2]

    slopes = np.zeros(13)
    slopes[-2:] = 0.5 / 4.0, 1.0 / 4.0
    np.testing.assert_allclose(jax.grad(late)(keys)[0, 0], slopes, rtol=1e-6)


def test_segments_have_the_slope_without_ceil() -> None:
    def steps(keys: jax.Array) -> jax.Array:
        return row_statistics(keys, jnp.ones((1, 1, 1)), 8).segments[0, 0, 2]

    np.testing.assert_array_equal(jax.grad(steps)(jnp.full((1, 1, 1), 5.0)), [[[0.25]]])


def test_layer_axis_comes_second() -> None:
    def layer(index: jax.Array) -> Workload:
        counts = index * 10.0 + jnp.arange(3.0)
        return Workload(
            operations={"qk.mac": operation(jnp.broadcast_to(counts[:, None], (3, 2)), 16.0, 8.0)},
            rows={},
            streams={"query": stream(counts[:, None, None], jnp.asarray(16.0), 4)},
            block_gemms={
                "up": gemm(counts, 4, 8, jnp.asarray(8.0), jnp.asarray(8.0)),
                "down": gemm(counts, 8, 4, counts, jnp.asarray(8.0)),
            },
            end_gemms={},
            head_dim=4,
            densities={"key": counts},
        )

    _, stacked = jax.lax.scan(lambda state, index: (state, layer(index)), 0, jnp.arange(2.0))
    workload = layers_second(stacked)
    expected = np.arange(3.0)[:, None] + 10.0 * np.arange(2.0)[None, :]
    np.testing.assert_array_equal(workload.operations["qk.mac"].count[..., 0], expected)
    assert workload.operations["qk.mac"].bits_a.shape == (1, 2, 1)
    assert workload.streams["query"].vectors.shape == (3, 2, 1, 1)
    np.testing.assert_array_equal(workload.block_gemms["up"].rows, expected)
    assert workload.block_gemms["up"].activation_bits.shape == (1, 2)
    # Rows of different width: the mean by example.
    assert workload.block_gemms["down"].activation_bits.shape == (3, 2)
    np.testing.assert_array_equal(workload.densities["key"], expected)


def test_trace_unpacks_its_masks() -> None:
    masks = np.random.default_rng(0).random((2, 1, 2, 3, 4, 11)) < 0.5
    trace = Trace(
        packed=np.packbits(masks, axis=-1),
        valid=np.ones((1, 11), bool),
        num_keys=11,
        head_dim=4,
        bits={},
    )
    for layer in range(2):
        np.testing.assert_array_equal(trace.keep(layer), masks[layer])


@pytest.mark.parametrize("key", ["qk.mac", "filter0.statistic", "filter12.mac", "copy.bits"])
def test_keys_of_the_vocabulary(key: str) -> None:
    assert check_key(key) == key


@pytest.mark.parametrize("key", ["qk", "qk.", "mac", "qk.macs", "guess.mac", "filter.0", ".mac"])
def test_other_keys_are_refused(key: str) -> None:
    with pytest.raises(UnknownNameError, match="vocabulary"):
        check_key(key)


def test_every_mechanism_stays_in_the_vocabulary() -> None:
    for patterns in MECHANISM_OPERATIONS.values():
        for pattern in patterns:
            key = check_key(pattern.replace("*", "0"))
            assert matches(key, patterns)
    assert not matches("filter0.mac", ("filter*.compare", "qk.mac"))


@pytest.mark.parametrize("names", [STAGES, KINDS, SITES])
def test_names_are_unique(names: tuple[str, ...]) -> None:
    assert len(set(names)) == len(names)
