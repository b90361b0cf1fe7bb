"""The rows of a comparison: each mechanism's cheapest mixture at equal quality and at equal divergence, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codesign.experiments.comparison import cheapest_mixtures, resampled
from codesign.experiments.curve_record import BETTER, CurvePoint
from codesign.experiments.data import QualityName
from codesign.experiments.evaluate import Measurement
from codesign.hw.accelerator import Structure, accelerator_from_spec
from codesign.hw.spec import AcceleratorSpec
from codesign.units import PJ_PER_UJ, US_PER_S
from codesign.vocabulary import LINEAR_MAC

LOSS: dict[QualityName, float] = {"accuracy": 0.01, "bits_per_token": 0.05}
"""What may be lost against dense at equal quality: a point of accuracy, or bits per token (ours)."""
_Means = NDArray[np.float64]
FIGURES = (
    *("quality", "kl", "kept", "energy", "latency", "energy_end_to_end", "latency_end_to_end"),
    *("bytes", "bandwidth_cycles"),
)
"""Figures of a point by example; energies in uJ, latencies in cycles, bytes of main memory end to end."""
QUALITY, KL, ENERGY = (FIGURES.index(one) for one in ("quality", "kl", "energy_end_to_end"))


def comparison_rows(
    points: Sequence[CurvePoint],
    mechanism: str,
    machines: Mapping[str, AcceleratorSpec],
    *,
    loss: float | None,
    kl_nats: float,
    num_resamples: int,
) -> list[dict[str, Any]]:
    """Returns a mechanism's rows: dense, and each setting at equal quality and at equal divergence, in each frame.

    A figure that lies between two measured policies is that of a machine which runs one of them on a share of the
    examples and the other on the rest, in expectation. Of all such mixtures, and of the policies themselves, the one of
    least energy end to end is taken. Intervals are bootstrap ones of 95 % over examples; the mixture is chosen anew in
    each resample.

    Args:
      points: What was measured, with every machine among its `machines`.
      mechanism: Its name.
      machines: Machines by frame.
      loss: What quality may be lost against dense; None: `LOSS`.
      kl_nats: Divergence allowed.
      num_resamples: Resamples of the bootstrap.
    """
    name = points[0].measurement.quality_name
    limit = LOSS[name] if loss is None else loss

    def quality_lost(figures: _Means, dense: _Means) -> _Means:
        return BETTER[name] * (dense[..., QUALITY] - figures[..., QUALITY]) - limit

    def kl_beyond(figures: _Means, dense: _Means) -> _Means:
        return figures[..., KL] - kl_nats

    kinds = [kind for kind in dict.fromkeys(point.kind for point in points) if kind != "dense"]
    rows = []
    for frame, spec in machines.items():
        means = [resampled(_figures(one, frame), num_resamples=num_resamples) for one in points]
        structure = accelerator_from_spec(spec).structure
        counts = [_by_unit(one.measurement, structure) for one in points]
        cases = [("dense", "dense", quality_lost)]
        cases += [
            (kind, *at) for kind in kinds for at in (("quality", quality_lost), ("kl", kl_beyond))
        ]
        for setting, at, excess in cases:
            found, operations = [], []
            for seed in sorted({point.seed for point in points}):
                ours = [i for i, one in enumerate(points) if one.seed == seed]
                own = [i for i in ours if points[i].kind == "dense"]
                own += [i for i in ours if points[i].kind == setting != "dense"]
                figures = np.stack([means[i] for i in own], axis=1)
                shares = cheapest_mixtures(excess(figures, figures[:, :1]), figures[..., ENERGY])
                found.append(np.einsum("rp,rpf->rf", shares, figures))
                operations.append(
                    [(share, counts[i]) for share, i in zip(shares[0], own, strict=True)]
                )
            rows.append(
                {"mechanism": mechanism, "setting": setting, "at": at, "frame": frame}
                | _row(np.stack(found), operations, spec.clock_hz)
            )
    return rows


def with_bounds(
    rows: Sequence[dict[str, Any]],
    record: dict[str, Any],
    *,
    loss: float | None,
    kl_nats: float,
) -> list[dict[str, Any]]:
    """Returns a mechanism's rows with `is_bound`: whether even its cheapest point loses less than it may.

    Lower budgets would then have given less: the costs are upper bounds.

    Args:
      rows: Of `comparison_rows`.
      record: The curve's JSON.
      loss: What quality may be lost against dense; None: `LOSS`.
      kl_nats: Divergence allowed.
    """
    name = record["quality_name"]
    limit = LOSS[name] if loss is None else loss
    dense = {one["seed"]: one["quality"] for one in record["points"] if one["kind"] == "dense"}

    def is_bound(setting: str, at: str) -> bool:
        for seed, quality in dense.items():
            own = [p for p in record["points"] if p["kind"] == setting and p["seed"] == seed]
            least = min(own, key=lambda point: float(point["end_to_end"]["energy_pj"]))
            if at == "kl" and least["kl_nats"] > kl_nats:
                return False
            if at == "quality" and BETTER[name] * (quality - least["quality"]) > limit:
                return False
        return True

    return [
        row | {"is_bound": row["at"] != "dense" and is_bound(row["setting"], row["at"])}
        for row in rows
    ]


def _figures(point: CurvePoint, frame: str) -> NDArray[np.float64]:
    """Returns `FIGURES` by example, `[N, F]`."""
    measured = point.measurement
    priced = measured.machines[frame]
    parts = [
        measured.quality,
        measured.kl_nats,
        np.full(len(measured.quality), measured.kept_fraction()),
    ]
    for scope in ("attention", "end_to_end"):
        parts += [priced.costs[scope]["energy"] / PJ_PER_UJ, priced.costs[scope]["latency"]]
    parts += [priced.moved_bytes["end_to_end"], priced.bandwidth_cycles["end_to_end"]]
    return np.stack(parts, axis=1)


def _by_unit(measured: Measurement, structure: Structure) -> dict[str, float]:
    """Returns the operations by unit, means per example; where a machine has a host, dense products are its."""
    found: dict[str, float] = {}
    for key, count in measured.operations.items():
        unit = structure.unit_of(key).name
        found[unit] = found.get(unit, 0.0) + count
    linear = float(
        np.mean(measured.macs["end_to_end"] - measured.macs["attention"])
    ) - measured.operations.get("generate.mac", 0.0)
    unit = "host" if structure.storage is None else structure.unit_of(LINEAR_MAC).name
    found[unit] = found.get(unit, 0.0) + linear
    return found


def _row(
    figures: NDArray[np.float64],
    operations: Sequence[Sequence[tuple[float, dict[str, float]]]],
    clock_hz: float,
) -> dict[str, Any]:
    """Returns the figures of a row, means over seeds; energies in uJ and latencies in us per example.

    Args:
      figures: `FIGURES` of each seed, as measured and of each resample, `[seeds, 1 + R, F]`.
      operations: Shares of the points and their operations by unit, by seed.
      clock_hz: Of the machine.
    """
    values = dict(zip(FIGURES, np.moveaxis(figures, 2, 0), strict=True))
    bound = np.mean(values.pop("bandwidth_cycles")[:, 0]) / np.mean(
        values["latency_end_to_end"][:, 0]
    )
    for key in ("latency", "latency_end_to_end"):
        values[key] = values[key] / clock_hz * US_PER_S
    by_unit: dict[str, float] = {}
    for shares in operations:
        for share, counts in shares:
            for unit, count in counts.items():
                by_unit[unit] = by_unit.get(unit, 0.0) + share * count / len(operations)
    means = {key: value.mean(axis=0) for key, value in values.items()}
    ends = ("quality", "kl", "energy", "latency", "energy_end_to_end", "latency_end_to_end")
    return {
        **{key: float(value[0]) for key, value in means.items()},
        "interval": {key: np.percentile(means[key][1:], [2.5, 97.5]).tolist() for key in ends},
        "operations": by_unit,
        "bandwidth_share": float(bound),
        "binds": "bandwidth" if bound > 0.5 else "area",
        "seeds": len(figures),
        "spread": {key: _spread(values[key][:, 0]) for key in ("energy_end_to_end", "quality")},
    }


def _spread(values: NDArray[np.float64]) -> float | None:
    """Returns the standard deviation over seeds; None of one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
