"""The mapper beside the best mappings known: products are told apart, the least is taken, a worse mapper is seen."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from dense_points import random_points

from codesign.experiments import validation_mapper
from codesign.experiments.validation_mapper import ROWS, mapped_edp, products_known, validate_mapper
from codesign.experiments.validation_timeloop import TimeloopPoints, timeloop_cost
from codesign.hw.gemm.mapper import MapperSettings
from codesign.hw.gemm.names import CONVOLUTION, MATMUL

FAST = MapperSettings(num_starts=24, num_descended=8, move_rounds=6, moves_per_round=60)
NONE = MapperSettings(
    num_starts=1, num_descended=1, descent_rounds=1, move_rounds=0, moves_per_round=0
)
NUM = 60
SIDE = 144.0


def points() -> TimeloopPoints:
    """Mappings of one product on two machines by turns; the last five are convolutions."""
    layer, mapping = random_points(NUM, dims=CONVOLUTION)
    is_product = np.arange(NUM) < NUM - 5
    others = np.asarray([dim not in MATMUL for dim in CONVOLUTION])
    alone = is_product[:, None] & others
    temporal, spatial = (
        np.where(alone[:, None], 1.0, np.asarray(factors))
        for factors in (mapping.temporal, mapping.spatial)
    )
    places = np.arange(NUM) % 2
    given = TimeloopPoints(
        layer=layer.replace(  # type: ignore[attr-defined]
            extents=np.prod(temporal * spatial, axis=1), stride=np.ones((NUM, 2))
        ),
        mapping=mapping.replace(  # type: ignore[attr-defined]
            temporal=temporal, spatial=spatial, order=np.asarray(mapping.order)
        ),
        sizes={
            "side": np.full(NUM, 144.0),
            "accumulator.bytes": np.asarray([2.0**18, 2.0**20])[places],
            "scratchpad.bytes": np.asarray([2.0**20, 2.0**18])[places],
        },
        cycles=np.linspace(1000.0, 2000.0, NUM),
        energy_uj=np.full(NUM, 3.0),
        area_mm2=np.ones(NUM),
    )
    return given


def test_products_are_told_apart_and_the_least_is_taken():
    given = points()
    known = products_known(given, rows=SIDE)
    assert known.extents.tolist() == [[SIDE] * 3] * 2
    assert sorted(known.num_mappings.tolist()) == [27, 28]
    edp = np.asarray(timeloop_cost(given).edp)[: NUM - 5]
    for place, size in enumerate(known.sizes["accumulator.bytes"]):
        own = given.sizes["accumulator.bytes"][: NUM - 5] == size
        assert known.modelled_edp[place] == edp[own].min()
        assert known.timeloop_edp[place] == 3.0 * given.cycles[: NUM - 5][own].min()
    assert len(products_known(given, rows=ROWS).extents) == 0


def test_better_than_random_mappings_and_a_poor_search_is_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    given = points()
    known = products_known(given, rows=SIDE)
    assert np.all(mapped_edp(known, settings=FAST) < 0.8 * known.modelled_edp)
    monkeypatch.setattr(validation_mapper, "read_points", lambda folder, file="": given)
    monkeypatch.setattr(validation_mapper, "ROWS", SIDE)
    monkeypatch.setattr(
        validation_mapper,
        "products_known",
        lambda found: dataclasses.replace(
            products_known(found, rows=SIDE), modelled_edp=known.modelled_edp / 1e3
        ),
    )
    (tmp_path / validation_mapper.SEARCHED_FILE).touch()
    rows = validate_mapper(tmp_path, settings=NONE)
    assert len({row.reference for row in rows}) == 2
    limited = [row for row in rows if row.limit is not None]
    assert len(limited) == 2 and all(row.value > row.limit for row in limited if row.limit)
    assert all(row.rows == NUM - 5 for row in rows)
