"""Published figures of the baselines beside what our integer path does on trained models.

Figures that are arithmetic on published numbers are worked out from formulas of the cost model and of the mechanisms.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codesign.errors import CodesignError
from codesign.experiments.configs import Experiment, experiment_by_name
from codesign.experiments.problem import load_problem
from codesign.experiments.published_cases import (
    CASES,
    LATENCY_KEPT,
    LATENCY_TOKENS,
    LATENCY_UTILISATION,
    LATENCY_WIDTH,
    mechanism_figures,
)
from codesign.experiments.published_measures import Ratio, combined
from codesign.experiments.published_rows import ROWS
from codesign.experiments.run import versions
from codesign.hw import sanger_estimator
from codesign.hw.scaling import SYSTEMS, scaled_system
from codesign.mechanisms.spatten import codes as spatten_codes
from codesign.mechanisms.threshold_scale import part_variable
from codesign.references.spatten import SHARE_SHIFT
from codesign.units import MS_PER_S

NUM_RESAMPLES = 1000
LATENCY_CASE = "0.002"
"""Sanger's setting whose kept fraction and utilisation go into the published latency."""
RATIO_CASE = "0.02"
"""That beside which the ratios of printed throughputs stand: that of most of the published tasks (GLUE)."""
PRINTED_GOPS = {"sanger": 529.0, "a3": 221.0, "spatten": 360.0}
"""Throughputs at 128 multipliers (reading notes of Sanger, MICRO 2021)."""
GPT2_TOKENS = 1024
GPT2_SMALL = (0.9, 0.7, *(0.2,) * 4, *(0.1,) * 6)
"""Shares of keys by layer (Derived: rounded down they are the repository's 921, 716, 4 x 204, 6 x 102 of 1024)."""
GPT2_MEDIUM = (1.0, 1.0, 0.9, *(0.8,) * 2, *(0.6,) * 6, *(0.3,) * 13)
"""The same (921, 2 x 819, 6 x 614, 13 x 307)."""
GPT2_HIGH_BITS, GPT2_LOW_BITS, GPT2_REREAD, GPT2_VALUES = 6.0, 4.0, 0.07, 0.2
"""Bits of keys read first and on demand, rows that demand them, share of values (repository mit-han-lab/spatten)."""


def figures_experiment(task: str, mechanism: str, seed: int, data: Path | None) -> Experiment:
    """Returns a named experiment on the machine of a mechanism; its dense model is that of every other machine."""
    named = experiment_by_name(task)
    return dataclasses.replace(
        named,
        mechanism=mechanism,
        preset=mechanism,
        seed=seed,
        data=dataclasses.replace(named.data, data=data),
    )


def study(
    tasks: Sequence[str],
    seeds: Sequence[int],
    num_examples: Sequence[int],
    trained: dict[str, dict[str, Any]],
    *,
    data: Path | None,
    cache: Path,
    progress: bool,
) -> dict[str, Any]:
    """Returns the record of the study: published figures, those worked out, and for every task the measured ones.

    Args:
      tasks: Names of experiments.
      seeds: Seeds of the dense models.
      num_examples: Examples of the validation part of each task, the first ones.
      trained: What `equal_quality` returns of the first task; may be empty.
      data: Folder of the data of the only task; None: each task's own.
      cache: Folder of the dense models.
      progress: Whether to say what is being measured.
    """
    found = []
    for task, number in zip(tasks, num_examples, strict=True):
        by_seed: list[dict[str, Ratio]] = []
        for seed in seeds:
            ratios: dict[str, Ratio] = {}
            for mechanism in dict.fromkeys(case.mechanism for case in CASES):
                if progress:
                    print(f"{task}, seed {seed}, {mechanism}", flush=True)
                problem = load_problem(
                    figures_experiment(task, mechanism, seed, data), cache=cache, progress=progress
                )
                ratios |= mechanism_figures(problem, mechanism, number)
            by_seed.append(ratios | throughput_ratios(ratios))
        figures = {
            name: combined([one[name] for one in by_seed], num_resamples=NUM_RESAMPLES)
            for name in by_seed[0]
        }
        if task == tasks[0]:
            figures |= trained
        structure = problem.config.structure
        found.append(
            {
                "task": task,
                "quality_name": problem.task.quality_name,
                "seeds": list(seeds),
                "num_examples": min(number, len(problem.task.part("validation"))),
                "num_layers": structure.num_layers,
                "num_heads": structure.num_heads,
                "head_dim": structure.head_dim,
                "num_tokens": structure.max_tokens,
                "is_causal": structure.is_causal,
                "figures": figures | latency_figures(figures),
            }
        )
    return {
        "study": "published-figures",
        # Of integers, nothing depends on the machine.
        "versions": {name: text for name, text in versions().items() if name != "platform"},
        "published": published(),
        "arithmetic": arithmetic(),
        "tasks": found,
        "scaling": scaling(),
    }


def throughput_ratios(ratios: Mapping[str, Ratio]) -> dict[str, Ratio]:
    """Returns Sanger's throughput over those of A3 and SpAtten, `sanger.SETTING.over_NAME`, of one seed's figures."""
    others = {"a3": "a3.conservative.gops", "spatten": "spatten.start.gops"}
    # All do the same dense operations, so that times say it.
    return {
        f"sanger.{case.name}.over_{name}": Ratio(
            part=ratios[other].whole, whole=ratios[f"sanger.{case.name}.gops"].whole
        )
        for case in CASES
        if case.mechanism == "sanger"
        for name, other in others.items()
        if other in ratios
    }


def latency_figures(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns Sanger's published latency with the kept fraction and the utilisation of a task, ms, of means alone."""
    kept, used = (figures[f"sanger.{LATENCY_CASE}.{name}"]["mean"] for name in ("kept", "packed"))
    return {
        name: {"mean": value} for name, value in sanger_latencies(float(kept), float(used)).items()
    }


def sanger_latencies(kept: float, utilisation: float) -> dict[str, float]:
    """Returns the latency of the repository's example, ms: its formula, and the same with the whole output projection."""
    return {
        name: MS_PER_S
        * sanger_estimator.latency_s(
            LATENCY_TOKENS,
            LATENCY_WIDTH,
            kept=kept,
            utilisation=utilisation,
            scales_projection=scales,
        )
        for name, scales in (("sanger.latency", True), ("sanger.latency_corrected", False))
    }


def stored_keys(shares: Sequence[float], num_tokens: int) -> np.ndarray:
    """Returns the keys that SpAtten's stored shares leave of each layer, `[L]`.

    Args:
      shares: Kept shares of the tokens, not rising.
      num_tokens: Of the text.
    """
    cumulative = np.asarray(shares, np.float64)
    parts = np.ones((len(cumulative), 4))
    parts[:, 0] = cumulative / np.concatenate([[1.0], cumulative[:-1]])
    knobs = {"threshold": part_variable(parts)}
    stored = spatten_codes(knobs, {"out": np.ones(len(cumulative))})["threshold"][:, 0]
    keys: np.ndarray = -(-stored * num_tokens >> SHARE_SHIFT)
    return keys


def arithmetic() -> dict[str, float]:
    """Returns the figures that no model is needed for, by name; fractions, ratios and ms."""
    small, medium = (stored_keys(shares, GPT2_TOKENS) for shares in (GPT2_SMALL, GPT2_MEDIUM))
    kept = float(small.mean()) / GPT2_TOKENS
    whole_bits = GPT2_HIGH_BITS + GPT2_LOW_BITS
    read_bits = kept * (GPT2_HIGH_BITS + GPT2_REREAD * GPT2_LOW_BITS + GPT2_VALUES * GPT2_HIGH_BITS)
    ours = sanger_latencies(LATENCY_KEPT, LATENCY_UTILISATION)
    over = {
        f"sanger.{RATIO_CASE}.over_{name}": PRINTED_GOPS["sanger"] / PRINTED_GOPS[name]
        for name in ("a3", "spatten")
    }
    return (
        ours
        | over
        | {
            "spatten.gpt2_small": kept,
            "spatten.gpt2_medium": float(medium.mean()) / GPT2_TOKENS,
            "spatten.gpt2_small.bytes_times": 2.0 * whole_bits / read_bits,
            "spatten.gpt2_small.macs_times": 2.0 / (kept * (1.0 + GPT2_REREAD + GPT2_VALUES)),
        }
    )


def published() -> dict[str, dict[str, Any]]:
    """Returns the published figures by the name of ours, in its unit: fractions, ratios, ms, GOPS."""
    return {
        row.figure: {
            "values": list(row.published),
            "loss": row.published_loss,
            "workload": row.workload,
            "source": row.source,
        }
        for row in ROWS
        if row.published
    }


def scaling() -> list[dict[str, Any]]:
    """Returns the rows of Table II of arXiv 2407.10416, each with its derived columns."""
    return [
        dataclasses.asdict(system) | {"derived": dataclasses.asdict(scaled_system(system))}
        for system in SYSTEMS.values()
    ]


def equal_quality(path: Path) -> dict[str, dict[str, Any]]:
    """Returns what FACT and Energon save of attention's pairs at equal quality, trained, from the file of a comparison.

    Raises:
      CodesignError: If it is no such file, or a mechanism is not in it.
    """
    try:
        rows = json.loads(path.read_text())
        found = {}
        for name in ("fact", "energon"):
            own = [row for row in rows if row["mechanism"] == name and row["frame"] == "common"]
            (dense,) = (row for row in own if row["setting"] == "dense")
            (trained,) = (
                row for row in own if row["setting"] == "trained" and row["at"] == "quality"
            )
            place = f"{name}.equal_quality"
            found[f"{place}.saved"] = {"mean": 1.0 - trained["kept"]}
            better = 1.0 if dense["quality"] <= 1.0 else -1.0
            found[f"{place}.loss"] = {"mean": better * (dense["quality"] - trained["quality"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CodesignError(
            f"`--comparison {path}` is not `comparison.json` of `codesign compare` with rows of `fact` and `energon`: "
            f"{type(error).__name__}: {error}; name such a file, or leave the option out"
        ) from error
    return found
