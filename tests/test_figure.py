"""The JSON of a curve and its figure, from measurements made by hand."""

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from codesign.experiments.configs import Metric, Scope
from codesign.experiments.curve_record import SCHEMA_VERSION, CurvePoint, curve_record
from codesign.experiments.curve_settings import CurveSettings
from codesign.experiments.data import QualityName
from codesign.experiments.evaluate import Measurement
from codesign.experiments.figure import STYLE, draw_curve
from codesign.hw.surrogate import SCOPES

NUM_EXAMPLES = 40
SEEDS = (0, 1)
BUDGETS = (0.6, 0.3)
COSTS: dict[str, tuple[float, ...]] = {
    "dense": (1.0,),
    "uniform": (0.66, 0.33),
    "trained": BUDGETS,
    "uniform_tuned": (0.66, 0.33),
}
"""Cost over dense of each kind; under a budget trained points cost a tenth less than uniform ones of equal quality."""


def measurement(
    kind: str, index: int, seed: int, ratio: float, quality_name: QualityName
) -> Measurement:
    """Divergence falls and quality rises with the cost of a trained point; untrained ones are worse."""
    values = np.ones(NUM_EXAMPLES)
    num_right = {"dense": 40, "uniform": 20}.get(kind, 36 - 4 * index)
    quality = (np.arange(NUM_EXAMPLES) < num_right).astype(float)
    if quality_name == "bits_per_token":
        quality = 3.0 - quality  # fewer bits are better
    kl_nats = {"dense": 0.0, "uniform": 0.9}.get(kind, (0.1, 0.4)[index % 2]) * values
    metrics: dict[Metric, np.ndarray] = {
        "energy": 2e6 * ratio * values,
        "latency": 1e4 * ratio * values,
    }
    costs: dict[Scope, dict[Metric, np.ndarray]] = {scope: metrics for scope in SCOPES}
    return Measurement(
        quality_name=quality_name,
        quality=np.roll(quality, seed),
        kl_nats=kl_nats,
        costs=costs,
        kept=np.ones((2, 2, 1)),
    )


def record(metric: Metric, quality_name: QualityName = "accuracy") -> dict[str, Any]:
    settings = CurveSettings(budgets=BUDGETS, metric=metric, num_resamples=50)
    points = [
        CurvePoint(
            kind,
            seed,
            None if kind == "dense" else BUDGETS[index],
            {},
            measurement(kind, index, seed, ratio, quality_name),
        )
        for seed in SEEDS
        for kind, ratios in COSTS.items()
        for index, ratio in enumerate(ratios)
    ]
    machine = {"preset": "energon", "clock_hz": 1e9, "mechanism": "energon", "task": "digits"}
    return machine | curve_record({"part": "test"}, points, settings)


def test_record_compares_trained_with_uniform() -> None:
    result = record("energy")
    assert result["schema_version"] == SCHEMA_VERSION and result["quality_name"] == "accuracy"
    means = {(entry["kind"], entry["budget"]): entry for entry in result["means"]}
    assert len(means) == 7
    trained = means["trained", 0.6]
    assert trained["quality"]["mean"] == pytest.approx(36 / 40)
    assert trained["quality"]["low"] <= 36 / 40 <= trained["quality"]["high"]
    assert trained["quality_by_seed"] == [36 / 40] * 2
    assert trained["end_to_end"]["energy_pj"] == pytest.approx(0.6 * 2e6)
    assert trained["attention"]["latency_ratio"] == pytest.approx(0.6)
    gains = {(one["baseline"], one["budget"]): one for one in result["comparisons"]}
    assert set(gains) == {(kind, b) for kind in ("uniform", "uniform_tuned") for b in BUDGETS}
    assert gains["uniform", 0.6]["kl_nats_gain"]["mean"] == pytest.approx(0.9 - 0.1)
    assert gains["uniform", 0.6]["quality_gain"]["mean"] == pytest.approx((36 - 20) / 40)
    assert gains["uniform_tuned", 0.3]["quality_gain"]["mean"] == pytest.approx(0.0)
    # Half-way between two trained points in cost: half-way in divergence and in quality; under them there is nothing.
    at = {key: one["equal_cost"] for key, one in gains.items()}
    share = 0.06 / 0.4  # 0.66 lies between 0.6 and dense
    kl_nats = (1.0 - share) * 0.1
    assert at["uniform", 0.6]["kl_nats_gain"]["mean"] == pytest.approx(0.9 - kl_nats)
    quality = (1.0 - share) * 36 / 40 + share * 1.0
    assert at["uniform", 0.6]["quality_gain"]["mean"] == pytest.approx(quality - 20 / 40)
    kl_nats = 0.9 * 0.4 + 0.1 * 0.1  # 0.33 is a tenth of the way from 0.3 to 0.6
    assert at["uniform_tuned", 0.3]["kl_nats_gain"]["mean"] == pytest.approx(0.4 - kl_nats)
    equal = {one["baseline"]: one for one in result["equal_kl"]}
    # Equal quality at 1.1 times the cost; the untrained setting never gets as good.
    assert equal["uniform_tuned"]["ratio"] == pytest.approx(1.1)
    assert equal["uniform_tuned"]["spread"] == pytest.approx(0.0)
    assert equal["uniform"]["ratio"] is None and equal["uniform"]["ratio_by_seed"] == [None] * 2


def test_gains_of_a_decoder_are_bits_saved() -> None:
    result = record("energy", "bits_per_token")
    assert result["quality_name"] == "bits_per_token"
    means = {(entry["kind"], entry["budget"]): entry for entry in result["means"]}
    assert means["trained", 0.6]["quality"]["mean"] == pytest.approx(3.0 - 36 / 40)
    gains = {(one["baseline"], one["budget"]): one for one in result["comparisons"]}
    gain = gains["uniform", 0.6]["quality_gain"]
    assert gain["mean"] == pytest.approx((36 - 20) / 40) and 0.0 < gain["low"] < gain["high"]


@pytest.mark.parametrize(
    ("metric", "quality_name"),
    [("energy", "accuracy"), ("latency", "accuracy"), ("energy", "bits_per_token")],
)
def test_figure_is_drawn_from_the_record_alone(
    metric: Metric, quality_name: QualityName, tmp_path: Path
) -> None:
    path = tmp_path / "curve.png"
    draw_curve(record(metric, quality_name), path)
    image = matplotlib.image.imread(path)
    # 9 x 3.6 inch at 200 dots per inch; the kinds' colours are on it.
    assert image.shape[:2] == (720, 1800)
    colours = {tuple(pixel) for pixel in np.rint(255 * image[..., :3]).astype(int).reshape(-1, 3)}
    drawn = {kind for kind, style in STYLE.items() if rgb(style[1]) in colours}
    assert drawn == {"uniform", "trained", "uniform_tuned"}


def rgb(colour: str) -> tuple[int, ...]:
    """Returns red, green and blue, 0 to 255, of `#rrggbb`."""
    return tuple(bytes.fromhex(colour.removeprefix("#")))
