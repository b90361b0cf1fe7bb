"""Conversion factors against each other and against physics."""

import pytest

from codesign import units


def test_prefixes_agree():
    assert units.PJ_PER_FJ * units.PJ_PER_NJ == 1
    assert units.PJ_PER_UJ * units.PJ_PER_UJ == units.PJ_PER_J
    assert units.HZ_PER_GHZ == 1e3 * units.HZ_PER_MHZ
    assert units.NS_PER_S == 1e3 * units.US_PER_S == 1e6 * units.MS_PER_S
    assert units.BYTES_PER_MIB == units.BYTES_PER_KIB**2 == 2**20


def test_power_times_time_is_energy():
    # 250 mW for 2 ms is 0.5 mJ, that is 500 uJ.
    energy_pj = 250 * units.PJ_PER_S_PER_MILLIWATT * 2 / units.MS_PER_S
    assert energy_pj / units.PJ_PER_UJ == pytest.approx(500)
    # The same in joules: 0.25 W for 0.002 s.
    watts = 250 / units.MILLIWATT_PER_WATT
    assert watts * 0.002 * units.PJ_PER_J == pytest.approx(energy_pj)
