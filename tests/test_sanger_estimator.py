"""Sanger's published latency: the repository's example, the corrected output projection, limits."""

import pytest

from codesign.hw.sanger_estimator import PEAK_GOPS, latency_s

TOKENS, WIDTH = 384, 768


def test_latency_of_the_repositorys_example() -> None:
    """6 n h^2 = 1.358954 G take 0.663552 ms; (0.452985 + 0.452985) G x 0.25 / 0.7 take 0.157989 ms more."""
    seconds = latency_s(TOKENS, WIDTH, kept=0.25, utilisation=0.7)
    assert seconds * 1e3 == pytest.approx(0.663552 + 0.157989, abs=1e-6)
    assert round(seconds * 1e3, 3) == 0.822


def test_corrected_projection_takes_its_full_time() -> None:
    """8 n h^2 = 1.811939 G take 0.884736 ms; 0.452985 G x 0.25 / 0.7 take 0.078994 ms more."""
    seconds = latency_s(TOKENS, WIDTH, kept=0.25, utilisation=0.7, scales_projection=False)
    assert seconds * 1e3 == pytest.approx(0.884736 + 0.078994, abs=1e-6)


def test_dense_attention_on_a_full_array_is_its_operations_over_the_rate() -> None:
    operations = 8 * TOKENS * WIDTH**2 + 4 * TOKENS**2 * WIDTH
    for scales in (True, False):
        seconds = latency_s(TOKENS, WIDTH, kept=1.0, utilisation=1.0, scales_projection=scales)
        assert seconds == pytest.approx(operations / (PEAK_GOPS * 1e9))
    half = latency_s(TOKENS, WIDTH, kept=1.0, utilisation=1.0, peak_gops=PEAK_GOPS / 2)
    assert half == pytest.approx(2 * operations / (PEAK_GOPS * 1e9))


def test_latency_rises_with_what_is_kept_and_falls_with_utilisation() -> None:
    def at(kept: float, utilisation: float) -> float:
        return latency_s(TOKENS, WIDTH, kept=kept, utilisation=utilisation)

    assert at(0.2, 0.7) < at(0.3, 0.7) < at(0.3, 0.6)
