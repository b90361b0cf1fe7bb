"""Writes the tables of the documents from the records in docs/results: `python docs/update_tables.py`.

Between `<!-- KIND NAME -->` and `<!-- end -->` stands the table KIND of `results/NAME.json`.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from codesign.experiments.prediction_tables import StudyTable, study_tables
from codesign.experiments.published_tables import published_tables
from codesign.experiments.simulator_agreement import agreement_table
from codesign.experiments.trained_sizes import sizes_table

DOCS = Path(__file__).resolve().parent
DOCUMENTS = ("results.md", "comparisons.md", "validation.md", "sizes.md", "cost_model.md")
MARKED = re.compile(r"(<!-- (\w+) ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
KINDS = {
    "dense": "dense",
    "trained": "trained (thresholds and bits)",
    "uniform_tuned": "uniform, same fine-tuning",
    "uniform": "uniform, no training",
    "bits_only": "bits trained, thresholds uniform",
    "thresholds_only": "thresholds trained, bits uniform",
}
"""Kinds of points, in the order of the rows."""
PERCENT = 100.0


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def interval(value: dict[str, float], scale: float, digits: int) -> str:
    """Returns a mean with its bootstrap interval."""
    mean, low, high = (f"{scale * value[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def quality_of(record: dict[str, Any]) -> tuple[str, float, int]:
    """Returns the heading, the factor and the digits of a curve's quality."""
    if record["quality_name"] == "accuracy":
        return "accuracy, %", PERCENT, 1
    return "bits per character", 1.0, 4


def ratios(costs: dict[str, float]) -> str:
    """Returns energy and latency over those of dense."""
    return f"{costs['energy_ratio']:.3f}, {costs['latency_ratio']:.3f}"


def points(record: dict[str, Any]) -> str:
    """Returns the points of a curve, means over seeds."""
    name, scale, digits = quality_of(record)
    order = list(KINDS)
    means = sorted(record["means"], key=lambda m: (-(m["budget"] or 9.0), order.index(m["kind"])))
    rows = [
        (
            "-" if mean["budget"] is None else f"{mean['budget']:g}",
            KINDS[mean["kind"]],
            interval(mean["quality"], scale, digits),
            interval(mean["kl_nats"], 1.0, 4),
            f"{mean['end_to_end']['energy_pj'] / 1e6:.2f}",
            ratios(mean["end_to_end"]),
            ratios(mean["attention"]),
        )
        for mean in means
    ]
    costs = ("energy, µJ", "energy, latency of dense", "attention only")
    return table(("budget", "kind", name, "KL, nat", *costs), rows)


def gains(record: dict[str, Any]) -> str:
    """Returns the paired gains of the trained points: at equal budgets, and at the baseline's measured cost."""
    name, scale, digits = quality_of(record)
    unit = "points" if scale == PERCENT else name

    def equal_cost(gain: dict[str, Any], field: str, scale: float, digits: int) -> str:
        found = gain.get("equal_cost")
        return interval(found[field], scale, digits) if found else "-"

    rows = [
        (
            KINDS[gain["baseline"]],
            f"{gain['budget']:g}",
            interval(gain["quality_gain"], scale, digits),
            interval(gain["kl_nats_gain"], 1.0, 4),
            equal_cost(gain, "quality_gain", scale, digits),
            equal_cost(gain, "kl_nats_gain", 1.0, 4),
        )
        for gain in record["comparisons"]
    ]
    at = f"at its {record['metric']}"
    heading = (f"gain, {unit}", "KL gain, nat", f"gain {at}", f"KL gain {at}")
    return table(("trained against", "budget", *heading), rows)


def equal_kl(record: dict[str, Any]) -> str:
    """Returns the energies of the baselines at equal divergence."""
    rows = []
    for found in record["equal_kl"]:
        seeds = ", ".join("-" if r is None else f"{r:.3f}" for r in found["ratio_by_seed"])
        spread = "-" if found["spread"] is None else f"{found['spread']:.3f}"
        ratio = "-" if found["ratio"] is None else f"{found['ratio']:.3f}"
        rows.append((KINDS[found["baseline"]], ratio, seeds, spread))
    cost = f"its {record['metric']} over the trained one at equal KL"
    return table(("baseline", cost, "by seed", "standard deviation"), rows)


def study(records: list[dict[str, Any]]) -> str:
    """Returns the rows of the AccelTran study."""

    def percent(row: dict[str, Any], name: str) -> str:
        return "-" if row.get(name) is None else f"{PERCENT * row[name]:.1f}"

    names = ("accuracy", "published_accuracy", "sparsity", "sparsity_with_padding")
    rows = [
        (
            row["method"],
            f"{row['setting']:g}",
            *(percent(row, name) for name in (*names, "published_sparsity")),
        )
        for row in records
    ]
    heading = ("accuracy, %", "published", "sparsity, %", "with padding", "published")
    return table(("method", "setting", *heading), rows)


def of_study(
    tables: Callable[[dict[str, Any]], dict[str, StudyTable]], name: str, record: dict[str, Any]
) -> str:
    """Returns one table of a study of several."""
    found = tables(record)[name]
    return table(found.columns, found.rows)


def one_table(make: Callable[[Any], StudyTable], record: Any) -> str:
    """Returns the table of a study of one."""
    found = make(record)
    return table(found.columns, found.rows)


def comparison(at: str, frame: str, rows: list[dict[str, Any]]) -> str:
    """Returns the mechanisms of a comparison in one frame, at equal quality or at equal divergence."""
    found = []
    for row in rows:
        if row["frame"] != frame or row["at"] not in ("dense", at):
            continue
        low, high = row["interval"]["energy_end_to_end"]
        digits = 1 if row["energy_end_to_end"] >= 100.0 else 2
        figures = [
            f"{row['energy']:.{digits}f}",
            f"{'≤ ' if row['is_bound'] else ''}{row['energy_end_to_end']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]",
        ]
        times = (f"{row[key]:.1f}" for key in ("latency", "latency_end_to_end"))
        found.append(
            (
                f"`{row['mechanism']}`",
                KINDS[row["setting"]],
                f"{PERCENT * row['quality']:.1f}"
                if row["quality"] <= 1
                else f"{row['quality']:.4f}",
                f"{row['kl']:.4f}",
                f"{PERCENT * row['kept']:.0f}",
                *figures,
                *times,
                row["binds"],
            )
        )
    quality = "accuracy, %" if all(row["quality"] <= 1 for row in rows) else "bits per token"
    energies = ("µJ, attention", "µJ, end to end", "µs, attention", "µs, end to end", "binds")
    return table(("mechanism", "setting", quality, "KL, nat", "kept, %", *energies), found)


def validation(records: list[dict[str, Any]]) -> str:
    """Returns the figures of a validation."""
    rows = [
        (
            record["reference"],
            record["metric"],
            f"{record['value']:.3g}",
            "-" if record["limit"] is None else f"{record['limit']:g}",
            record["unit"],
            str(record["rows"]),
        )
        for record in records
    ]
    return table(("reference", "metric", "value", "limit", "unit", "rows"), rows)


CLAIMS = ("similarity", "recall", "segments", "operations", "fetches")
FIGURES = ("published_figures", "published_scaling")
TABLES: dict[str, Callable[[Any], str]] = {
    "points": points,
    "gains": gains,
    "equal_kl": equal_kl,
    "study": study,
    "equal_quality": functools.partial(comparison, "quality", "common"),
    "equal_divergence": functools.partial(comparison, "kl", "common"),
    "equal_multipliers": functools.partial(comparison, "quality", "equal_multipliers"),
    "validation": validation,
    "agreement": functools.partial(one_table, agreement_table),
    "trained_sizes": functools.partial(one_table, sizes_table),
    "own_machines": functools.partial(comparison, "quality", "own"),
}
TABLES |= {name: functools.partial(of_study, study_tables, name) for name in CLAIMS}
TABLES |= {name: functools.partial(of_study, published_tables, name) for name in FIGURES}


def updated(text: str) -> str:
    """Returns the document with its tables as the records have them."""

    def filled(match: re.Match[str]) -> str:
        begin, kind, name, end = match.groups()
        record = json.loads((DOCS / "results" / f"{name}.json").read_text())
        return f"{begin}{TABLES[kind](record)}{end}"

    return MARKED.sub(filled, text)


if __name__ == "__main__":
    for name in DOCUMENTS:
        path = DOCS / name
        path.write_text(updated(path.read_text()))
