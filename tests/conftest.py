"""Settings and fixtures that every test shares."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Programs run for milliseconds here and take seconds to compile: an older code generator, and nothing optimised, take half
# as long. The tests of the wheel use what users have (`XLA_FLAGS=`).
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true",
)
# Programs that another module, worker or run has compiled already are read.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "programs")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import jax
import pytest
import tiny_experiment
import tiny_model

from codesign.experiments.problem import Problem, load_problem

jax.config.update("jax_numpy_rank_promotion", "raise")

MAPPINGS = Path("/proc/self/maps")
MAX_MAPPINGS = 25_000
"""Memory mappings of a process, one line each, above which compiled programs are let go; Linux aborts it at 65530."""


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Drops the compiled programs of earlier modules before they fill the process."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MAX_MAPPINGS:
        jax.clear_caches()
        gc.collect()


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


@pytest.fixture(scope="session")
def dense_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the dense models that `tiny_problem` starts from."""
    return tmp_path_factory.mktemp("cache") / "dense"


@pytest.fixture(scope="session")
def tiny_problem(dense_cache: Path) -> Problem:
    """The problem of `tiny_experiment.tiny`, its dense model trained."""
    return load_problem(tiny_experiment.tiny(), cache=dense_cache, progress=False)
