"""Areas and powers of the presets at their published operating points."""

import pytest

from codesign.experiments.published_chips import chip_of, chips, validate_chips
from codesign.hw.spec import load_preset, preset_names

ROWS = validate_chips()


def test_every_preset_is_there_and_every_limit_is_kept() -> None:
    assert [chip.name for chip in chips()] == preset_names()
    assert {row.reference for row in ROWS} == {f"preset {name}" for name in preset_names()}
    for row in ROWS:
        assert row.is_met, row
    # Areas always have a limit, powers where a factor was fitted to them.
    assert all(row.limit is not None for row in ROWS if row.metric.startswith("area"))
    limited = {row.reference for row in ROWS if row.limit and row.metric.startswith("core")}
    fitted = ("a3", "bitserial", "energon", "fact", "sanger", "spatten")
    assert limited == {f"preset {name}" for name in fitted}


def test_a_wrong_factor_is_seen() -> None:
    """Twice the energies, twice the power: nothing here comes from the published figure itself."""
    spec = load_preset("energon")
    factor = spec.energy_factor.model_copy(update={"value": 2.0 * spec.energy_factor.value})
    changed = chip_of(spec.model_copy(update={"energy_factor": factor}))
    own = chip_of(spec)
    assert own.core_watt == pytest.approx(0.32, rel=0.01)  # 0.32 W published
    assert changed.core_watt == pytest.approx(2.0 * own.core_watt, rel=1e-5)
    # 25.6 GB/s at 11.72 pJ/bit.
    assert own.interface_watt == pytest.approx(2.4, rel=0.01)
