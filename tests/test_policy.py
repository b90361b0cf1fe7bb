"""Knobs: optimiser groups, legal ranges, projection and rounding of widths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from codesign.errors import UnknownNameError
from codesign.policy import Policy, bits_range, dense_knobs, deployed_bits, group, project


def filter_policy(key_bits: object) -> Policy:
    return Policy(layers={"key_bits": jnp.asarray(key_bits, float)}, ends={})


def key_bits(policy: Policy) -> list[list[float]]:
    widths: list[list[float]] = np.asarray(policy.layers["key_bits"]).tolist()
    return widths


def test_groups_follow_from_names() -> None:
    names = {
        "qkv.weight_bits": "bits",
        "qk_bits": "bits",
        "key_bits": "bits",
        "head.activation_clip": "clips",
        "threshold": "thresholds",
        "filter.keep": "thresholds",
    }
    assert {name: group(name) for name in names} == names
    with pytest.raises(UnknownNameError, match="knob `qkv.weight` has no optimiser group"):
        group("qkv.weight")


def test_dense_knobs_cover_every_site_alike() -> None:
    policy = dense_knobs(3, linear_bits=7.5, attention_bits=15.5, end_sites=("pool", "head"))
    knobs = policy.layers | policy.ends
    assert len(policy.layers) == 2 + 4 * 4 and len(policy.ends) == 2 * 4
    assert {name.partition(".")[0] for name in policy.ends} == {"pool", "head"}
    for name, value in knobs.items():
        assert value.shape == (() if name in policy.ends else (3,))
        expected = 15.5 if name in ("qk_bits", "v_bits") else 7.5
        np.testing.assert_array_equal(value, 0.0 if group(name) == "clips" else expected)


def test_projection_moves_widths_alone_and_only_into_range() -> None:
    rng = np.random.default_rng(0)
    start = tiny_model.energon_policy(tiny_model.structure())
    wild = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(-5, 25, leaf.shape)), start)
    inside = project(wild)
    for before, after in ((wild.layers, inside.layers), (wild.ends, inside.ends)):
        for name, value in after.items():
            if group(name) != "bits":
                np.testing.assert_array_equal(value, before[name])
                continue
            low, high = bits_range(name)
            assert np.all((value >= low) & (value <= high)), name
            if name != "key_bits":
                np.testing.assert_array_equal(value, np.clip(before[name], low, high))
    again = project(inside)
    jax.tree.map(np.testing.assert_array_equal, again, inside)


@pytest.mark.parametrize(
    ("widths", "projected"),
    [
        ([[2.5, 4.5]], [[2.5, 4.5]]),  # legal: left alone
        ([[4.0, 3.0]], [[4.0, 5.0]]),  # a later round rises over the one before
        ([[9.0, 9.0]], [[7.0, 8.0]]),  # the first round leaves room for the second
        ([[8.0, 8.0, 8.0, 8.0]], [[5.0, 6.0, 7.0, 8.0]]),
        ([[7.5, 2.0, 2.0]], [[6.0, 7.0, 8.0]]),
        ([[0.0, 0.0, 9.0]], [[2.0, 3.0, 8.0]]),
        ([[9.0]], [[8.0]]),
        ([[2.0, 2.0], [9.0, 1.0]], [[2.0, 3.0], [7.0, 8.0]]),
    ],
)
def test_key_widths_rise_by_at_least_a_bit(
    widths: list[list[float]], projected: list[list[float]]
) -> None:
    assert key_bits(project(filter_policy(widths))) == projected


@pytest.mark.parametrize("num_rounds", [1, 2, 3, 4, 7])
def test_rounded_key_widths_are_whole_legal_and_rise(num_rounds: int) -> None:
    drawn = np.random.default_rng(num_rounds).uniform(0.0, 10.0, size=(50, num_rounds))
    for offset in (-0.499, 0.0, 0.499):
        widths = np.asarray(key_bits(deployed_bits(project(filter_policy(drawn)), offset=offset)))
        np.testing.assert_array_equal(widths, np.round(widths))
        assert widths.min() >= 2.0 and widths.max() <= 8.0
        assert np.all(np.diff(widths, axis=1) >= 1.0)


def test_rounding_is_to_the_nearest_and_can_be_offset() -> None:
    policy = dense_knobs(4, linear_bits=4.0, attention_bits=8.0, end_sites=())
    widths = jnp.asarray([3.2, 3.5, 3.8, 8.0])
    policy = policy.replace(layers=policy.layers | {"up.weight_bits": widths})  # type: ignore[attr-defined]

    def rounded(offset: float) -> list[float]:
        values: list[float] = deployed_bits(policy, offset=offset).layers["up.weight_bits"].tolist()
        return values

    assert rounded(0.0) == [3.0, 4.0, 4.0, 8.0]
    assert rounded(0.4) == [3.0, 3.0, 3.0, 8.0]
    assert rounded(-0.4) == [4.0, 4.0, 4.0, 8.0]
