"""The baselines at the settings whose figures are published, on the integer path of a trained dense model.

Nothing of a policy is trained: 8-bit linear layers, thresholds as published or as a new policy has them.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from codesign.calibration import Calibration
from codesign.experiments.curve_record import BETTER
from codesign.experiments.evaluate import (
    DENSE_ATTENTION_BITS,
    DENSE_LINEAR_BITS,
    HardChunk,
    Point,
    deployment,
    divergence,
    hard_chunks,
    quality,
)
from codesign.experiments.problem import Problem
from codesign.experiments.published_measures import (
    Counts,
    Floats,
    Ratio,
    by_example,
    measured,
    stacked,
)
from codesign.experiments.start import measured_ranges, ranges_of, start_policy, with_threshold
from codesign.experiments.traced import TRACE_CHUNK, examples_of
from codesign.hw.scaling import TASK_MULTIPLIERS
from codesign.hw.spec import AcceleratorSpec
from codesign.mechanisms import dense_beside
from codesign.policy import Policy, bits_range, dense_knobs
from codesign.units import HZ_PER_GHZ, OPERATIONS_PER_GOP
from codesign.vocabulary import matches

OPERATIONS_PER_MAC = 2.0
"""A multiplication and an addition, as throughputs are published."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A mechanism at one setting.

    Attributes:
      mechanism: Its name, and that of its preset.
      name: Of the setting.
      attention_bits: Width of queries, keys, probabilities and values.
      setting: As of the mechanism's uniform grid, without training; None: the knobs that a new policy has.
      search_share: Steps of a search over the keys of a row.
    """

    mechanism: str
    name: str
    attention_bits: float = DENSE_ATTENTION_BITS
    setting: tuple[float, ...] | None = None
    search_share: float | None = None


CASES = (
    # High + low bits of queries and keys, and the least largest probability (repository mit-han-lab/spatten).
    *(
        Case(
            mechanism="spatten",
            name=f"{high}+4.{tau:g}",
            attention_bits=high + 4.0,
            setting=(1.0, 1.0, 1.0, tau),
        )
        for tau in (0.1, 0.05)
        for high in (6, 8)
    ),
    # 12-bit data path (arXiv 2012.09852).
    Case(mechanism="spatten", name="start", attention_bits=12.0),
    Case(mechanism="spatten", name="strong", attention_bits=12.0, setting=(0.3, 0.6, 0.2, 0.1)),
    # Thresholds of the repository hatsu3/Sanger.
    *(Case(mechanism="sanger", name=f"{tau:g}", setting=(tau,)) for tau in (2e-3, 1e-2, 2e-2)),
    # M_s = n / 2 and T_pct = 5, n / 8 and 10 (recalled): t = ln(100 / T_pct).
    Case(mechanism="a3", name="conservative", setting=(math.log(100.0 / 5.0),), search_share=1 / 2),
    Case(mechanism="a3", name="aggressive", setting=(math.log(100.0 / 10.0),), search_share=1 / 8),
    Case(mechanism="fact", name="start"),
    Case(mechanism="energon", name="start"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the integer path did at one setting, by example `[N]`.

    Attributes:
      quality: As of `codesign.experiments.evaluate.quality`.
      kl_nats: Divergence from the dense float model.
      macs: Multiplications of exact attention; predictions apart.
      searched: Products that a search took.
      moved_bytes: Through main memory, of attention alone.
      seconds: Latency of attention on the machine of the preset.
      counts: Figures by layer and head.
    """

    quality: Floats
    kl_nats: Floats
    macs: Floats
    searched: Floats
    moved_bytes: Floats
    seconds: Floats
    counts: dict[str, Ratio]


def mechanism_figures(problem: Problem, mechanism: str, num_examples: int) -> dict[str, Ratio]:
    """Returns the figures of one seed of a mechanism at all its settings, `MECHANISM.SETTING.FIGURE`.

    Those of `codesign.experiments.published_measures`, and `saved`: of the multiplications of exact attention; `saved_all`:
    less the products of a search; `macs_times`, `bytes_times`: what dense attention takes over what is taken; `gops`:
    operations of dense attention over the time, at `TASK_MULTIPLIERS` and 1 GHz; `loss` of quality; `kl`, nat.

    Args:
      problem: A trained dense model on the machine of the mechanism.
      mechanism: Its name.
      num_examples: Examples of the validation part, >= 1.
    """
    calibration = measured_ranges(problem, problem.params)
    scale = multipliers_at_one_ghz(problem.spec) / TASK_MULTIPLIERS
    better = BETTER[problem.task.quality_name]
    found: dict[str, Ratio] = {}
    dense: dict[float, Outcome] = {}
    for case in CASES:
        if case.mechanism != mechanism:
            continue
        bits = case.attention_bits
        if bits not in dense:
            dense[bits] = run_case(problem, case, calibration, num_examples, is_dense=True)
        whole, own = dense[bits], run_case(problem, case, calibration, num_examples)
        operations = OPERATIONS_PER_MAC * whole.macs / OPERATIONS_PER_GOP
        figures = own.counts | {
            "saved": by_example(whole.macs - own.macs, whole.macs),
            "saved_all": by_example(whole.macs - own.macs - own.searched, whole.macs),
            "macs_times": by_example(whole.macs, own.macs),
            "bytes_times": by_example(whole.moved_bytes, own.moved_bytes),
            "gops": by_example(operations, own.seconds * scale),
            "loss": by_example(better * (whole.quality - own.quality), 1.0),
            "kl": by_example(own.kl_nats, 1.0),
        }
        found |= {f"{mechanism}.{case.name}.{name}": ratio for name, ratio in figures.items()}
    return found


def case_policy(problem: Problem, case: Case, calibration: Calibration) -> Policy:
    """Returns the policy of a setting.

    Steps of a search are a power of two on the chip: the nearest, in the logarithm, to the share of the keys.
    """
    policy = start_policy(
        problem, linear_bits=DENSE_LINEAR_BITS, attention_bits=case.attention_bits
    )
    scale = problem.mechanism.thresholds
    if case.setting is not None and scale is not None:
        shape = policy.layers["threshold"].shape
        policy = with_threshold(
            policy, scale.from_setting(case.setting, shape, ranges_of(calibration))
        )
    if case.search_share is not None:
        steps = case.search_share * problem.config.structure.max_tokens
        bits = float(np.clip(np.rint(np.log2(steps)), *bits_range("search_bits")))
        searched = {"search_bits": jnp.full_like(policy.layers["search_bits"], bits)}
        policy = Policy(layers=policy.layers | searched, ends=policy.ends)
    return policy


def run_case(
    problem: Problem,
    case: Case,
    calibration: Calibration,
    num_examples: int,
    *,
    is_dense: bool = False,
) -> Outcome:
    """Returns what the integer path does at a setting, or, `is_dense`, without the mechanism on the same machine."""
    mechanism, structure = problem.mechanism, problem.config.structure
    policy = case_policy(problem, case, calibration)
    if is_dense:
        mechanism = dense_beside(mechanism)
        policy = dense_knobs(
            structure.num_layers,
            linear_bits=DENSE_LINEAR_BITS,
            attention_bits=case.attention_bits,
            end_sites=structure.end_sites,
        )
    point = Point(params=problem.params, policy=policy, calibration=calibration)
    deployed = deployment(problem, point, mechanism=mechanism)
    examples = examples_of(problem, "validation", num_examples)
    number, found = len(examples), dict[str, Floats]()
    counts: list[Counts] = [{}] * number
    for chunk in hard_chunks(
        deployed,
        examples,
        problem.accelerator,
        problem.buckets,
        mechanism=mechanism,
        tracing=not is_dense,
        most=TRACE_CHUNK,
        machines={"own": problem.accelerator},
    ):
        for name, values in _by_example(problem, chunk, examples.labels[chunk.indices]).items():
            found.setdefault(name, np.zeros(number))[chunk.indices] = values
        for place, index in enumerate([] if is_dense else chunk.indices):
            tokens = chunk.tensors["query"].shape[3]
            if "valid" in chunk.inputs:
                tokens = int(np.sum(chunk.inputs["valid"][place]))
            keep = chunk.tensors["keep"][:, :, place, :, :tokens, :tokens]
            counts[index] = measured(case.mechanism, keep, is_causal=structure.is_causal)
    return Outcome(**found, counts=stacked(counts))


def _by_example(problem: Problem, chunk: HardChunk, labels: Any) -> dict[str, Floats]:
    """Returns the fields of `Outcome` of a chunk's examples, `[n]` each."""
    valid = chunk.inputs.get("valid")
    if labels.ndim == 2:
        labels = labels[:, : chunk.logits.shape[1]]
    teacher = problem.teacher.part_logits("validation", chunk.indices, chunk.inputs)
    priced = chunk.machines["own"]
    searched = chunk.counts.get("predict.multiply")
    return {
        "quality": quality(chunk.logits, labels, valid),
        "kl_nats": divergence(teacher, chunk.logits, valid),
        "macs": chunk.macs["attention"],
        "searched": np.zeros(len(labels)) if searched is None else searched.sum(axis=1),
        "moved_bytes": priced["moved_bytes"]["attention"],
        "seconds": priced["costs"]["attention"]["latency"] / problem.spec.clock_hz,
    }


def multipliers_at_one_ghz(spec: AcceleratorSpec) -> float:
    """Returns the multipliers of exact attention of a machine, times its clock over 1 GHz."""
    total = 0.0
    for unit in spec.units.values():
        if any(matches(key, unit.paces) for key in ("qk.mac", "pv.mac")):
            sizes = (unit.lanes, unit.width, unit.per_lane)
            total += math.prod(1.0 if size is None else size.value for size in sizes)
    return total * spec.clock_hz / HZ_PER_GHZ


LATENCY_TOKENS, LATENCY_WIDTH, LATENCY_KEPT, LATENCY_UTILISATION = 384, 768, 0.25, 0.7
"""The repository's example (hatsu3/Sanger)."""
