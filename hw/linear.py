"""Linear layers, norms and non-linearities on a machine's own units.

Rules: docs/cost_model.md, section 5. Weights come from main memory once per batch, and an example pays
its share of them. Counts follow from the dense products; E products stand side by side, `[B, L, E]`.
"""

import jax
import jax.numpy as jnp
from flax import struct

from codesign import units
from codesign.hw.accelerator import Accelerator, StorageStructure
from codesign.hw.engine import (
    EngineCost,
    add_element_energy,
    add_to,
    buffer_pj_per_byte,
    effectual_share,
    flat_cycles,
    passes,
    price_pj,
)
from codesign.hw.host import Maximum, side_by_side
from codesign.hw.traffic import Moved, add_transfers, moved_elements, spilled_bytes
from codesign.vocabulary import LINEAR_MAC, LINEAR_SITES, matches
from codesign.workload import Gemm, Workload

_SITE_OF_ATTENTION = "out"
"""Its input is the stream that attention writes."""


@struct.dataclass
class _Products:
    """Dense products `[B, L, E]`: time and energy by unit, weights and inputs that move."""

    busy_cycles: dict[str, jax.Array]
    energy_pj: dict[str, jax.Array]
    weights: Moved
    inputs: Moved


@struct.dataclass
class LinearWork:
    """A block's linear layers: time and energy by unit and memory, `[B, L]`; the first load, `[B]`."""

    busy_cycles: dict[str, jax.Array]
    energy_pj: dict[str, jax.Array]
    first_load_cycles: jax.Array


def block_work(workload: Workload, accelerator: Accelerator, written: Moved | None) -> LinearWork:
    """Returns what the linear layers of the blocks take.

    Args:
      workload: Its dense products, bits and densities.
      accelerator: A machine with storage.
      written: What attention writes, `[B, L]`, if it shares a memory of the activations.
    """
    storage = _storage(accelerator)
    gemms = workload.block_gemms
    sites = [site for site in LINEAR_SITES if site in gemms]
    products = _products(sites, gemms, workload, accelerator)
    total: _Products = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=2), products)
    busy, energy = total.busy_cycles, total.energy_pj
    for key, count in _elements(gemms).items():
        if not any(matches(key, unit.serves) for unit in accelerator.structure.units):
            continue
        unit = accelerator.structure.unit_of(key)
        for name, cycles in flat_cycles(unit, count, 1.0, accelerator.sizes).items():
            add_to(busy, name, cycles)
        constant, _ = unit.price(key.partition(".")[2])
        add_to(energy, unit.name, count * constant)
    transfers = _transfers(total, storage)
    if written is not None:
        spilled = spilled_bytes(written.data + total.inputs.data, accelerator)
        spilled = spilled - spilled_bytes(written.data, accelerator)
        transfers["dram"] = transfers["dram"] + spilled
    add_transfers(busy, energy, transfers, accelerator)
    add_element_energy(energy, busy, accelerator)
    first = products.weights.data[:, 0, 0] + products.weights.masks[:, 0, 0]
    return LinearWork(
        busy_cycles=busy,
        energy_pj=energy,
        first_load_cycles=first / accelerator.sizes["dram.bytes_per_cycle"],
    )


def end_cost(workload: Workload, accelerator: Accelerator, maximum: Maximum) -> EngineCost:
    """Returns the cost of the linear layers outside the blocks, one after the other, `[B, E]`."""
    gemms = workload.end_gemms
    sites = [site for site in LINEAR_SITES if site in gemms]
    if not sites:
        return EngineCost(cycles=jnp.zeros((1, 0)), busy_cycles={}, energy_pj={})
    products = _products(sites, gemms, workload, accelerator)
    total: _Products = jax.tree.map(lambda leaf: leaf[:, 0], products)
    busy, energy = total.busy_cycles, total.energy_pj
    storage = _storage(accelerator)
    transfers = _transfers(total, storage)
    if storage.activations is not None:
        transfers["dram"] = transfers["dram"] + spilled_bytes(total.inputs.data, accelerator)
    add_transfers(busy, energy, transfers, accelerator)
    add_element_energy(energy, busy, accelerator)
    return EngineCost(cycles=maximum(list(busy.values())), busy_cycles=busy, energy_pj=energy)


def _storage(accelerator: Accelerator) -> StorageStructure:
    storage = accelerator.structure.storage
    assert storage is not None
    return storage


def _elements(gemms: dict[str, Gemm]) -> dict[str, jax.Array]:
    """Returns the elements of norms, which feed `qkv` and `up`, and of the non-linearity behind `up`, `[B, L]`."""
    counts: dict[str, jax.Array] = {}
    for site in ("qkv", "up"):
        if site in gemms:
            add_to(counts, "norm.element", gemms[site].rows * float(gemms[site].inner))
    if "up" in gemms:
        add_to(counts, "activation.element", gemms["up"].rows * float(gemms["up"].outer))
    return counts


def _products(
    sites: list[str], gemms: dict[str, Gemm], workload: Workload, accelerator: Accelerator
) -> _Products:
    storage, unit = _storage(accelerator), accelerator.structure.unit_of(LINEAR_MAC)
    chosen = [gemms[site] for site in sites]
    rows = side_by_side([gemm.rows for gemm in chosen])
    activation_bits = side_by_side([gemm.activation_bits for gemm in chosen])
    weight_bits = side_by_side([gemm.weight_bits for gemm in chosen])
    inner = jnp.asarray([[[float(gemm.inner) for gemm in chosen]]])
    outer = jnp.asarray([[[float(gemm.outer) for gemm in chosen]]])
    ones = jnp.ones((1, 1))
    density, weight_density = (
        side_by_side([workload.densities.get(f"{site}{suffix}", ones) for site in sites])
        for suffix in ("", ".weight")
    )
    count = rows * (inner * outer)
    # Heads of a product are of one size.
    shares = [jnp.mean(effectual_share(site, unit, workload), axis=2) for site in sites]
    effectual = side_by_side(shares)
    repeats = passes(activation_bits, weight_bits, unit)
    cycles = flat_cycles(unit, count, effectual, accelerator.sizes)
    price = price_pj(unit, "mac", activation_bits, weight_bits)
    products = count * effectual
    spent = {unit.name: products * price}
    per_byte = buffer_pj_per_byte(accelerator)
    for buffer, sharing in unit.reads_of(LINEAR_MAC):
        read_bytes = products * (weight_bits / (units.BITS_PER_BYTE * sharing))
        add_to(spent, buffer, read_bytes * per_byte[buffer])
    weights = moved_elements(
        jnp.broadcast_to(inner * outer / storage.batch, rows.shape),
        weight_bits,
        weight_density,
        storage,
    )
    is_new = jnp.asarray([[[float(site != _SITE_OF_ATTENTION) for site in sites]]])
    inputs = moved_elements(rows * inner * is_new, activation_bits, density, storage)
    return _Products(
        busy_cycles={name: value * repeats for name, value in cycles.items()},
        energy_pj=spent,
        weights=weights,
        inputs=inputs,
    )


def _transfers(total: _Products, storage: StorageStructure) -> dict[str, jax.Array]:
    """Returns bytes by memory: weights through main memory into their own, inputs into theirs, masks."""
    transfers = {
        "dram": total.weights.data + total.weights.masks,
        storage.weights: total.weights.data,
    }
    if storage.activations is None:
        return transfers
    add_to(transfers, storage.activations, total.inputs.data)
    if storage.masks is not None:
        add_to(transfers, storage.masks, total.weights.masks + total.inputs.masks)
    return transfers
