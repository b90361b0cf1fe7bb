"""Tables and JSON on standard output."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from codesign.units import PJ_PER_UJ, US_PER_S
from codesign.vocabulary import BLOCK_SITES

PLAIN_WIDTH = 1000
"""Characters that a line may have where no terminal bounds it: tables are as wide as what they hold."""
COLUMNS = ("quality", "KL, nat", "kept", "energy, µJ", "of dense", "latency, µs", "of dense")
"""Headings of `result_cells`."""


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1
) -> None:
    """Prints a table whose first `text_columns` are text and may wrap between words, the others numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        is_text = index < text_columns
        words = [word for row in rows for word in row[index].split()] if is_text else []
        table.add_column(
            column,
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            min_width=max(map(len, words), default=None),
            overflow="fold" if is_text else "ellipsis",
        )
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    Console(file=sys.stdout, width=width, highlight=False).print(table)


def print_json(value: Any) -> None:
    """Prints a value as JSON, indented."""
    print(json.dumps(value, indent=2, allow_nan=False))


def policy_table(policy: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Returns title, columns and rows of the integers that a trained policy became, a row for each layer.

    Args:
      policy: Contents of `IntegerPolicy`. A mechanism's own integers are averaged over all axes but layer and last.
    """
    weights, activations = policy["weight_bits"], policy["activation_bits"]
    own = {name: np.asarray(values, np.float64) for name, values in policy["mechanism"].items()}
    columns = ["layer", *BLOCK_SITES, "Q, K", "V", *(name.replace("_", " ") for name in own)]
    rows = [
        [
            str(layer),
            *(f"{weights[site][layer]} / {activations[site][layer]}" for site in BLOCK_SITES),
            str(policy["qk_bits"][layer]),
            str(policy["v_bits"][layer]),
            *(_last_axis(values[layer]) for values in own.values()),
        ]
        for layer in range(len(policy["qk_bits"]))
    ]
    ends = [
        f"{site} {weights[site][0]} / {activations[site][0]}"
        for site in weights
        if site not in BLOCK_SITES
    ]
    title = "deployed policy: bits of weights / activations by linear site"
    return "; ".join([title, *ends]), columns, rows


def _last_axis(values: NDArray[np.float64]) -> str:
    """Returns the last axis of the mean over the others as text."""
    mean = np.mean(np.reshape(values, (-1, values.shape[-1] if values.ndim else 1)), axis=0)
    return " ".join(f"{value:.4g}" for value in mean)


def result_cells(means: dict[str, Any], scope: str, clock_hz: float) -> list[str]:
    """Returns the cells under `COLUMNS` of one point.

    Args:
      means: What `codesign.experiments.evaluate.summary` returns, or an entry of `means` of a curve.
      scope: `end_to_end` or `attention`.
      clock_hz: Clock of the machine.
    """
    cost = means[scope]
    quality = [
        value["mean"] if isinstance(value, dict) else value
        for value in (means["quality"], means["kl_nats"])
    ]
    return [
        f"{quality[0]:.4f}",
        f"{quality[1]:.4f}",
        f"{means['kept_fraction']:.3f}" if "kept_fraction" in means else "-",
        f"{cost['energy_pj'] / PJ_PER_UJ:.3f}",
        f"{cost['energy_ratio']:.3f}",
        f"{cost['latency_cycles'] / clock_hz * US_PER_S:.2f}",
        f"{cost['latency_ratio']:.3f}",
    ]
