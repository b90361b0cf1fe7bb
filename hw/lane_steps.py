"""What layers do on lanes that are dealt tiles: operations of every head, with their tiles, bytes and weights.

A batch of examples like the one that is priced runs together. Arrays are `[B, L, H]`, 1 where all agree.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from codesign.hw.accelerator import Accelerator, UnitStructure
from codesign.hw.engine import buffer_bytes, effectual_share
from codesign.hw.gemm.counting import ceil
from codesign.hw.lane_tiles import Tiles, element_tiles, product_tiles
from codesign.hw.traffic import Moved, attention_parts, moved_elements
from codesign.vocabulary import LINEAR_MAC
from codesign.workload import Gemm, Workload

STEPS = {
    "norm qkv": "",
    "made": "norm qkv",
    "scores": "made",
    "softmax": "scores",
    "attention": "softmax",
    "out": "attention",
    "norm up": "out",
    "up": "norm up",
    "activation": "up",
    "down": "activation",
    "end": "",
}
"""Steps of a layer in order (`made`: Q, K and V), and which one each waits for; `end` is a linear layer outside."""
_MADE = ("query", "key_rest", "value")
"""Streams of queries, keys and values."""


@struct.dataclass
class Step:
    """One operation of every head, a batch of it.

    Attributes:
      tiles: Its tiles; None where nothing is executed.
      written: What it puts into the memory of the activations and that of their masks, byte.
      loaded: Weights and their masks, byte.
      spilled: What of the result does not fit on chip, to main memory and back, byte.
      unit: Name of the unit.
    """

    tiles: Tiles | None
    written: Moved
    loaded: Moved
    spilled: jax.Array
    unit: str = struct.field(pytree_node=False)


def nothing_moved() -> Moved:
    """Returns no bytes."""
    none = jnp.zeros((1, 1, 1))
    return Moved(data=none, masks=none)


def _stored(
    elements: jax.Array,
    bits: jax.Array,
    density: jax.Array | float,
    accelerator: Accelerator,
    *,
    shared: bool = False,
) -> Moved:
    """Returns the bytes of a batch's elements; `shared`: of all its examples together."""
    storage = accelerator.structure.storage
    assert storage is not None
    density = density if isinstance(density, float) else density[..., None]
    moved = moved_elements(elements, bits[..., None], density, storage)
    return moved if shared else _scaled(moved, storage.batch)


def _scaled(moved: Moved, factor: float) -> Moved:
    return Moved(data=moved.data * factor, masks=moved.masks * factor)


def layer_steps(workload: Workload, accelerator: Accelerator) -> dict[str, Step]:
    """Returns the steps of layers in the order in which they write, not knowing what fits."""
    structure = accelerator.structure
    storage = structure.storage
    assert storage is not None and structure.elements is not None
    tile, batch = structure.elements.tile, storage.batch
    gemms, operations = workload.block_gemms, workload.operations
    heads, head_dim = operations["qk.mac"].count.shape[-1], float(workload.head_dim)
    pairs = operations["softmax.exp"].count
    tokens = gemms["out"].rows[..., None]
    parts = {
        name: _scaled(moved, batch)
        for name, moved in attention_parts(workload, accelerator).items()
    }
    # A workload may hold the sums of its heads.
    summed = gemms["out"].inner / (head_dim * heads)
    existing = _existing(pairs / summed, tokens, tile) * summed

    def without_weights(tiles: Tiles, written: Moved, unit: UnitStructure) -> Step:
        return Step(
            tiles=tiles,
            written=written,
            loaded=nothing_moved(),
            spilled=jnp.zeros((1, 1, 1)),
            unit=unit.name,
        )

    def elements(
        key: str, rows: Any, columns: Any, count: Any, written: Moved, **more: Any
    ) -> Step:
        unit = structure.unit_of(key)
        tiles = element_tiles(
            (rows, columns), count, tile=tile, per_lane=unit.per_lane, batch=batch, **more
        )
        return without_weights(tiles, written, unit)

    def products(key: str, sides: Any, written: Moved) -> Step:
        unit = structure.unit_of(key)
        site = key.partition(".")[0]
        tiles = product_tiles(
            sides,
            operations[key].count,
            effectual_share(key, unit, workload),
            workload.tiles.get(site) if unit.skips_zeros else None,
            tile=tile,
            per_lane=unit.per_lane,
            batch=batch,
            existing=existing,
        )
        return without_weights(tiles, written, unit)

    def entering(site: str) -> Moved:
        gemm = gemms[site]
        density = workload.densities.get(site, 1.0)
        count = gemm.rows[..., None] * float(gemm.inner)
        return _stored(count, gemm.activation_bits, density, accelerator)

    def norm(site: str) -> Step:
        rows, width = gemms[site].rows[..., None], float(gemms[site].inner)
        return elements("norm.element", rows, width, rows * width, entering(site))

    steps: dict[str, Step] = {}
    if "qkv" in gemms:
        steps["norm qkv"] = norm("qkv")
        made = _linear("qkv", gemms["qkv"], workload, accelerator, 1, 3 * heads)
        present = [parts[name] for name in _MADE]
        # Head by head: Q, K, V.
        written = jax.tree.map(lambda *leaves: _interleaved(leaves, heads), *present)
        in_order = jax.tree.map(
            lambda leaf: (
                _interleaved(jnp.split(leaf, 3, axis=2), heads)
                if leaf.shape[2] == 3 * heads
                else leaf
            ),
            made,
        )
        steps["made"] = in_order.replace(written=written)
    nothing = nothing_moved()
    steps["scores"] = products("qk.mac", (tokens, head_dim, tokens), parts.get("scores", nothing))
    steps["softmax"] = elements(
        "softmax.exp", tokens, tokens, pairs, parts.get("probabilities", nothing), existing=existing
    )
    steps["attention"] = products("pv.mac", (tokens, tokens, head_dim), parts["output"])
    steps["out"] = _linear("out", gemms["out"], workload, accelerator, heads, 1)
    if "up" in gemms:
        steps["norm up"] = norm("up")
        steps["up"] = _linear("up", gemms["up"], workload, accelerator, 1, 1)
        rows, hidden = gemms["up"].rows[..., None], float(gemms["up"].outer)
        written = entering("down") if "down" in gemms else nothing
        steps["activation"] = elements("activation.element", rows, hidden, rows * hidden, written)
    if "down" in gemms:
        steps["down"] = _linear("down", gemms["down"], workload, accelerator, 1, 1)
    return steps


def _interleaved(parts: Any, heads: int) -> jax.Array:
    """Returns three arrays of heads as one in which the three of a head stand together, `[B, L, 3 H]`."""
    shape = jnp.broadcast_shapes(*(part.shape for part in parts), (1, 1, heads))
    stacked = jnp.stack([jnp.broadcast_to(part, shape) for part in parts], axis=3)
    return jnp.reshape(stacked, (*shape[:2], 3 * heads))


def _existing(pairs: jax.Array, tokens: jax.Array, tile: float) -> jax.Array:
    """Returns the fraction of the tiles of pairs that have any: less than 1 where pairs above the diagonal are missing."""
    blocks = jnp.maximum(ceil(tokens / tile), 1.0)
    beyond = jnp.maximum(tokens * (tokens - 1.0) / 2.0, 1e-9)
    is_causal = jnp.clip((tokens * tokens - pairs) / beyond, 0.0, 1.0)
    return 1.0 - is_causal * (blocks - 1.0) / (2.0 * blocks)


def _linear(
    site: str,
    gemm: Gemm,
    workload: Workload,
    accelerator: Accelerator,
    heads_in: int,
    heads_out: int,
) -> Step:
    """Returns a linear layer of whose input or output heads stand side by side; it writes nothing yet."""
    structure = accelerator.structure
    storage, unit = structure.storage, structure.unit_of(LINEAR_MAC)
    assert storage is not None and structure.elements is not None
    inner, outer = gemm.inner / heads_in, gemm.outer / heads_out
    rows = gemm.rows[..., None]
    statistics = workload.tiles.get(site) if unit.skips_zeros else None
    tiles = product_tiles(
        (rows, inner, outer),
        rows * (inner * outer) * jnp.ones((1, 1, heads_in * heads_out)),
        effectual_share(site, unit, workload),
        statistics,
        tile=structure.elements.tile,
        per_lane=unit.per_lane,
        batch=storage.batch,
    )
    density = workload.densities.get(f"{site}.weight", 1.0)
    weights = jnp.full((1, 1, heads_in * heads_out), inner * outer)
    return Step(
        tiles=tiles,
        written=nothing_moved(),
        loaded=_stored(weights, gemm.weight_bits, density, accelerator, shared=True),
        spilled=jnp.zeros((1, 1, 1)),
        unit=unit.name,
    )


def end_step(site: str, workload: Workload, accelerator: Accelerator) -> Step:
    """Returns a linear layer outside the layers; its input is written."""
    gemm = workload.end_gemms[site]
    rows = gemm.rows[..., None]
    written = _stored(rows * float(gemm.inner), gemm.activation_bits, 1.0, accelerator)
    step = _linear(site, gemm, workload, accelerator, 1, 1)
    return step.replace(written=written)  # type: ignore[attr-defined,no-any-return]


def spilling(steps: dict[str, Step], accelerator: Accelerator) -> dict[str, Step]:
    """Returns steps with what of their results does not fit into the memory of the activations, in the order of writing."""
    storage = accelerator.structure.storage
    assert storage is not None and storage.activations is not None
    capacity = buffer_bytes(accelerator)[storage.activations]
    before: jax.Array = jnp.zeros((1, 1, 1))
    result = {}
    for name in (one for one in STEPS if one in steps):
        step = steps[name]
        heads = step.written.data.shape[2] if step.tiles is None else step.tiles.number.shape[2]
        data = jnp.broadcast_to(
            step.written.data,
            (*step.written.data.shape[:2], max(heads, step.written.data.shape[2])),
        )
        after = before + jnp.cumsum(data, axis=2)
        over = jnp.maximum(after - capacity, 0.0) - jnp.maximum(after - data - capacity, 0.0)
        result[name] = step.replace(spilled=2.0 * over)  # type: ignore[attr-defined]
        before = after[..., -1:]
    return result
