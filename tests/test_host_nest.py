"""The host's closed form and the same host as loops on a dense machine."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.hw.accelerator import Accelerator, accelerator_from_spec
from codesign.hw.host import host_cost
from codesign.hw.host_nest import host_machine, nested_host_cost
from codesign.hw.spec import load_preset, preset_names
from codesign.workload import Gemm

WITH_HOST = [name for name in preset_names() if load_preset(name).host is not None]
FLOAT32 = 2e-6
# Rows, inner and outer size: whole and partial tiles, few columns, more than half the SRAM holds.
SHAPES = [
    (128, 768, 768),
    (128, 3072, 768),
    (700, 768, 3072),
    (33, 100, 10),
    (1, 40, 17),
    (2000, 1000, 50),
    (64, 64, 64),
    (300, 9000, 700),
]
WIDTHS = [(8.0, 8.0), (4.0, 6.5), (16.0, 8.0), (3.2, 12.0)]


def products() -> list[Gemm]:
    """One product per shape and pair of widths, `[1, 1]` each."""
    return [
        Gemm(
            rows=jnp.full((1, 1), float(rows)),
            activation_bits=jnp.full((1, 1), own),
            weight_bits=jnp.full((1, 1), weights),
            inner=inner,
            outer=outer,
        )
        for rows, inner, outer in SHAPES
        for own, weights in WIDTHS
    ]


def largest(values: list[jax.Array]) -> jax.Array:
    return jnp.max(jnp.stack(values), axis=0)


def check(accelerator: Accelerator) -> None:
    closed = host_cost(products(), accelerator, largest)
    nested = jax.jit(lambda machine: nested_host_cost(products(), machine, largest))(accelerator)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=FLOAT32, atol=1e-3), closed, nested
    )


@pytest.mark.parametrize("name", WITH_HOST[:1])
@pytest.mark.parametrize("prefetches", [False, True])
@pytest.mark.parametrize("scales", [False, True])
def test_closed_form_and_loops_agree(name: str, prefetches: bool, scales: bool):
    accelerator = accelerator_from_spec(load_preset(name))
    host = accelerator.structure.host
    assert host is not None
    host = dataclasses.replace(host, prefetches_weights=prefetches, scales_with_bits=scales)
    structure = dataclasses.replace(accelerator.structure, host=host)
    sizes = accelerator.sizes | {
        "host.rows": jnp.asarray(12.0),
        "host.sram_bytes": jnp.asarray(65536.0),
    }
    check(accelerator.replace(structure=structure, sizes=sizes))


def test_hosts_of_all_machines_agree():
    for name in WITH_HOST:
        check(accelerator_from_spec(load_preset(name)))


def test_the_host_as_a_machine_has_its_sizes():
    accelerator = accelerator_from_spec(load_preset(WITH_HOST[0]))
    machine = host_machine(accelerator)
    assert float(machine.num_multipliers) == 256.0
    assert float(machine.access_pj(2)) == pytest.approx(
        accelerator.structure.host.sram_pj_per_byte * 32**0.5, rel=FLOAT32
    )
