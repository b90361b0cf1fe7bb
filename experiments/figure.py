"""Figures, drawn from JSON files alone."""

from pathlib import Path
from typing import Any

import numpy as np

from codesign.hw.timeline import DRAM, HOST
from codesign.units import PJ_PER_UJ

STYLE = {
    "trained": ("trained thresholds and bits", "#0b5394", "o", "-"),
    "uniform_tuned": ("uniform, same fine-tuning", "#b45f06", "s", "--"),
    "uniform": ("uniform, no training", "#999999", "^", ":"),
    "bits_only": ("bits trained, thresholds uniform", "#38761d", "v", "-."),
    "thresholds_only": ("thresholds trained, bits uniform", "#a64d79", "D", "-."),
}
"""Label, colour, marker and line of each kind of point."""
METRIC_LABEL = {"energy": "Energy", "latency": "Latency", "edp": "Energy-delay product"}
QUALITY = {"accuracy": ("Accuracy (%)", 100.0), "bits_per_token": ("Bits per token", 1.0)}
"""Label of a quality and its factor in the figure."""


def draw_curve(record: dict[str, Any], path: Path) -> None:
    """Draws quality and divergence over cost, with 95 % intervals, into a PNG file.

    Args:
      record: Contents of `curve.json`.
      path: Where to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scope, metric = record["scope"], record["metric"]
    key, factor, unit = {
        "energy": ("energy_pj", PJ_PER_UJ, "µJ"),
        "latency": ("latency_cycles", 1e3, "thousand cycles"),
        "edp": ("edp_pj_cycles", 1e3 * PJ_PER_UJ, "µJ x thousand cycles"),
    }[metric]
    label_of_quality, percent = QUALITY[record["quality_name"]]
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained")
    dense = next(entry for entry in record["means"] if entry["kind"] == "dense")
    dense_cost = dense[scope][key] / factor
    for kind, (label, colour, marker, line) in STYLE.items():
        entries = [entry for entry in record["means"] if entry["kind"] == kind]
        if not entries:
            continue
        costs = [entry[scope][key] / factor for entry in entries]
        for axis, quality, scale in ((axes[0], "quality", percent), (axes[1], "kl_nats", 1.0)):
            means = [scale * entry[quality]["mean"] for entry in entries]
            spread = [
                [
                    scale * max(0.0, entry[quality]["mean"] - entry[quality]["low"])
                    for entry in entries
                ],
                [
                    scale * max(0.0, entry[quality]["high"] - entry[quality]["mean"])
                    for entry in entries
                ],
            ]
            axis.errorbar(
                costs,
                means,
                yerr=spread,
                label=label,
                color=colour,
                marker=marker,
                linestyle=line,
                markersize=4.5,
                linewidth=1.3,
                capsize=2.0,
                elinewidth=0.8,
            )
    axes[0].plot(dense_cost, percent * dense["quality"]["mean"], "k*", markersize=10, label="dense")
    axes[1].set_yscale("log")
    axes[0].set_ylabel(label_of_quality)
    axes[1].set_ylabel("KL divergence from dense (nat)")
    where = "end to end" if scope == "end_to_end" else "attention only"
    for axis in axes:
        axis.set_xlabel(f"{METRIC_LABEL[metric]} per example, {where} ({unit})")
        axis.grid(True, which="major", linewidth=0.4, alpha=0.5)
        ratio = axis.secondary_xaxis(
            "top", functions=(lambda x: x / dense_cost, lambda x: x * dense_cost)
        )
        ratio.set_xlabel("Fraction of dense")
    axes[0].legend(fontsize=7.5, loc="best")
    seeds = len(record["seeds"])
    figure.suptitle(
        f"{record['task']}, {record['mechanism']} on `{record['preset']}`: {record['part']} part, "
        f"{record['num_examples']} examples, {seeds} seed{'s' if seeds > 1 else ''}, hard path, 95 % bootstrap intervals",
        fontsize=9,
    )
    figure.savefig(path, dpi=200)
    plt.close(figure)


def draw_comparison(records: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws trained curves of several mechanisms in one frame, quality and divergence over energy, into a PNG file.

    Args:
      records: Contents of `curve.json` by mechanism.
      path: Where to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    label_of_quality, percent = QUALITY[next(iter(records.values()))["quality_name"]]
    for index, (name, record) in enumerate(records.items()):
        entries = [entry for entry in record["means"] if entry["kind"] in ("dense", "trained")]
        costs = [entry["end_to_end"]["energy_pj"] / PJ_PER_UJ for entry in entries]
        for axis, key, scale in ((axes[0], "quality", percent), (axes[1], "kl_nats", 1.0)):
            means = np.asarray([entry[key]["mean"] for entry in entries]) * scale
            bounds = [
                np.abs(np.asarray([entry[key][end] for entry in entries]) * scale - means)
                for end in ("low", "high")
            ]
            axis.errorbar(
                costs,
                means,
                yerr=bounds,
                label=name,
                color=colours[index % len(colours)],
                marker="os^vD"[index % 5],
                markersize=4.0,
                linewidth=1.2,
                capsize=2.0,
                elinewidth=0.7,
            )
    axes[1].set_yscale("log")
    axes[0].set_ylabel(label_of_quality)
    axes[1].set_ylabel("KL divergence from dense (nat)")
    plain = StrMethodFormatter("{x:g}")
    for axis in axes:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(plain)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("Energy per example, end to end, common frame (µJ)")
        axis.grid(True, which="major", linewidth=0.4, alpha=0.5)
    axes[0].legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_timeline(record: dict[str, Any], path: Path) -> None:
    """Draws what the parts of a machine work on over the cycles of a layer into a PNG file, a row for each part.

    Args:
      record: `timeline` of what `codesign simulate --json` prints.
      path: Where to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    # Main memory on top, the host at the bottom, units in the order in which work passes them.
    at_ends = {DRAM: -1, HOST: 1}
    spans = sorted(record["spans"], key=lambda span: at_ends.get(span["part"], 0))
    rows = list(dict.fromkeys((span["part"], span["group"]) for span in spans))
    names = list(dict.fromkeys(span["name"] for span in spans))
    is_split = {part for part, group in rows if group > 0}
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    figure, axis = plt.subplots(figsize=(10.0, 1.2 + 0.3 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        own = [span for span in spans if (span["part"], span["group"]) == row]
        axis.broken_barh(
            [(span["start"], span["end"] - span["start"]) for span in own],
            (place - 0.4, 0.8),
            facecolors=[colours[names.index(span["name"]) % len(colours)] for span in own],
        )
    labels = [f"{part} {group}" if part in is_split else part for part, group in rows]
    axis.set_yticks(range(len(rows)), labels)
    axis.invert_yaxis()
    axis.set_xlim(left=min(0.0, *(span["start"] for span in spans)))
    axis.set_xlabel("Cycle")
    axis.set_title(
        f"{record['machine']}, layer {record['layer']} of example {record['example']}", fontsize=9
    )
    if len(names) <= len(colours):
        handles = [Patch(color=colours[place], label=name) for place, name in enumerate(names)]
        axis.legend(handles=handles, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axis.grid(True, axis="x", linewidth=0.4, alpha=0.5)
    figure.savefig(path, dpi=150)
    plt.close(figure)
