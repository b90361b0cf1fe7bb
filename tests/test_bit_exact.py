"""The JAX hard path against the NumPy emulator on random deployments: every bit of every named tensor."""

import functools

import jax
import numpy as np
import pytest
import random_deployment

from codesign.hw import emulator
from codesign.hw.export import first_difference
from codesign.mechanisms import mechanism_by_name
from codesign.models.model import apply_hard
from codesign.references.integers import exp_table


@pytest.mark.parametrize(
    ("variant", "mechanism", "bits"),
    [
        ("patches", "energon", 16),
        ("prefix", "energon", 8),
        ("bert", "energon", 12),
        ("pooler", "energon", 16),
        ("decoder", "energon", 9),
        ("pooler", "dense", 8),
        ("prefix", "acceltran", 16),
        ("bert", "acceltran", 9),
        ("decoder", "acceltran", 12),
        ("patches", "sofa", 16),
        pytest.param("bert", "sofa", 9, marks=pytest.mark.slow),
        ("decoder", "sofa", 12),
        ("patches", "lapa", 16),
        pytest.param("bert", "lapa", 8, marks=pytest.mark.slow),
        ("decoder", "lapa", 12),
        ("patches", "esact", 16),
        pytest.param("bert", "esact", 8, marks=pytest.mark.slow),
        ("decoder", "esact", 12),
        ("prefix", "topk", 16),
        ("pooler", "topk", 9),
        ("decoder", "topk", 12),
        ("patches", "bitserial", 16),
        pytest.param("bert", "bitserial", 8, marks=pytest.mark.slow),
        ("decoder", "bitserial", 12),
        ("patches", "sanger", 16),
        pytest.param("bert", "sanger", 8, marks=pytest.mark.slow),
        ("decoder", "sanger", 12),
        ("patches", "a3", 16),
        pytest.param("bert", "a3", 8, marks=pytest.mark.slow),
        ("decoder", "a3", 12),
        ("patches", "spatten", 16),
        pytest.param("bert", "spatten", 8, marks=pytest.mark.slow),
        ("decoder", "spatten", 12),
        ("patches", "fact", 16),
        pytest.param("bert", "fact", 8, marks=pytest.mark.slow),
        ("decoder", "fact", 12),
    ],
)
def test_jax_path_agrees_in_every_bit(variant: str, mechanism: str, bits: int) -> None:
    shape = random_deployment.structure(variant, mechanism, num_heads=3)
    threshold = np.random.default_rng(bits).integers(-100, 60, (shape.num_heads, shape.num_rounds))
    deployment, inputs = random_deployment.build(
        shape, seed=bits, attention_bits=bits, threshold=threshold
    )
    tables = {"exp_table": exp_table(), "reciprocal_table": emulator.reciprocal_table()}
    hard_fn = functools.partial(
        apply_hard, structure=shape, mechanism=mechanism_by_name(mechanism), tracing=True
    )
    with jax.enable_x64(True):
        output = jax.jit(hard_fn)(deployment.layers, deployment.ends | tables, inputs)
    expected = emulator.emulate(shape, deployment.layers, deployment.ends, inputs)
    assert set(output.trace) == set(expected)
    assert first_difference(expected, output.trace) is None
