"""Random tensors with zeros, as traces of a machine that deals tiles to lanes, and the workloads that go with them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny_model

from codesign.gates import Relaxation
from codesign.hw.accelerator import Accelerator, accelerator_from_spec
from codesign.hw.closed_form import ModelShape, Setting, workload_from_fractions
from codesign.hw.resizing import spec_with_sizes
from codesign.hw.simulator import GemmShape
from codesign.hw.spec import AcceleratorSpec, load_preset
from codesign.hw.surrogate import Cost, cost
from codesign.mechanisms.acceltran_products import hard_on_product
from codesign.mechanisms.protocol import Context
from codesign.vocabulary import BLOCK_SITES
from codesign.workload import Operation, Stream, Trace, Workload, nonzero

SHAPE = ModelShape(
    num_layers=2, num_tokens=48, num_heads=2, head_dim=16, width=32, hidden=64, head=(1, 32, 10)
)
HEADS = ("query", "key", "value")
PAIRS = ("scores", "probabilities")


def gemm_shapes(shape: ModelShape = SHAPE) -> dict[str, GemmShape]:
    attention = shape.num_heads * shape.head_dim
    shapes = {
        "qkv": GemmShape(inner=shape.width, outer=3 * attention),
        "out": GemmShape(inner=attention, outer=shape.width),
        "up": GemmShape(inner=shape.width, outer=shape.hidden),
        "down": GemmShape(inner=shape.hidden, outer=shape.width),
    }
    if shape.head is not None:
        rows, inner, outer = shape.head
        shapes["head"] = GemmShape(inner=inner, outer=outer, rows=rows)
    return shapes


def make_bits(
    layers: int, rng: np.random.Generator | None = None, width: int = 8
) -> dict[str, np.ndarray]:
    """One width everywhere without a generator, else random legal ones."""

    def drawn(low: int, high: int, size: int = layers) -> np.ndarray:
        return np.full(size, width) if rng is None else rng.integers(low, high + 1, size)

    bits = {name: drawn(8, 16) for name in ("qk_bits", "v_bits")}
    for site in (*BLOCK_SITES, "head"):
        for side in ("weight_bits", "activation_bits"):
            bits[f"{site}.{side}"] = drawn(2, 8, layers if site in BLOCK_SITES else 1)
    return bits


def random_tensors(
    rng: np.random.Generator, valid: np.ndarray, shape: ModelShape = SHAPE
) -> dict[str, np.ndarray]:
    """Masks `[L, B, ...]` of random densities that differ between sites, rows and columns."""
    layers, heads = shape.num_layers, shape.num_heads
    batch, tokens = valid.shape

    def mask(*size: int) -> np.ndarray:
        # Columns and rows of their own densities, so that tiles are uneven.
        level = rng.uniform(0.05, 1.0)
        columns = rng.uniform(0.0, 1.0, (*size[:-2], 1, size[-1]))
        rows = rng.uniform(0.5, 1.0, (*size[:-1], 1))
        return rng.uniform(size=size) < level * rows * np.sqrt(columns)

    found = {site: mask(layers, batch, heads, tokens, shape.head_dim) for site in HEADS}
    found |= {site: mask(layers, batch, heads, tokens, tokens) for site in PAIRS}
    for site, shape_of in gemm_shapes(shape).items():
        if site in BLOCK_SITES:
            found[site] = mask(layers, batch, tokens, shape_of.inner)
            found[f"{site}.weight"] = mask(layers, shape_of.inner, shape_of.outer)
    return found


def make_trace(
    valid: np.ndarray,
    bits: dict[str, np.ndarray],
    tensors: dict[str, np.ndarray] | None = None,
    shape: ModelShape = SHAPE,
    *,
    is_causal: bool = False,
) -> Trace:
    """A trace; without tensors nothing is zero."""
    batch, tokens = valid.shape
    keep = np.broadcast_to(
        valid[:, None, None, None, :], (batch, shape.num_heads, 1, tokens, tokens)
    )
    keep = np.tril(keep) if is_causal else keep
    if tensors is not None and is_causal:
        tensors = tensors | {site: np.tril(tensors[site]) for site in PAIRS}
    return Trace(
        packed=np.packbits(np.broadcast_to(keep, (shape.num_layers, *keep.shape)), axis=-1),
        valid=valid,
        num_keys=tokens,
        head_dim=shape.head_dim,
        bits=bits,
        nonzero={} if tensors is None else {site: nonzero(one) for site, one in tensors.items()},
    )


def machine(preset: str = "acceltran-edge", **sizes: float) -> tuple[AcceleratorSpec, Accelerator]:
    """A preset with other sizes, `unit__lanes` for `unit.lanes`: its file, and the same as the cost model reads it."""
    named = {name.replace("__", "."): value for name, value in sizes.items()}
    accelerator = accelerator_from_spec(load_preset(preset))
    values = {
        name: jnp.asarray(value, accelerator.sizes[name].dtype) for name, value in named.items()
    }
    # One structure for all sizes, so that it is compiled once.
    resized = accelerator.replace(sizes=accelerator.sizes | values)  # type: ignore[attr-defined]
    return spec_with_sizes(load_preset(preset), named), resized


def priced(
    trace: Trace, accelerator: Accelerator, shape: ModelShape = SHAPE, *, is_causal: bool = False
) -> tuple[Cost, dict[str, np.ndarray]]:
    """The cost of what the model counts on a trace, and counts, heads summed."""
    layers = range(trace.packed.shape[0])
    masks = {
        site: np.stack([one.layer(layer) for layer in layers])
        for site, one in trace.nonzero.items()
    }
    price, counts = _priced(
        masks, trace.valid, trace.bits, accelerator, shape=shape, is_causal=is_causal
    )
    return price, {key: np.asarray(value) for key, value in counts.items()}


@functools.partial(
    jax.jit, static_argnames=("shape", "is_causal"), compiler_options=tiny_model.FAST_COMPILE
)
def _priced(
    masks: dict[str, jax.Array],
    valid: jax.Array,
    bits: dict[str, jax.Array],
    accelerator: Accelerator,
    *,
    shape: ModelShape,
    is_causal: bool,
) -> tuple[Cost, dict[str, jax.Array]]:
    found = _workload(masks, valid.astype(float), bits, shape, is_causal)
    counts = {key: value.count.sum(axis=2) for key, value in found.operations.items()}
    return cost(found, accelerator), counts


def _workload(
    masks: dict[str, jax.Array],
    valid: jax.Array,
    bits: dict[str, jax.Array],
    shape: ModelShape,
    is_causal: bool,
) -> Workload:
    """What the model counts: exact attention by head, densities, and tiles of products."""
    tokens = jnp.sum(valid, axis=1)[:, None]
    base = workload_from_fractions(shape, Setting(qk_bits=8.0, v_bits=8.0))

    def width(name: str) -> jax.Array:
        return bits[name].astype(float)[None]

    pairs = tokens * (tokens + 1) / 2 if is_causal else tokens**2
    of_heads = jnp.ones((1, shape.num_layers, shape.num_heads))
    counts = {
        "qk.mac": (pairs * shape.head_dim, "qk_bits", "qk_bits"),
        "softmax.exp": (pairs, "qk_bits", "qk_bits"),
        "pv.mac": (pairs * shape.head_dim, "qk_bits", "v_bits"),
        "softmax.reciprocal": (tokens, "qk_bits", "qk_bits"),
        "output.multiply": (tokens * shape.head_dim, "qk_bits", "v_bits"),
    }
    operations = {
        key: Operation(count[..., None] * of_heads, width(a)[..., None], width(b)[..., None])
        for key, (count, a, b) in counts.items()
    }
    streams = {
        name: Stream(
            vectors=(tokens[..., None] * of_heads)[..., None],
            bits=width(knob)[..., None],
            resident_bits=jnp.zeros((1, 1, 1)),
            width=shape.head_dim,
        )
        for name, knob in (
            ("query", "qk_bits"),
            ("key_rest", "qk_bits"),
            ("value", "v_bits"),
            ("output", "out.activation_bits"),
        )
    }

    def sized(site: str, gemm: Any, rows: jax.Array) -> Any:
        return gemm.replace(
            rows=rows,
            activation_bits=width(f"{site}.activation_bits"),
            weight_bits=width(f"{site}.weight_bits"),
        )

    rows = tokens * jnp.ones((1, shape.num_layers))
    statistics = base.rows["attention"]
    zeros: dict[str, Any] = _zeros(masks, valid, pairs, is_causal) if masks else {}
    return base.replace(  # type: ignore[attr-defined,no-any-return]
        operations=operations,
        streams=streams,
        rows={"attention": statistics.replace(queries=tokens[..., None] * of_heads)},  # type: ignore[attr-defined]
        block_gemms={site: sized(site, gemm, rows) for site, gemm in base.block_gemms.items()},
        end_gemms={
            site: sized(site, gemm, jnp.ones_like(tokens)) for site, gemm in base.end_gemms.items()
        },
        **zeros,
    )


def _zeros(
    masks: dict[str, jax.Array], valid: jax.Array, pairs: jax.Array, is_causal: bool
) -> dict[str, dict[str, Any]]:
    """Densities `[B, L]` and tiles `[B, L, H]`, as the hooks of `acceltran` count them."""
    layers, _, heads = masks["query"].shape[:3]
    number = jnp.sum(valid, axis=1)
    exists = valid[:, None, :, None] * valid[:, None, None, :]
    exists = jnp.tril(exists) if is_causal else exists
    context = Context(
        knobs={},
        widths={},
        ranges={},
        relaxation=Relaxation(temperature=jnp.zeros(()), smoothness=jnp.zeros(())),
        valid=valid,
        pairs=exists,
    )
    found: list[dict[str, Any]] = []
    for layer in range(layers):
        own = {site: mask[layer].astype(float) for site, mask in masks.items()}
        densities, tiles = {}, {}
        for site, mask in own.items():
            if site in HEADS:
                total, elements = mask * valid[:, None, :, None], number * heads * mask.shape[-1]
            elif site in PAIRS:
                total, elements = mask * exists, heads * pairs[:, 0]
            elif site in BLOCK_SITES:
                total, elements = mask * valid[..., None], number * mask.shape[-1]
            else:
                total, elements = mask[None], jnp.full((1,), float(mask.size))
            densities[site] = jnp.sum(total, axis=tuple(range(1, total.ndim))) / elements
        for site in BLOCK_SITES:
            inputs, outputs = {"qkv": (1, 3 * heads), "out": (heads, 1)}.get(site, (1, 1))
            weight, entering = own[f"{site}.weight"], own[site]
            split = jnp.reshape(weight, (inputs, weight.shape[0] // inputs, outputs, -1))
            right = jnp.swapaxes(split, 1, 2)
            right = jnp.reshape(right, (1, inputs * outputs, split.shape[1], split.shape[3]))
            left = jnp.swapaxes(jnp.reshape(entering, (*entering.shape[:2], inputs, -1)), 1, 2)
            tiles |= hard_on_product(context, left, right, site).tiles
        key = jnp.swapaxes(own["key"], 2, 3)
        tiles |= hard_on_product(context, own["query"], key, "qk").tiles
        tiles |= hard_on_product(context, own["probabilities"], own["value"], "pv").tiles
        found.append({"densities": densities, "tiles": tiles})
    stacked: dict[str, dict[str, Any]] = jax.tree.map(
        lambda *leaves: jnp.stack(leaves, axis=1), *found
    )
    return stacked
