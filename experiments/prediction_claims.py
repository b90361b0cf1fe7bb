"""Published claims about prediction without multipliers, measured on the queries and keys of trained models.

A trained dense model runs on the integer path of `sofa` with everything kept: 8-bit linear layers, 16-bit queries and keys,
on examples that it was not trained on. Figures are means over heads; a head of a layer of a seed is one sample.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from codesign.errors import CodesignError
from codesign.experiments.configs import Experiment, experiment_by_name
from codesign.experiments.evaluate import (
    DENSE_ATTENTION_BITS,
    DENSE_LINEAR_BITS,
    Point,
    deployment,
)
from codesign.experiments.prediction_measures import (
    CODES,
    FLASH_TILE,
    MATRICES,
    MIN_KEYS,
    NUM_SEGMENTS,
    SHARES,
    THRESHOLDS,
    WINDOW,
    Floats,
    LayerSample,
    critical_rows,
    measure_layer,
)
from codesign.experiments.problem import Problem, load_problem
from codesign.experiments.run import versions
from codesign.experiments.start import measured_ranges, start_policy, with_threshold
from codesign.experiments.traced import examples_of, traced_chunks
from codesign.references.sorted_attention import KINDS, ORDERS, products

Figures: TypeAlias = dict[str, npt.NDArray[np.float64]]
"""By name: one value per head of each layer, `[L * H]`, or one for all, `[1]`; not a number where there is none."""

KEEP_ALL = 100.0
"""Threshold variable of `sofa` that keeps every key (ours: sigmoid(100) is 1)."""
PUBLISHED_KEPT, PUBLISHED_HEAD_DIM = 256, 64
"""A quarter of 1024 keys (arXiv 2407.10416), and BERT's width of a head."""
REUSE_AWARE = "reuse_aware"
WEIGHTS = {
    "unit": {"add": 1, "multiply": 1, "compare": 1, "exp": 1},
    # Bits of 16-bit operands: an exponential is a table and a linear interpolation (ours).
    "bits": {"add": 16, "multiply": 256, "compare": 16, "exp": 272},
}
"""What an operation counts for."""


def claims_experiment(task: str, seed: int, data: Path | None) -> Experiment:
    """Returns a named experiment on the machine `sofa`; its dense model is that of every other machine."""
    named = experiment_by_name(task)
    return dataclasses.replace(
        named,
        mechanism="sofa",
        preset="sofa",
        seed=seed,
        data=dataclasses.replace(named.data, data=data),
    )


def study(
    tasks: Sequence[str],
    seeds: Sequence[int],
    num_examples: Sequence[int],
    *,
    data: Path | None,
    cache: Path,
    progress: bool,
) -> dict[str, Any]:
    """Returns the record of the study: for every task its sizes and figures.

    Args:
      tasks: Names of experiments.
      seeds: Seeds of the dense models.
      num_examples: Examples of the validation part of each task, the first ones.
      data: Folder of the data of the only task; None: each task's own.
      cache: Folder of the dense models.
      progress: Whether to say what is being measured.
    """
    found = []
    for task, number in zip(tasks, num_examples, strict=True):
        by_seed = []
        for seed in seeds:
            if progress:
                print(f"{task}, seed {seed}", flush=True)
            problem = load_problem(
                claims_experiment(task, seed, data), cache=cache, progress=progress
            )
            measured = list(samples(problem, number))
            if not measured:
                raise CodesignError(
                    f"no example of `{task}` has {MIN_KEYS + WINDOW} tokens: raise `--num-examples`, or leave the task out"
                )
            by_seed.append(figures(measured))
        structure = problem.config.structure
        found.append(
            {
                "task": task,
                "seeds": list(seeds),
                "num_examples": min(number, len(problem.task.part("validation"))),
                "num_layers": structure.num_layers,
                "num_heads": structure.num_heads,
                "head_dim": structure.head_dim,
                "is_causal": structure.is_causal,
                "figures": combined(by_seed),
            }
        )
    return {
        "study": "prediction-claims",
        # Of integers, nothing depends on the machine.
        "versions": {name: text for name, text in versions().items() if name != "platform"},
        "tasks": found,
        "published_size": published_size(),
    }


def samples(problem: Problem, num_examples: int) -> Iterator[list[LayerSample]]:
    """Yields what was measured on each example, layer by layer; examples that are too short are left out.

    Args:
      problem: A trained dense model on the machine `sofa`.
      num_examples: Examples of the validation part, >= 1.
    """
    policy = start_policy(
        problem, linear_bits=DENSE_LINEAR_BITS, attention_bits=DENSE_ATTENTION_BITS
    )
    everything = np.full(policy.layers["threshold"].shape, KEEP_ALL)
    point = Point(
        params=problem.params,
        policy=with_threshold(policy, everything),
        calibration=measured_ranges(problem, problem.params),
    )
    deployed = deployment(problem, point)
    is_causal = deployed.structure.is_causal
    for chunk in traced_chunks(problem, deployed, examples_of(problem, "validation", num_examples)):
        tensors = chunk.tensors
        for example in range(len(chunk.indices)):
            tokens = tensors["query"].shape[3]
            if "valid" in chunk.inputs:
                tokens = int(np.sum(chunk.inputs["valid"][example]))
            layers = []
            for layer in range(deployed.structure.num_layers):
                query, key, scores = (
                    tensors[name][layer, example, :, :tokens].astype(np.int64)
                    for name in ("query", "key", "scores")
                )
                sample = measure_layer(query, key, scores[..., :tokens], is_causal=is_causal)
                if sample is not None:
                    layers.append(sample)
            if layers:
                yield layers


def figures(measured: Sequence[Sequence[LayerSample]]) -> Figures:
    """Returns the figures of one seed.

    Args:
      measured: Samples by example and layer; at least one example.
    """
    by_layer = [list(layer) for layer in zip(*measured, strict=True)]
    parts = [_layer_figures(layer) for layer in by_layer]
    by_head = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    everything = [sample for layer in by_layer for sample in layer]
    return by_head | _operation_figures(everything) | _load_figures(everything)


def _layer_figures(layer: Sequence[LayerSample]) -> Figures:
    """Returns the figures of the heads of one layer, `[H]` each, from all its examples."""
    found: Figures = {}
    for name in sorted({name for sample in layer for name in sample.sums}):
        parts = [sample.sums[name] for sample in layer if name in sample.sums]
        number = sum(number for _, number in parts)
        found[name] = np.sum([total for total, _ in parts], axis=0) / number
    for share in SHARES:
        one, two = (
            found[f"recall.{share:g}.{name}"] for name in ("one_leading_one", "two_leading_ones")
        )
        found[f"recall.{share:g}.one_wins"] = _wins(one - two)
    for pairs in layer[0].distances:
        joined = {
            name: np.concatenate([sample.distances[pairs][name] for sample in layer], axis=-1)
            for name in MATRICES
        }
        found |= _similarity(pairs, joined)
    return found


def _similarity(pairs: str, distances: dict[str, Floats]) -> Figures:
    """Returns how near distances of predicted rows come to those of exact ones, by code.

    Args:
      pairs: Their name; of windows, decisions are made row by row.
      distances: `[H, P]` by matrix.
    """
    found: Figures = {}
    exact = distances["exact"]
    found[f"{pairs}.distance"] = exact.mean(axis=-1)
    for code in CODES:
        own = distances[code]
        found[f"{pairs}.error.{code}"] = np.abs(own - exact).mean(axis=-1)
        found[f"{pairs}.bias.{code}"] = (own - exact).mean(axis=-1)
        found[f"{pairs}.pearson.{code}"] = correlation(own, exact)
        found[f"{pairs}.spearman.{code}"] = correlation(_mean_ranks(own), _mean_ranks(exact))
    for threshold in THRESHOLDS:
        decided = {name: _similar(pairs, one, threshold) for name, one in distances.items()}
        for name in MATRICES:
            found[f"{pairs}.similar.{threshold:g}.{name}"] = decided[name].mean(axis=-1)
        for code in CODES:
            agree = decided[code] == decided["exact"]
            both = np.sum(decided[code] & decided["exact"], axis=-1)
            either = decided[code].sum(axis=-1) + decided["exact"].sum(axis=-1)
            found[f"{pairs}.agree.{threshold:g}.{code}"] = agree.mean(axis=-1)
            found[f"{pairs}.f1.{threshold:g}.{code}"] = _ratio(2.0 * both, either)
    for name, better in (("error", -1), ("pearson", 1), ("spearman", 1), ("agree.0.25", 1)):
        gap = found[f"{pairs}.{name}.hybrid_log"] - found[f"{pairs}.{name}.leading_one"]
        found[f"{pairs}.hybrid_log_wins.{name}"] = _wins(better * gap)
    return found


def _wins(gap: Floats) -> Floats:
    """Returns 1 where a gap is positive, 0 where it is negative, a half where it is 0."""
    return np.where(np.isnan(gap), np.nan, (gap > 0.0) + 0.5 * (gap == 0.0))


def _ratio(part: Floats, whole: Floats) -> Floats:
    """Returns `part / whole`, not a number where the whole is 0."""
    ratio: Floats = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0.0)
    return ratio


def _similar(pairs: str, distances: Floats, threshold: float) -> npt.NDArray[np.bool_]:
    """Returns the decisions: pair by pair, or for the later seven rows of each window whether they are similar."""
    if pairs != "window":
        return distances <= threshold
    heads = len(distances)
    windows = distances.reshape(heads, -1, WINDOW * (WINDOW - 1) // 2)
    return ~critical_rows(windows, threshold)[..., 1:].reshape(heads, -1)


def correlation(a: Floats, b: Floats) -> Floats:
    """Returns Pearson's correlation over the last axis, not a number where one is constant."""
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a, b))
    norm = np.sqrt(np.sum(a**2, axis=-1) * np.sum(b**2, axis=-1))
    return _ratio(np.sum(a * b, axis=-1), norm)


def _mean_ranks(values: Floats) -> Floats:
    """Returns ranks over the last axis, equal values their mean rank."""
    rows = []
    for row in values:
        _, inverse, number = np.unique(row, return_inverse=True, return_counts=True)
        rows.append((np.cumsum(number) - (number - 1) / 2.0)[inverse])
    return np.stack(rows)


def _operation_figures(everything: Sequence[LayerSample]) -> Figures:
    """Returns operations per kept key by order and kind, and the cuts of both descending orders against the others."""
    totals = {
        order: {
            kind: sum(sample.operations[order][kind] for sample in everything)
            for kind in everything[0].operations[order]
        }
        for order in everything[0].operations
    }
    placed = totals.pop("order")
    shared = totals.pop("products")
    keys = totals["ascending_by_key"]["exp"]
    found = {"operations.first_is_largest": placed["first_is_largest"] / placed["segments"]}
    for order, counts in totals.items():
        for kind in KINDS:
            found[f"operations.{order}.{kind}"] = counts[kind] / keys
    found |= cuts(totals, shared)
    return {name: np.asarray([value]) for name, value in found.items()}


def cuts(totals: Mapping[str, Mapping[str, int]], shared: Mapping[str, int]) -> dict[str, float]:
    """Returns by what part both descending orders need fewer operations than each of the others.

    `cut.W.own.A.B` is that of order A against B in what depends on the order, `cut.W.whole.A.B` with the products too, by
    weighting W.

    Args:
      totals: Operations by order and kind, without products.
      shared: Those of the products with keys and values, by kind.
    """
    found = {}
    descending = [order for order in ORDERS if order.startswith("descending")]
    for weighting, weights in WEIGHTS.items():
        common = sum(weights[kind] * shared[kind] for kind in KINDS)
        own = {
            order: sum(weights[kind] * counts[kind] for kind in KINDS)
            for order, counts in totals.items()
        }
        for order in descending:
            for other in [name for name in totals if name not in descending]:
                less = own[other] - own[order]
                found[f"cut.{weighting}.own.{order}.{other}"] = less / own[other]
                found[f"cut.{weighting}.whole.{order}.{other}"] = less / (own[other] + common)
    return found


def published_size() -> dict[str, float]:
    """Returns `cuts` for a row of the paper's length: 256 keys kept in 4 segments, d = 64, their predicted order right."""
    keys = np.full((NUM_SEGMENTS,), PUBLISHED_KEPT // NUM_SEGMENTS)
    first = np.arange(NUM_SEGMENTS) == 0
    on_first = ("flash_on_demand", "descending_in_sequence")
    tiles = np.full((PUBLISHED_KEPT // FLASH_TILE,), FLASH_TILE)
    counted = {
        name: count(keys, first if name in on_first else keys > 0, PUBLISHED_HEAD_DIM)
        for name, count in ORDERS.items()
    } | {"flash_tiles": ORDERS["flash"](tiles, tiles > 0, PUBLISHED_HEAD_DIM)}
    totals = {
        name: {kind: int(value) for kind, value in counts.items()}
        for name, counts in counted.items()
    }
    shared = products(keys, PUBLISHED_HEAD_DIM)
    return cuts(totals, {kind: int(value) for kind, value in shared.items()})


def _load_figures(everything: Sequence[LayerSample]) -> Figures:
    """Returns the part of the vectors that the reuse-aware order does not read, against the other orders."""
    totals = {
        name: sum(sample.loads[name] for sample in everything) for name in everything[0].loads
    }
    found = {}
    for name, total in totals.items():
        block, _, other = name.partition(".")
        if other != REUSE_AWARE:
            cut = 1.0 - totals[f"{block}.{REUSE_AWARE}"] / total
            found[f"fetch.cut.{block}.{other}"] = np.asarray([cut])
    return found


def combined(by_seed: Sequence[Figures]) -> dict[str, dict[str, Any]]:
    """Returns of every figure its mean over heads and seeds, the standard deviation over them, and the means by seed.

    What is not a number counts for nothing; None where nothing is left.
    """
    found = {}
    for name in sorted(by_seed[0]):
        rows = [one[name][np.isfinite(one[name])] for one in by_seed]
        values = np.concatenate(rows)
        found[name] = {
            "mean": float(values.mean()) if len(values) else None,
            "deviation": float(values.std()) if len(values) else None,
            "by_seed": [float(row.mean()) if len(row) else None for row in rows],
        }
    return found
