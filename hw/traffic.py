"""Bytes that move: streams from and to main memory, or through a machine's own memories.

Rules: docs/cost_model.md, sections 2 and 5. Arrays are `[B, L]` unless they say otherwise.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from codesign import gates, units
from codesign.errors import UnknownNameError
from codesign.hw.accelerator import Accelerator, StorageStructure, Structure
from codesign.hw.engine import add_to, buffer_bytes, buffer_pj_per_byte
from codesign.hw.rows import shared_fetches
from codesign.workload import Workload

_STREAM_SITES = {"query": "query", "value": "value", "output": "out"}
"""Tensor that a stream carries, where it is not the key."""


@struct.dataclass
class Moved:
    """Bytes of a number of elements: what is stored of them, and their masks."""

    data: jax.Array
    masks: jax.Array

    def __add__(self, other: "Moved") -> "Moved":
        """Adds two movements."""
        return Moved(data=self.data + other.data, masks=self.masks + other.masks)


def moved_elements(
    elements: jax.Array,
    bits: jax.Array,
    density: jax.Array | float,
    storage: StorageStructure,
) -> Moved:
    """Returns the bytes of elements: with masks only those that are not zero, and a mask bit of each."""
    if storage.masks is None:
        density = 1.0
    return Moved(
        data=elements * (bits * density / units.BITS_PER_BYTE),
        masks=elements * (storage.mask_bits / units.BITS_PER_BYTE),
    )


def attention_parts(workload: Workload, accelerator: Accelerator) -> dict[str, Moved]:
    """Returns what each head writes to the memory of the activations, `[B, L, H]`: streams, `scores`, `probabilities`."""
    structure = accelerator.structure
    storage = structure.storage
    assert storage is not None
    parts = {}
    for name, stream in workload.streams.items():
        elements = stream.vectors[..., -1] * float(stream.width)
        density = _by_head(workload.densities.get(_STREAM_SITES.get(name, "key"), 1.0))
        bits = _stream_bits(name, workload, structure)[..., None]
        parts[name] = moved_elements(elements, bits, density, storage)
    if storage.stores_scores:
        score, product = workload.operations["softmax.exp"], workload.operations["pv.mac"]
        for site, bits in (("scores", score.bits_a), ("probabilities", product.bits_a)):
            density = _by_head(workload.densities.get(site, 1.0))
            parts[site] = moved_elements(score.count, bits, density, storage)
    return parts


def _by_head(density: jax.Array | float) -> jax.Array | float:
    return density if isinstance(density, float) else density[..., None]


def attention_writes(workload: Workload, accelerator: Accelerator) -> Moved:
    """Returns what attention writes to the memory of the activations: Q, K, V, output, scores, probabilities."""
    parts = [
        Moved(data=jnp.sum(part.data, axis=2), masks=jnp.sum(part.masks, axis=2))
        for part in attention_parts(workload, accelerator).values()
    ]
    return functools.reduce(lambda one, other: one + other, parts)


def spilled_bytes(data: jax.Array, accelerator: Accelerator) -> jax.Array:
    """Returns the bytes of a layer's activations that do not fit on chip: out to main memory and back."""
    storage = accelerator.structure.storage
    assert storage is not None and storage.activations is not None
    capacity = buffer_bytes(accelerator)[storage.activations] / storage.batch
    return 2.0 * jnp.maximum(data - capacity, 0.0)


def add_transfers(
    busy_cycles: dict[str, jax.Array],
    energy_pj: dict[str, jax.Array],
    transfers: dict[str, jax.Array],
    accelerator: Accelerator,
) -> None:
    """Adds time and energy of bytes moved, by memory; `dram` is main memory."""
    structure, per_byte = accelerator.structure, buffer_pj_per_byte(accelerator)
    rates = {buffer.name: buffer.bytes_per_cycle for buffer in structure.buffers}
    for name, moved in transfers.items():
        if name == "dram":
            add_to(busy_cycles, name, moved / accelerator.sizes["dram.bytes_per_cycle"])
            add_to(energy_pj, name, moved * structure.dram_pj_per_byte)
        else:
            add_to(busy_cycles, name, moved / rates[name])
            add_to(energy_pj, name, moved * per_byte[name])


def _stream_bits(name: str, workload: Workload, structure: Structure) -> jax.Array:
    """Returns bits per element of a stream, `[1, L]`; separate storage fetches kept keys in full."""
    bits = workload.streams[name].bits[..., 0]
    if name == "key_rest" and structure.has_separate_storage:
        for other, stream in workload.streams.items():
            if other.removeprefix("key").isdigit():
                bits = bits + stream.bits[..., 0]
    return bits


def _fits(workload: Workload, accelerator: Accelerator) -> jax.Array | float:
    """Returns 1 where every buffer holds its whole head, else 0, `[B, L]`; 0 where no stream has a buffer.

    True derivative zero; substituted: that of 1 / (1 + (needed / capacity)^4), so that a buffer
    just too small is worth enlarging.
    """
    needed: dict[str, jax.Array] = {}
    for stream in workload.streams.values():
        if stream.buffer:
            resident = stream.resident_bits[..., 0] / units.BITS_PER_BYTE
            present = needed.get(stream.buffer)
            needed[stream.buffer] = resident if present is None else jnp.maximum(present, resident)
    fits: jax.Array | float = 1.0 if needed else 0.0
    for name, resident in needed.items():
        if f"{name}.bytes" not in accelerator.sizes:
            raise UnknownNameError(
                f"accelerator `{accelerator.structure.name}` has no buffer `{name}`: add it to "
                "`memories`, or choose a machine made for this mechanism"
            )
        ratio = resident / accelerator.sizes[f"{name}.bytes"]
        square = ratio * ratio
        soft = 1.0 / (1.0 + square * square)
        fits = fits * gates.straight_through(ratio <= 1.0, soft)
    return fits


def stream_bytes(workload: Workload, accelerator: Accelerator) -> jax.Array:
    """Returns bytes moved from and to main memory, `[B, L]`."""
    moved, by_block = [], []
    for name, stream in workload.streams.items():
        element = _stream_bits(name, workload, accelerator.structure) / units.BITS_PER_BYTE
        sent = stream.vectors * (element * stream.width)[..., None, None]
        if sent.shape[-1] == 1:
            moved.append(jnp.sum(sent[..., 0], axis=2))
        else:
            by_block.append(sent)
    if by_block:
        # Sharing is linear in what is fetched, so all streams are shared at once.
        fetched = functools.reduce(jnp.add, by_block)
        whole_head = jnp.sum(fetched[..., -1], axis=2)
        if "query_block" in accelerator.sizes:
            queries = workload.rows["attention"].queries
            shared = shared_fetches(fetched, queries, accelerator.sizes["query_block"])
            moved.append(shared + _fits(workload, accelerator) * (whole_head - shared))
        else:
            moved.append(whole_head)
    return functools.reduce(jnp.add, moved)
