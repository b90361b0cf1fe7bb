"""Random decisions of ESACT, and the workload that the mechanism counts on them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import mask_workloads as masks
import numpy as np
import tiny_model
from mask_workloads import ENDS, HEAD_DIM, SITES, WIDTH

from codesign.gates import Relaxation
from codesign.hw.accelerator import Accelerator, accelerator_from_spec
from codesign.hw.simulator import GemmShape
from codesign.hw.spec import AcceleratorSpec
from codesign.hw.surrogate import Cost, cost
from codesign.mechanisms.esact import OFF_CODE, Prediction, counted_plan, execution
from codesign.mechanisms.on_demand import wanted_keys
from codesign.mechanisms.protocol import Context, Operands, Plan, Selection, computed_rows
from codesign.references.esact import reference_sources, reference_top, reference_votes
from codesign.workload import Trace, Workload, gemm, layers_second

WINDOW = 8


def gemm_shapes(heads: int = 4) -> dict[str, GemmShape]:
    attention = heads * HEAD_DIM
    own = {
        "qkv": GemmShape(inner=WIDTH, outer=3 * attention),
        "out": GemmShape(inner=attention, outer=WIDTH),
    }
    return masks.gemm_shapes() | own


def random_trace(
    rng: np.random.Generator,
    valid: np.ndarray,
    *,
    structure: str = "clustered",
    layers: int = 1,
    heads: int = 4,
    is_causal: bool = False,
    is_dense: bool = False,
    has_random_bits: bool = True,
) -> Trace:
    """Decisions of a random policy on random structured scores."""
    bits = masks.make_bits(rng if has_random_bits else None, layers, "esact")
    exists = masks.existing_pairs(valid, is_causal)
    shape = (layers, len(valid), heads, valid.shape[1])
    if is_dense:
        pairs = np.broadcast_to(exists[None, :, :, None], (*shape[:3], 1, *exists.shape[2:]))
        return masks.make_trace(pairs, valid, bits)
    scores = masks.make_scores(rng, shape, structure)
    if rng.random() < 0.5:
        # Rows like the one before them.
        alike = rng.random(shape[3]) < rng.uniform(0.0, 1.0)
        for row in np.flatnonzero(alike[1:]) + 1:
            noise = rng.normal(scale=0.02, size=scores[:, :, :, row].shape)
            scores[:, :, :, row] = scores[:, :, :, row - 1] + noise
    whole = np.rint(scores * 1000.0).astype(np.int64) + 4000
    keep, source, ffn_source, compares = [], [], [], []
    for layer in whole:
        share = np.clip(rng.integers(40, 700) + rng.integers(-100, 400, heads), 20, 1024)
        similarity = rng.integers(0, 2 * rng.integers(4, 80), heads)
        similarity = np.where(rng.random(heads) < 0.1, OFF_CODE, np.minimum(similarity, 127))
        chosen = reference_top(layer, exists, share)
        rows = reference_sources(np.where(chosen, layer, 0), similarity)
        keep.append(chosen[:, :, None])
        source.append(rows)
        ffn_source.append(reference_votes(rows, int(rng.integers(1, heads + 2))))
        compares.append(similarity != OFF_CODE)
    trace = masks.make_trace(np.stack(keep), valid, bits)
    return trace.replace(  # type: ignore[attr-defined,no-any-return]
        source=np.stack(source), ffn_source=np.stack(ffn_source), compares=np.stack(compares)
    )


def in_windows(places: jax.Array) -> jax.Array:
    """Weights `[..., T, w]` of the rows `[..., T]` that rows name."""
    return jax.nn.one_hot(places % WINDOW, WINDOW, dtype=float)


def workload(
    keep: jax.Array, decided: dict[str, jax.Array], exists: jax.Array, valid: jax.Array, bits: Any
) -> Workload:
    """What the mechanism counts on masks `[L, B, H, 1, T, S]`; `decided` is empty where nothing is predicted."""
    valid, pairs = valid.astype(float), exists.astype(float)
    keep, tokens, heads = jnp.asarray(keep), jnp.sum(valid, axis=1), keep.shape[2]
    one = jnp.ones(())
    attention = heads * HEAD_DIM
    codes = jnp.zeros((*keep.shape[1:3], keep.shape[4], HEAD_DIM))

    def layer(index: int) -> Workload:
        widths = {
            name: jnp.asarray(value[index], float)
            for name, value in bits.items()
            if len(value) > index
        }
        context = Context(
            knobs={},
            widths=widths,
            ranges={},
            relaxation=Relaxation(temperature=one, smoothness=one),
            valid=valid,
            pairs=pairs,
            width=WIDTH,
        )
        kept = keep[index, :, :, 0].astype(float)
        plan, extra = Plan(), None
        rows = {site: tokens for site in SITES}
        if decided:
            plan, extra = counted_plan(
                context,
                Prediction(codes, codes, None),
                kept,
                in_windows(decided["source"][index]),
                in_windows(decided["ffn_source"][index]),
                decided["compares"][index].astype(float),
            )
            own = decided["ffn_source"][index] == jnp.arange(kept.shape[2])[None]
            rows["up"] = rows["down"] = jnp.sum(own * valid, axis=1)
        computed = jnp.broadcast_to(computed_rows(context, plan), kept.shape[:3])
        rows["qkv"] = jnp.mean(jnp.sum(computed, axis=-1), axis=-1)
        selection = Selection(
            weights=kept,
            fetched=wanted_keys(context, kept * computed[..., None]),
            fetched_bits=jnp.zeros(()),
            trace={},
        )
        operands = Operands(query=codes, key=codes, value=codes, logit_scale=one, value_scale=one)
        counts = execution(context, operands, selection, plan, kept)
        sizes = SITES | {"qkv": (WIDTH, attention), "out": (attention, WIDTH)}
        return Workload(
            operations=counts.operations | (extra.operations if extra else {}),
            rows=counts.rows,
            streams=counts.streams | (extra.streams if extra else {}),
            block_gemms={
                site: gemm(
                    rows[site],
                    *sizes[site],
                    widths[f"{site}.activation_bits"],
                    widths[f"{site}.weight_bits"],
                )
                for site in SITES
            },
            end_gemms={},
            head_dim=HEAD_DIM,
        )

    layers = [layer(index) for index in range(keep.shape[0])]
    whole = layers_second(jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))
    ends = {}
    for site, (inner, outer, size) in ENDS.items():
        number = tokens if size is None else jnp.full_like(tokens, size)
        widths = [
            jnp.asarray(bits[f"{site}.{side}_bits"][0], float) for side in ("activation", "weight")
        ]
        ends[site] = gemm(number, inner, outer, *widths)
    ends = {site: jax.tree.map(lambda leaf: leaf[:, None], end) for site, end in ends.items()}
    return whole.replace(end_gemms=ends)  # type: ignore[attr-defined,no-any-return]


@functools.partial(jax.jit, compiler_options=tiny_model.FAST_COMPILE)
def _priced(
    keep: jax.Array,
    decided: dict[str, jax.Array],
    exists: jax.Array,
    valid: jax.Array,
    bits: Any,
    machine: Accelerator,
) -> tuple[Cost, dict[str, jax.Array]]:
    found = workload(keep, decided, exists, valid, bits)
    counts = {key: value.count.sum(axis=2) for key, value in found.operations.items()}
    return cost(found, machine), counts


def priced(
    trace: Trace, spec: AcceleratorSpec, *, is_causal: bool = False
) -> tuple[Cost, dict[str, np.ndarray]]:
    """Returns the cost of a trace's decisions, and counts, heads summed."""
    decided = (
        {}
        if trace.source is None
        else {"source": trace.source, "ffn_source": trace.ffn_source, "compares": trace.compares}
    )
    price, counts = _priced(
        masks.masks_of(trace),
        decided,
        masks.existing_pairs(trace.valid, is_causal),
        trace.valid,
        trace.bits,
        accelerator_from_spec(spec),
    )
    return price, {key: np.asarray(value) for key, value in counts.items()}
