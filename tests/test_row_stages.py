"""Rows that pass the stages of a machine: heads alike that the recurrence does not show one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.hw import row_stages
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.closed_form import ModelShape, Setting, workload_from_fractions
from codesign.hw.spec import load_preset
from codesign.hw.surrogate import cost

TWELVE_HEADS = ModelShape(
    num_layers=1, num_tokens=512, num_heads=12, head_dim=64, width=768, hidden=256
)


@pytest.mark.parametrize("is_causal", [False, True])
def test_heads_alike_that_are_not_shown_take_as_long_as_the_second(
    is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = dataclasses.replace(TWELVE_HEADS, is_causal=is_causal)
    workload = workload_from_fractions(shape, Setting(kept=(0.6, 0.3)))
    accelerator = accelerator_from_spec(load_preset("energon"))
    assert accelerator.structure.index_queue is not None
    rng = np.random.default_rng(0)
    sizes = {
        name: jnp.asarray(float(size) * np.exp(rng.uniform(-1.0, 1.0, 64)))
        for name, size in accelerator.sizes.items()
    }

    def latencies(index_queue: int, shown: int) -> np.ndarray:
        monkeypatch.setattr(row_stages, "_SHOWN", shown)
        structure = dataclasses.replace(accelerator.structure, index_queue=index_queue)

        def latency(own: dict[str, jax.Array]) -> jax.Array:
            machine = accelerator.replace(sizes=own, structure=structure)  # type: ignore[attr-defined]
            return cost(workload, machine).latency_cycles("attention")[0]

        return np.asarray(jax.jit(jax.vmap(latency))(sizes))

    for queue in (16, 600):
        every = latencies(queue, shape.num_heads)
        assert every.max() > 2.0 * every.min()
        np.testing.assert_allclose(latencies(queue, 2), every, rtol=1e-4)
