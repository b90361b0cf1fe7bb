"""Attention computed a few examples and heads at a time is attention computed at once, counts and derivatives included."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from codesign.mechanisms import MECHANISMS
from codesign.mechanisms.protocol import Operands
from codesign.models import chunks
from codesign.models.model import apply
from codesign.models.parameters import init_params
from codesign.structure import ModelStructure, TokenInput


def operands(batch: int, heads: int, tokens: int) -> Operands:
    one = jnp.ones(())
    query, key, value = (jnp.ones((batch, heads, tokens, 2)) for _ in range(3))
    return Operands(query=query, key=key, value=value, logit_scale=one, value_scale=one)


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "examples", "own"),
    # At most 2^19 pairs: 2 * 12 * 128^2 = 393,216; 2 * 512^2 = 524,288.
    [(8, 12, 128, 2, 12), (2, 12, 512, 1, 2), (3, 12, 128, 1, 12), (4, 2, 8, 4, 2), (2, 3, 1024, 1, 1)],
)  # fmt: skip
def test_sizes_of_chunks(batch: int, heads: int, tokens: int, examples: int, own: int) -> None:
    chosen = chunks.chunks_of(operands(batch, heads, tokens))
    assert (chosen.examples, chosen.heads) == (examples, own)


@pytest.mark.parametrize(
    "name",
    ["energon", *(pytest.param(one, marks=pytest.mark.slow) for one in ("sofa", "lapa", "esact"))],
)
def test_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four examples of 8 tokens and 4 heads, some tokens not there: two heads, or one or two examples, at a time."""
    structure = ModelStructure(
        num_layers=2,
        num_heads=4,
        head_dim=4,
        width=8,
        hidden=12,
        input=TokenInput(vocabulary_size=11, max_tokens=8),
        num_outputs=3,
    )
    setup = tiny_model.config(structure)
    params = init_params(structure, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    inputs = {
        "tokens": jnp.asarray(rng.integers(11, size=(4, 8))),
        "valid": jnp.asarray(np.arange(8)[None, :] < np.asarray([[8], [5], [1], [7]]), jnp.float32),
    }
    calibration = tiny_model.calibrate(setup, params, inputs)
    policy = tiny_model.shared_policy(structure, linear_bits=6.3, attention_bits=11.4)
    own = MECHANISMS[name].knobs(2, 4)
    own["threshold"] = own["threshold"] + jnp.linspace(-0.5, 0.5, 4)[None, :, None]
    if name == "sofa":
        own["tile_bits"] = jnp.asarray([2.0, 2.7])
    policy = policy.replace(layers=policy.layers | own)  # type: ignore[attr-defined]

    def total(params: Any, policy: Any) -> tuple[jax.Array, Any]:
        output = apply(
            params,
            policy,
            calibration,
            inputs,
            config=setup,
            mechanism=MECHANISMS[name],
            relaxation=tiny_model.relaxation(),
        )
        weighted = [
            jnp.sum(leaf * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape)))
            for leaf in jax.tree.leaves(output.workload)
        ]
        return jnp.sum(jnp.sin(output.logits)) + 1e-2 * sum(weighted), output

    def run() -> Any:
        step = jax.jit(
            jax.value_and_grad(total, argnums=(0, 1), has_aux=True),
            compiler_options=tiny_model.FAST_COMPILE,
        )
        return step(params, policy)

    whole = run()
    for max_pairs in (128, 512) if name == "energon" else (512,):
        monkeypatch.setattr(chunks, "MAX_PAIRS", max_pairs)
        parts = run()
        assert jax.tree.structure(parts) == jax.tree.structure(whole)
        for got, wanted in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
            # Counts that all examples share may come back once for each.
            # Sums in float32 round with the size of what is added up.
            atol = 1e-5 + 1e-6 * float(np.max(np.abs(wanted), initial=0.0))
            np.testing.assert_allclose(*np.broadcast_arrays(got, wanted), rtol=2e-5, atol=atol)
