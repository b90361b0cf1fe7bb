"""Settings and fixtures that every test shares."""

from collections.abc import Callable

import jax
import pytest
import tiny_model

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def getkey() -> Callable[[], jax.Array]:
    """A function that returns another random key at every call, the same ones in every run."""
    state = jax.random.key(0)

    def next_key() -> jax.Array:
        nonlocal state
        state, key = jax.random.split(state)
        return key

    return next_key


@pytest.fixture(scope="session")
def digits_model() -> tiny_model.Model:
    """A model of two layers and 16 tokens, trained for seconds on the bundled digits."""
    return tiny_model.trained(tiny_model.structure())
