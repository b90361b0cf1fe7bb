"""Products with a backward pass of their own have the automatic derivatives, and a layer stores what it marks."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.backward import (
    dense_product,
    keeping_marked,
    kept,
    split_heads,
    weighted_values,
)

Draw = Callable[[], jax.Array]


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def same_derivatives(
    ours: Callable[..., jax.Array],
    plain: Callable[..., jax.Array],
    arguments: tuple[jax.Array, ...],
    slope: jax.Array,
) -> None:
    value, pull = jax.vjp(ours, *arguments)
    wanted, wanted_pull = jax.vjp(plain, *arguments)
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    for got, want in zip(pull(slope), wanted_pull(slope), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (3, 5)])
def test_dense_product(shape: tuple[int, ...], getkey: Draw) -> None:
    x, weight = (jax.random.normal(getkey(), s) for s in (shape, (5, 4)))
    slope = jax.random.normal(getkey(), (*shape[:-1], 4))
    same_derivatives(dense_product, lambda x, w: x @ w, (x, weight), slope)


def test_dense_product_in_codes() -> None:
    """Whole codes multiply as 8-bit integers: the product is exact, its derivatives are those of the values."""
    rng = np.random.default_rng(0)
    codes, weight_codes = rng.integers(-127, 128, (2, 3, 50)), rng.integers(-127, 128, (50, 4))
    codes[0, 0], weight_codes[:, 0] = 127, -127
    # Powers of two: values and products of units are exact.
    unit, weight_unit = jnp.asarray(2.0**-7), jnp.asarray([[2.0**-3, 1.0, 2.0, 2.0**-9]])
    x, weight = jnp.asarray(codes * unit), jnp.asarray(weight_codes * weight_unit)
    units = (unit, weight_unit)
    product = dense_product(x, weight, units)
    wanted = (codes @ weight_codes) * np.asarray(unit) * np.asarray(weight_unit)
    np.testing.assert_array_equal(product, wanted)
    slope = jnp.asarray(rng.normal(size=(2, 3, 4)))
    same_derivatives(lambda x, w: dense_product(x, w, units), jnp.matmul, (x, weight), slope)
    whole = jax.jit(dense_product).lower(x, weight, units).as_text()
    assert "xi8>" in whole


def test_weighted_values(getkey: Draw) -> None:
    weights, values = (jax.random.normal(getkey(), s) for s in ((2, 3, 4, 6), (2, 3, 6, 5)))
    scale, slope = jnp.asarray(0.3), jax.random.normal(getkey(), (2, 4, 15))

    def plain(weights: jax.Array, values: jax.Array) -> jax.Array:
        heads = jnp.einsum("bhts,bhsd->bthd", weights, values) * scale
        return jnp.reshape(heads, (2, 4, 15))

    same_derivatives(lambda w, v: weighted_values(w, v, scale), plain, (weights, values), slope)


def test_split_heads(getkey: Draw) -> None:
    projected, slope = jax.random.normal(getkey(), (2, 4, 18)), jax.random.normal(getkey(), ())

    def plain(x: jax.Array) -> jax.Array:
        split = jnp.reshape(x, (2, 4, 3, 2, 3))
        return jnp.stack([jnp.swapaxes(split[:, :, i], 1, 2) for i in range(3)])

    same_derivatives(
        lambda x: jnp.stack(split_heads(x, 2)), plain, (projected,), slope * plain(projected) ** 2
    )


def test_only_marked_arrays_are_stored(getkey: Draw) -> None:
    x = jax.random.normal(getkey(), (7,))

    def layer(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(kept(jnp.sin(x))))

    def num_stored(function: Callable[[jax.Array], jax.Array]) -> int:
        stored = jax.tree.leaves(jax.vjp(function, x)[1])
        return sum(leaf.shape == (7,) for leaf in stored)

    # The argument and what is marked; without marks the two cosines, from which nothing is computed again.
    assert num_stored(keeping_marked(layer)) == 2
    assert num_stored(keeping_marked(lambda x: jnp.sum(jnp.sin(jnp.sin(jnp.sin(x)))))) == 1
    np.testing.assert_allclose(jax.grad(keeping_marked(layer))(x), jax.grad(layer)(x))
