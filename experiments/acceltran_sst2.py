"""AccelTran's SST-2 study on MiniLM: one threshold, and top-k, against sparsity and accuracy, beside the published points.

References:
  Tuli, Jha, "AccelTran", IEEE TCAD 42(11), 2023, arXiv 2302.14705: BERT-Base without weight pruning, read from its
  vector figures (error about 0.02 of an axis unit).
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from codesign.experiments.batches import chunks
from codesign.experiments.data import Examples
from codesign.experiments.evaluate import Point, dense_point, deployment, hard_chunks, quality
from codesign.experiments.problem import Problem
from codesign.experiments.start import measured_ranges, ranges_of, start_policy, with_threshold
from codesign.experiments.teacher import float_chunk
from codesign.mechanisms import Mechanism
from codesign.mechanisms.acceltran_study import net_sparsity, strict_topk
from codesign.mechanisms.protocol import Context, Counts, Hooks, Selection
from codesign.models.config import ModelConfig
from codesign.models.model import apply

PUBLISHED_TOKENS = 512
"""Sequence length to which the study pads, so that most of its sparsity is padding (its public code)."""

# Threshold or k, accuracy in %, activation sparsity in %.
PUBLISHED_THRESHOLDS = (
    *((0.0, 93.0, 0.0), (0.005, 93.12, 30.33), (0.01, 93.35, 30.88), (0.015, 93.58, 31.37)),
    *((0.02, 93.46, 31.83), (0.025, 93.46, 32.28), (0.03, 93.58, 32.71), (0.035, 93.35, 33.13)),
    *((0.04, 93.81, 33.55), (0.045, 93.69, 33.96), (0.05, 93.35, 34.37), (0.055, 92.89, 34.77)),
    *((0.06, 93.35, 35.16), (0.065, 92.55, 35.53), (0.07, 92.66, 35.91), (0.075, 92.2, 36.27)),
    *((0.08, 92.2, 36.63), (0.085, 91.51, 36.97), (0.09, 91.17, 37.32), (0.095, 91.17, 37.65)),
)
PUBLISHED_TOPK = (
    *((1, 50.92, 34.62), (2, 83.14, 30.71), (4, 92.32, 30.59), (8, 93.12, 30.35)),
    *((16, 93.35, 29.91), (32, 93.01, 29.38), (64, 93.01, 29.26), (128, 93.01, 29.26)),
    *((256, 93.01, 29.26), (512, 93.01, 0.0)),
)


def study(problem: Problem) -> list[dict[str, Any]]:
    """Returns one row per threshold and per k: our accuracy and sparsities beside the published ones, fractions.

    Thresholds run on the integer path (8-bit linear layers, 16-bit attention); top-k runs in floating point, as in the
    study: it has no machine.

    Args:
      problem: MiniLM on SST-2 with mechanism `acceltran`.
    """
    examples = problem.task.part("validation")
    rows = []
    calibration = measured_ranges(problem, problem.params)
    dense = dense_point(problem, calibration)
    for tau, accuracy, sparsity in PUBLISHED_THRESHOLDS:
        policy = start_policy(problem, linear_bits=8.0, attention_bits=16.0)
        scale = problem.mechanism.thresholds
        assert scale is not None
        knob = scale.from_setting(
            (tau, 0.0), policy.layers["threshold"].shape, ranges_of(calibration)
        )
        point = Point(
            params=dense.params, policy=with_threshold(policy, knob), calibration=calibration
        )
        rows.append(
            _row("threshold", tau, _threshold(problem, point, examples), accuracy, sparsity)
        )
    longest = examples.inputs["tokens"].shape[1]
    for k, accuracy, sparsity in PUBLISHED_TOPK:
        measured = _topk(problem, min(int(k), longest), examples)
        rows.append(_row("top-k", k, measured, accuracy, sparsity))
    return rows


def _row(
    method: str, setting: float, measured: dict[str, float], accuracy: float, sparsity: float
) -> dict[str, Any]:
    published = {"published_accuracy": accuracy / 100.0, "published_sparsity": sparsity / 100.0}
    return {"method": method, "setting": setting} | measured | published


def _sparsities(
    densities: dict[str, NDArray[np.float64]], problem: Problem, valid: NDArray[Any]
) -> dict[str, float]:
    """Returns sparsity over tokens that exist, and over `PUBLISHED_TOKENS` with padding counted."""
    structure = problem.config.structure
    padded = np.pad(valid, ((0, 0), (0, PUBLISHED_TOKENS - valid.shape[1])))
    return {
        "sparsity": net_sparsity(densities, structure, valid, count_padding=False),
        "sparsity_with_padding": net_sparsity(densities, structure, padded, count_padding=True),
    }


def _averaged(parts: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Returns means over chunks, weighted by their elements."""
    weights = [weight for weight, _ in parts]
    return {
        name: float(np.average([values[name] for _, values in parts], weights=weights))
        for name in parts[0][1]
    }


def _threshold(problem: Problem, point: Point, examples: Examples) -> dict[str, float]:
    """Returns accuracy and sparsities of a point on the integer path."""
    deployed = deployment(problem, point)
    is_right, parts = [], []
    for chunk in hard_chunks(deployed, examples, problem.accelerator, problem.buckets):
        is_right.append(quality(chunk.logits, examples.labels[chunk.indices]))
        valid = chunk.inputs["valid"]
        parts.append((int(valid.sum()), _sparsities(chunk.densities, problem, valid)))
    return {"accuracy": float(np.mean(np.concatenate(is_right)))} | _averaged(parts)


@functools.cache
def topk_mechanism(k: int) -> Mechanism:
    """Returns the study's top-k as a mechanism of the float path: at most k - 1 probabilities of a row survive."""

    def kept(
        context: Context, probabilities: jax.Array, selection: Selection
    ) -> tuple[jax.Array, jax.Array, Counts]:
        # Padding is at the end: a row of fewer keys than k keeps them all but its least.
        left = strict_topk(probabilities, min(k, probabilities.shape[-1]))
        exists = (context.valid[:, None, :, None] * context.pairs > 0.5) & (selection.weights > 0.5)
        number = jnp.sum(exists, axis=(1, 2, 3))
        share = jnp.sum((left > 0.0) & exists, axis=(1, 2, 3)) / number
        return left, selection.weights, Counts(densities={"probabilities": share})

    return Mechanism(name=f"topk-{k}", summary="strict top-k", soft=Hooks(on_probabilities=kept))


@functools.partial(jax.jit, static_argnames=("config", "mechanism"))
def _topk_step(
    params: dict[str, Any], inputs: dict[str, jax.Array], config: ModelConfig, mechanism: Mechanism
) -> tuple[jax.Array, jax.Array]:
    output = apply(params, None, None, inputs, config=config, mechanism=mechanism, relaxation=None)
    return output.logits, output.workload.densities["probabilities"]


def _topk(problem: Problem, k: int, examples: Examples) -> dict[str, float]:
    """Returns accuracy and sparsities of the study's top-k in floating point."""
    is_right, parts = [], []
    for inputs, indices in chunks(examples, float_chunk(problem.config), problem.buckets):
        logits, density = _topk_step(
            problem.params, inputs, config=problem.config, mechanism=topk_mechanism(k)
        )
        first = slice(len(indices))
        valid = inputs["valid"][first]
        is_right.append(quality(np.asarray(logits)[first], examples.labels[indices]))
        densities = {"probabilities": np.asarray(density, np.float64)[first]}
        parts.append((int(valid.sum()), _sparsities(densities, problem, valid)))
    return {"accuracy": float(np.mean(np.concatenate(is_right)))} | _averaged(parts)


def draw_study(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws accuracy over sparsity, ours and published, into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained", sharey=True)
    for method, colour in (("threshold", "#0b5394"), ("top-k", "#b45f06")):
        own = [row for row in rows if row["method"] == method]
        for axis, name in ((axes[0], "sparsity"), (axes[1], "sparsity_with_padding")):
            axis.plot(
                [100.0 * row[name] for row in own],
                [100.0 * row["accuracy"] for row in own],
                color=colour,
                marker="o",
                markersize=3.5,
                label=f"{method}, MiniLM, measured",
            )
        axes[1].plot(
            [100.0 * row["published_sparsity"] for row in own],
            [100.0 * row["published_accuracy"] for row in own],
            color=colour,
            marker="s",
            markersize=3.5,
            linestyle=":",
            label=f"{method}, BERT-Base, published",
        )
    axes[0].set_xlabel("Activation sparsity over tokens that exist (%)")
    axes[1].set_xlabel(f"Activation sparsity, padding to {PUBLISHED_TOKENS} tokens counted (%)")
    axes[0].set_ylabel("SST-2 accuracy (%)")
    for axis in axes:
        axis.grid(True, linewidth=0.4, alpha=0.5)
    axes[1].legend(fontsize=7.5, loc="lower left")
    figure.suptitle("DynaTran and top-k on SST-2 (arXiv 2302.14705 beside ours)", fontsize=9)
    figure.savefig(path, dpi=200)
    plt.close(figure)
