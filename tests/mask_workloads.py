"""Random masks of several structures, and the workloads that SOFA and LAPA count on them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codesign.hw.simulator import GemmShape
from codesign.mechanisms.lapa import CODE_BITS, QUERY_CODE_BITS as LAPA_QUERY_BITS
from codesign.mechanisms.on_demand import WEIGHT_CODE_BITS
from codesign.mechanisms.sofa import QUERY_CODE_BITS as SOFA_QUERY_BITS, SCORE_BITS
from codesign.segments import RADIUS_OFF, SHARE_ONE, hard_segments
from codesign.workload import (
    Trace,
    Workload,
    fetched_vectors,
    gemm,
    grid_levels,
    layers_second,
    operation,
    row_statistics,
    stream,
)

WIDTH, HEAD_DIM = 48, 16
SITES = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, 96), "down": (96, WIDTH)}
ENDS = {"embed": (16, WIDTH, None), "head": (WIDTH, 10, 1)}
STRUCTURES = ("uniform", "banded", "clustered")


def gemm_shapes() -> dict[str, GemmShape]:
    blocks = {name: GemmShape(inner=k, outer=n) for name, (k, n) in SITES.items()}
    return blocks | {
        name: GemmShape(inner=k, outer=n, rows=rows) for name, (k, n, rows) in ENDS.items()
    }


def make_bits(
    rng: np.random.Generator | None, layers: int, mechanism: str
) -> dict[str, np.ndarray]:
    """Published widths without a generator, else random legal ones."""

    def drawn(low: int, high: int, default: int, size: int = layers) -> np.ndarray:
        return np.full(size, default) if rng is None else rng.integers(low, high + 1, size)

    bits = {name: drawn(8, 16, 16) for name in ("qk_bits", "v_bits")}
    if mechanism == "sofa":
        bits["tile_bits"] = drawn(2, 5, 5)  # A tile of the tests holds a segment.
    elif mechanism == "lapa":
        low = drawn(2, 4, 2)
        middle = low + drawn(1, 2, 2)
        bits["key_bits"] = np.stack([low, middle, middle + drawn(1, 2, 4)], axis=1)
    for name in (*SITES, *ENDS):
        for side in ("weight_bits", "activation_bits"):
            bits[f"{name}.{side}"] = drawn(2, 8, 8, layers if name in SITES else 1)
    return bits


def make_scores(
    rng: np.random.Generator, shape: tuple[int, int, int, int], structure: str
) -> np.ndarray:
    """Scores `[L, B, H, T, T]`: independent, highest near the diagonal, or alike for groups of queries."""
    layers, batch, heads, tokens = shape
    noise = rng.normal(size=(layers, batch, heads, tokens, tokens))
    if structure == "uniform":
        return noise
    if structure == "banded":
        distance = np.abs(np.arange(tokens)[:, None] - np.arange(tokens)) / tokens
        return noise - 12.0 * distance
    popular = rng.normal(size=(layers, batch, heads, 4, tokens))
    return noise + 2.5 * popular[..., rng.integers(0, 4, tokens), :]


def make_masks(
    rng: np.random.Generator,
    scores: np.ndarray,
    exists: np.ndarray,
    bits: Mapping[str, np.ndarray],
    mechanism: str,
) -> np.ndarray:
    """Masks `[L, B, H, R, T, T]` of a random policy: what `mechanism` keeps of scores `[L, B, H, T, T]`."""
    layers = []
    for index, layer in enumerate(scores):
        pairs = np.broadcast_to(exists, layer.shape)
        if mechanism == "dense":
            rounds = [pairs]
        elif mechanism == "sofa":
            share = rng.integers(40, SHARE_ONE + 1, layer.shape[1])
            radius = np.where(rng.random(layer.shape[1]) < 0.5, RADIUS_OFF, rng.integers(500, 4000))
            whole = np.clip(np.round(layer * 1000.0), -30000, 30000).astype(np.int32)
            chosen = SEGMENTS(whole, exists, share, radius, bits["tile_bits"][index])
            rounds = [np.asarray(chosen.largest, bool), np.asarray(chosen.weights, bool)]
        else:
            alive, rounds = pairs, []
            for _ in range(3):
                alpha = rng.uniform(0.4, 1.8, (layer.shape[1], 1, 1))
                seen = np.where(alive, layer + 0.5 * rng.normal(size=layer.shape), -1e9)
                number = np.maximum(alive.sum(axis=-1, keepdims=True), 1)
                top = seen.max(axis=-1, keepdims=True)
                mean = np.where(alive, seen, 0.0).sum(axis=-1, keepdims=True) / number
                alive = alive & (seen >= top - alpha * (top - mean))
                rounds.append(alive)
        layers.append(np.stack(rounds, axis=2))
    return np.stack(layers)


SEGMENTS = jax.jit(hard_segments)


def make_trace(masks: np.ndarray, valid: np.ndarray, bits: dict[str, np.ndarray]) -> Trace:
    return Trace(
        packed=np.packbits(masks, axis=-1),
        valid=valid,
        num_keys=masks.shape[-1],
        head_dim=HEAD_DIM,
        bits=bits,
    )


def random_trace(
    rng: np.random.Generator,
    valid: np.ndarray,
    mechanism: str,
    *,
    structure: str = "clustered",
    layers: int = 1,
    heads: int = 4,
    is_causal: bool = False,
    has_random_bits: bool = True,
) -> Trace:
    bits = make_bits(rng if has_random_bits else None, layers, mechanism)
    exists = existing_pairs(valid, is_causal)
    scores = make_scores(rng, (layers, len(valid), heads, valid.shape[1]), structure)
    return make_trace(make_masks(rng, scores, exists, bits, mechanism), valid, bits)


def existing_pairs(valid: np.ndarray, is_causal: bool) -> np.ndarray:
    exists = valid[:, None, :, None] & valid[:, None, None, :]
    return exists & np.tri(valid.shape[1], dtype=bool) if is_causal else exists


def masks_of(trace: Trace) -> np.ndarray:
    return np.stack([trace.keep(layer) for layer in range(len(trace.packed))])


def workload_from_masks(
    keep: jax.Array, exists: jax.Array, valid: jax.Array, bits: Mapping[str, Any]
) -> Workload:
    """The workload of hard masks `[L, B, H, R, T, S]`, through the statistics that models report."""
    valid, exists = valid.astype(float), exists.astype(float)
    tokens = jnp.sum(valid, axis=1)
    rows = valid[:, None, :]
    batch, heads = keep.shape[1:3]
    num_keys = keep.shape[-1]
    d = HEAD_DIM

    def site_bits(site: str, index: int) -> tuple[jax.Array, jax.Array]:
        return tuple(
            jnp.asarray(bits[f"{site}.{side}"][index], float)
            for side in ("activation_bits", "weight_bits")
        )

    def layer(index: int) -> Workload:
        def by_head(value: jax.Array) -> jax.Array:
            return jnp.broadcast_to(value, (batch, heads))

        def summed(mask: jax.Array) -> jax.Array:
            return by_head(jnp.sum(mask, axis=(2, 3)))

        rounds = [keep[index, :, :, number].astype(float) for number in range(keep.shape[3])]
        final = rounds[-1]
        kept, queries = summed(final), by_head(tokens[:, None])
        qk, v = (jnp.asarray(bits[name][index], float) for name in ("qk_bits", "v_bits"))
        token_bits, weight_bits = site_bits("qkv", index)
        wanted = fetched_vectors(final, rows)[..., -1]
        together = fetched_vectors(
            jnp.reshape(final, (batch, 1, -1, num_keys)), jnp.tile(valid, (1, heads))[:, None, :]
        )
        sizes = jnp.asarray([2.0**level for level in range(grid_levels(num_keys))])
        blocks = jnp.broadcast_to(
            jnp.ceil(tokens[:, None] / sizes[None])[:, None], (batch, heads, len(sizes))
        )
        operations = {
            "generate.mac": operation(2.0 * wanted * WIDTH * d, token_bits, weight_bits),
            "qk.mac": operation(kept * d, qk, qk),
            "softmax.exp": operation(kept, qk, qk),
            "pv.mac": operation(kept * d, qk, v),
            "output.divide": operation(queries * d, qk, v),
        }
        streams = {
            "generate_tokens": stream(
                jnp.broadcast_to(together[..., -1:] / heads, (batch, heads, 1)), token_bits, WIDTH
            ),
            "generate_weights": stream(blocks * (2.0 * d), weight_bits, WIDTH),
            "query": stream(queries[..., None], qk, d),
            "output": stream(queries[..., None], site_bits("out", index)[0], d),
        }
        has_segments, has_planes = "tile_bits" in bits, "key_bits" in bits
        if has_segments or has_planes:
            query_bits = SOFA_QUERY_BITS if has_segments else LAPA_QUERY_BITS
            operations |= {
                "predict.shift_add": operation(queries * WIDTH * d, token_bits, WEIGHT_CODE_BITS),
                "encode.encode": operation(queries * d, qk, query_bits),
            }
            streams["tokens"] = stream((queries / heads)[..., None], token_bits, WIDTH)
            streams["weight_codes"] = stream(blocks * d, WEIGHT_CODE_BITS, WIDTH)
        if has_segments:
            cycles, joins = segment_counts(exists, rounds[0], bits["tile_bits"][index])
            sorted_bits = SCORE_BITS + 1.0
            operations |= {
                "filter0.shift_add": operation(summed(exists) * d, qk, query_bits),
                "select.compare": operation(by_head(cycles), sorted_bits, sorted_bits),
                "threshold.compare": operation(summed(rounds[0]), sorted_bits, sorted_bits),
                "softmax.exp": operation(kept + joins, qk, qk),
                "softmax.add": operation(kept + joins * (d + 1), qk, qk),
                "softmax.compare": operation(by_head(joins), qk, qk),
                "softmax.multiply": operation(by_head(joins * (d + 1)), qk, qk),
            }
        elif has_planes:
            planes = [1.0, *(jnp.asarray(one, float) for one in bits["key_bits"][index])]
            for number, mask in enumerate([exists, *rounds[:-1]]):
                name, alive = f"filter{number}", summed(mask)
                plane = planes[number + 1] - planes[number]
                operations |= {
                    f"{name}.shift_add": operation(alive * d, plane, query_bits),
                    f"{name}.statistic": operation(alive, CODE_BITS, CODE_BITS),
                    f"{name}.compare": operation(alive, CODE_BITS, CODE_BITS),
                }
        return Workload(
            operations=operations,
            rows={"attention": row_statistics(jnp.sum(final, axis=-1), rows, num_keys)},
            streams=streams,
            block_gemms={
                site: gemm(tokens, k, heads * d if site == "qkv" else n, *site_bits(site, index))
                for site, (k, n) in SITES.items()
            },
            end_gemms={},
            head_dim=d,
        )

    layers = [layer(index) for index in range(keep.shape[0])]
    workload = layers_second(jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))
    ends = {
        site: gemm(tokens if size is None else jnp.ones_like(tokens), k, n, *site_bits(site, 0))
        for site, (k, n, size) in ENDS.items()
    }
    ends = {site: jax.tree.map(lambda leaf: leaf[:, None], end) for site, end in ends.items()}
    return workload.replace(end_gemms=ends)


def segment_counts(
    exists: jax.Array, largest: jax.Array, tile_bits: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cycles of the sorting network, and segments that hold a key, of each head, `[B, H]`."""
    num_keys = exists.shape[-1]
    own = jnp.arange(num_keys) // 2 ** jnp.asarray(tile_bits)
    member = (own[:, None] == jnp.arange(num_keys)[None]).astype(float)
    sizes, number = exists @ member, largest @ member
    cycles = jnp.ceil(sizes / 12.0) * jnp.ceil(number / 4.0)
    return jnp.sum(cycles, axis=(2, 3)), jnp.sum(sizes > 0, axis=(2, 3)).astype(float)
