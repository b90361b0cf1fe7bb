"""What the JAX hard path does on examples, and what the simulators read of it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codesign.errors import CodesignError
from codesign.experiments.data import Examples, Part
from codesign.experiments.evaluate import HardChunk, hard_chunks
from codesign.experiments.problem import Problem
from codesign.hw import emulator
from codesign.hw.accelerator import Accelerator
from codesign.hw.simulator import GemmShape
from codesign.mechanisms import mechanism_by_name
from codesign.models.deploy import Deployment
from codesign.references.a3 import OFF as SEARCH_OFF
from codesign.references.esact import SIMILARITY_OFF
from codesign.structure import ModelStructure, PatchInput
from codesign.vocabulary import BLOCK_SITES
from codesign.workload import NonZero, Trace, nonzero

TRACE_CHUNK = 32
"""Most examples per call of the compiled tracing path."""


def traced_chunks(
    problem: Problem,
    deployed: Deployment,
    examples: Examples,
    machine: Accelerator | None = None,
) -> Iterator[HardChunk]:
    """Yields chunks of examples with everything the JAX hard path does on them, priced on `machine` or the problem's."""
    return hard_chunks(
        deployed,
        examples,
        machine or problem.accelerator,
        problem.buckets,
        mechanism=problem.mechanism,
        tracing=True,
        most=TRACE_CHUNK,
    )


def examples_of(problem: Problem, part: Part, num_examples: int) -> Examples:
    """Returns the first examples of a part.

    Raises:
      CodesignError: If `num_examples` is not positive, or the part is not there.
    """
    if num_examples < 1:
        raise CodesignError(f"at least one example is needed, got {num_examples}: raise the number")
    return problem.task.part(part).first(num_examples)


def trace_of(deployed: Deployment, batch: HardChunk) -> Trace:
    """Returns the masks and widths of a batch as the simulator reads them."""
    structure, layers, ends = deployed.structure, deployed.layers, deployed.ends
    probabilities = batch.tensors["probabilities"]
    num_tokens = probabilities.shape[-1]
    valid = np.ones((probabilities.shape[1], num_tokens), np.bool_)
    valid = np.asarray(batch.inputs.get("valid", valid), np.bool_)
    if "keep" in batch.tensors:
        keep = np.moveaxis(batch.tensors["keep"], 1, 3)  # [L, R, B, H, T, S] to [L, B, H, R, T, S]
        if structure.mechanism == "spatten":
            used = batch.tensors["used"] & keep[:, :, :, 0]
            keep = np.concatenate([keep, used[:, :, :, None]], axis=3)
    else:
        exists = np.broadcast_to(valid[:, None, None, :], probabilities.shape)
        keep = (np.tril(exists) if structure.is_causal else exists)[:, :, :, None]
    names = (
        "query_bits",
        "key_bits",
        "plane_bits",
        "search_bits",
        "tile_bits",
        "qk_bits",
        "v_bits",
    )
    bits: dict[str, NDArray[Any]] = {name: layers[name] for name in names if name in layers}
    for kind in ("weight_bits", "activation_bits"):
        bits |= {f"{site}.{kind}": layers[f"{site}_{kind}"] for site in BLOCK_SITES}
        bits |= {
            f"{site}.{kind}": np.atleast_1d(ends[f"{site}_{kind}"]) for site in structure.end_sites
        }
    compares = None
    if structure.mechanism == "esact":
        compares = layers["threshold"][..., 1] != SIMILARITY_OFF
    elif structure.mechanism == "a3":
        compares = layers["threshold"][..., 0] != SEARCH_OFF
    return Trace(
        packed=np.packbits(keep, axis=-1),
        valid=valid,
        num_keys=num_tokens,
        head_dim=structure.head_dim,
        bits=bits,
        source=batch.tensors.get("source"),
        ffn_source=batch.tensors.get("ffn_source"),
        compares=compares,
        one_hot=batch.tensors.get("one_hot"),
        ffn_full=batch.tensors.get("ffn_full"),
        nonzero=_nonzero(deployed, batch),
        mechanism=structure.mechanism,
    )


def _nonzero(deployed: Deployment, batch: HardChunk) -> dict[str, NonZero]:
    """Returns what is not zero in the tensors of a batch and in the weights; nothing for mechanisms that skip no zeros."""
    structure, tensors = deployed.structure, batch.tensors
    if not mechanism_by_name(structure.mechanism).hard.skips_zeros:
        return {}
    entering = emulator.entering(structure, deployed.layers, deployed.ends, tensors)
    sites = {
        "qkv": entering["qkv"],
        "query": tensors["query"],
        "key": tensors["key"],
        "value": tensors["value"],
        "scores": tensors["raw_scores"],
        "probabilities": tensors["probabilities"],
        "out": tensors["context"],
        "up": entering["up"],
        "down": tensors["hidden"],
    }
    sites |= {f"{site}.weight": deployed.layers[f"{site}_weight"] for site in BLOCK_SITES}
    return {site: nonzero(tensor) for site, tensor in sites.items()}


def gemm_shapes(structure: ModelStructure) -> dict[str, GemmShape]:
    """Returns the sizes of the linear layers by site."""
    width, attention = structure.width, structure.attention_width
    rows = None if structure.pooling == "all" else 1
    shapes = {
        "qkv": GemmShape(inner=width, outer=3 * attention),
        "out": GemmShape(inner=attention, outer=width),
        "up": GemmShape(inner=width, outer=structure.hidden),
        "down": GemmShape(inner=structure.hidden, outer=width),
        "head": GemmShape(inner=width, outer=structure.num_outputs, rows=rows),
    }
    if isinstance(structure.input, PatchInput):
        patches = structure.input
        shapes["embed"] = GemmShape(
            inner=patches.patch_values, outer=width, rows=patches.num_patches
        )
    if structure.pooler != "none":
        shapes["pool"] = GemmShape(inner=width, outer=width, rows=1)
    return shapes
