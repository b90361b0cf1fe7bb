"""DynaTran in JAX: the specification's tests, its gates and their derivatives, its hooks and scales."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from codesign.errors import CodesignError
from codesign.fake_quantize import density_of_width
from codesign.mechanisms import MECHANISMS
from codesign.mechanisms.acceltran import (
    WIDTH_PART,
    codes,
    from_setting,
    from_strength,
    gate_width,
    integer_bits,
    prune,
    soft_on_weight,
    soft_prune,
    stored_weight,
    straight_through_prune,
    threshold_code,
    threshold_variable,
    to_strength,
)
from codesign.mechanisms.acceltran_study import fixed_point, net_sparsity, strict_topk
from codesign.mechanisms.protocol import Context, Plan, Selection
from codesign.references.acceltran import PRUNED_SITES
from codesign.structure import ModelStructure, TokenInput

SCALE = MECHANISMS["acceltran"].thresholds


# Functions


def test_hand_example_in_the_published_fixed_point() -> None:
    x = fixed_point([0.03, -0.05, 0.05, 0.2, -0.01], 4, 16)
    tau = fixed_point(0.05, 4, 16)
    assert x.tolist() == [1966, -3277, 3277, 13107, -655] and tau == 3277
    left = np.asarray(prune(jnp.asarray(x), int(tau)))
    assert left.tolist() == [0, 0, 0, 13107, 0]
    assert np.mean(left == 0) == 0.8


def test_rounding_never_keeps_what_the_real_rule_prunes() -> None:
    rng = np.random.default_rng(0)
    x, tau = rng.normal(size=100_000), rng.uniform(0.0, 1.0, size=100_000)
    left = np.abs(fixed_point(x, 4, 6)) > fixed_point(tau, 4, 6)
    assert not np.any(left[np.abs(x) <= tau])
    # What is pruned beyond that lies within one code of the threshold.
    missed = ~left & (np.abs(x) > tau)
    assert np.any(missed) and np.all(np.abs(x[missed]) - tau[missed] < 2.0**-6)


def test_limits_of_pruning() -> None:
    x = np.random.default_rng(1).integers(-127, 128, size=1000)
    np.testing.assert_array_equal(prune(jnp.asarray(x), 0), x)
    range_ = np.full(3, 8.0)
    largest = threshold_code(np.asarray([7.99, 8.0, 100.0]), 8.0 / 127, range_)
    assert largest.tolist() == [127, 127, 127]
    assert not np.any(prune(jnp.asarray(x), int(largest[0])))
    sparsities = []
    for tau in range(0, 130, 13):
        left = np.asarray(prune(jnp.asarray(x), tau))
        np.testing.assert_array_equal(prune(jnp.asarray(left), tau), left)
        np.testing.assert_array_equal(prune(jnp.asarray(-x), tau), -left)
        sparsities.append(np.mean(left == 0))
    assert sparsities == sorted(sparsities) and sparsities[-1] < 1.0


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_integer_bits_of_a_range(as_array: Any) -> None:
    ranges = as_array([5.0, 8.0, 300.0, 0.9, 8.0001, 1.0, 0.001, 5000.0])
    assert np.asarray(integer_bits(ranges)).tolist() == [4, 4, 10, 1, 5, 1, 1, 10]


def test_a_range_saturates_by_one_code_at_most() -> None:
    ranges = np.append(2.0 ** np.arange(-3, 10), np.random.default_rng(2).uniform(0.01, 512, 500))
    for range_ in ranges:
        bits = int(integer_bits(range_))
        for fraction_bits in (2, min(16, 20 - bits)):
            unlimited = np.rint(np.asarray([range_, -range_]) * 2.0**fraction_bits)
            saturated = unlimited - fixed_point([range_, -range_], bits, fraction_bits)
            assert np.all(np.abs(saturated) <= 1)


def test_strict_topk_keeps_one_fewer() -> None:
    row = jnp.asarray([[0.1, 0.4, 0.2, 0.3], [0.3, 0.3, 0.3, 0.1]])
    assert not np.any(strict_topk(row, 1))
    np.testing.assert_array_equal(np.asarray(strict_topk(row, 3)) > 0, [[0, 1, 0, 1], [0] * 4])
    np.testing.assert_array_equal(np.asarray(strict_topk(row, 4)) > 0, [[0, 1, 1, 1], [1, 1, 1, 0]])
    for k in (0, 5):
        with pytest.raises(CodesignError, match=rf"`k` must lie in \[1, 4\].*got {k}"):
            strict_topk(row, k)


def bert_base(**changes: Any) -> ModelStructure:
    sizes: dict[str, Any] = {
        "num_layers": 12,
        "num_heads": 12,
        "head_dim": 64,
        "width": 768,
        "hidden": 3072,
        "input": TokenInput(vocabulary_size=30522, max_tokens=512),
        "norm": "post",
        "num_outputs": 2,
    }
    return ModelStructure(**(sizes | changes))


def test_padding_alone_gives_the_published_floor() -> None:
    # Probabilities are 12 * 512^2 of 10,223,616 elements a layer; 487 of 512 tokens are padding.
    valid = np.arange(512)[None] < 25
    floor = net_sparsity({}, bert_base(), valid, count_padding=True)
    np.testing.assert_allclose(floor, 3_145_728 / 10_223_616 * 487 / 512, rtol=1e-12)
    assert round(3_145_728 / 10_223_616, 4) == 0.3077 and round(floor, 4) == 0.2927
    assert net_sparsity({}, bert_base(), valid, count_padding=False) == 0.0
    # All probabilities gone: their whole share.
    gone = {"probabilities": np.zeros((1, 12))}
    whole = net_sparsity(gone, bert_base(), valid, count_padding=True)
    np.testing.assert_allclose(whole, 3_145_728 / 10_223_616, rtol=1e-12)


def test_net_sparsity_by_hand() -> None:
    # 2 examples of 3 and 1 of 4 tokens; 1 head of 2, width 2, hidden 5: a token has 4 * 2 + 2 * 2 + 5 = 17 elements.
    shape = bert_base(num_layers=1, num_heads=1, head_dim=2, width=2, hidden=5, is_causal=True)
    valid = np.asarray([[1, 1, 1, 0], [1, 0, 0, 0]])
    densities = {"gelu": np.asarray([[0.2], [1.0]]), "probabilities": np.asarray([[0.5], [1.0]])}
    # Causal pairs: 6 and 1, twice (scores, probabilities). Zeros: 0.8 * 15 and 0.5 * 6.
    own = net_sparsity(densities, shape, valid, count_padding=False)
    np.testing.assert_allclose(own, (12 + 3) / (4 * 17 + 2 * 7))
    # Padded: 8 tokens, 16 pairs each; probabilities of 1 + 2 + 3 + 3 and 4 pairs are not masked.
    padded = net_sparsity(densities, shape, valid, count_padding=True)
    np.testing.assert_allclose(padded, (16 + (16 - 4.5) + (16 - 4)) / (8 * 17 + 2 * 32))


# Gates


def test_straight_through_derivatives_are_those_of_the_soft_gate() -> None:
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        x, towards = (jnp.asarray(rng.normal(size=(2, 3, 5, 4))) for _ in range(2))
        exists = jnp.asarray(rng.random((2, 1, 5, 1)) < 0.7, float)
        weights = jnp.asarray([0.7, -1.3])
        threshold, width = jnp.asarray(0.6), jnp.asarray(0.2)

        def hard(x: jax.Array, threshold: jax.Array) -> jax.Array:
            y, left = straight_through_prune(x, threshold, jnp.asarray(0.61), width, exists)
            return jnp.sum(y * towards) + jnp.sum(left * weights)

        def soft(x: jax.Array, threshold: jax.Array) -> jax.Array:
            y, left = soft_prune(x, threshold, width, exists)
            return jnp.sum(y * towards) + jnp.sum(left * weights)

        got, wanted = (jax.grad(fn, (0, 1))(x, threshold) for fn in (hard, soft))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), got, wanted)
        # By hand, where the density does not matter: -sum x g (1 - g) / width.
        y_slope = jax.grad(lambda t: jnp.sum(soft_prune(x, t, width, exists)[0]))(threshold)
        gate = 1.0 / (1.0 + np.exp(-(np.abs(x) - 0.6) / 0.2))
        np.testing.assert_allclose(y_slope, -np.sum(x * gate * (1 - gate)) / 0.2, rtol=1e-12)
        y, left = straight_through_prune(x, threshold, jnp.asarray(0.61), width, exists)
        kept = np.abs(x) > 0.61
        np.testing.assert_array_equal(y, np.where(kept, x, 0.0))
        share = np.sum(kept * exists, axis=(1, 2, 3)) / (12 * np.sum(exists, axis=(1, 2, 3)))
        np.testing.assert_allclose(left, share)


@pytest.mark.parametrize("mean_magnitude", [0.3, 1.0, 4.0])
def test_density_follows_the_width_of_codes(mean_magnitude: float) -> None:
    """Exponential magnitudes in codes of 8 bits: a bit more takes the root of what is left, one less squares it."""
    step = 1.0
    left = np.exp(-step / 2.0 / mean_magnitude)
    x = jax.random.exponential(jax.random.key(0), (200_000,)) * mean_magnitude
    counted = {bits: float(jnp.mean(jnp.round(x / 2.0 ** (8 - bits)) != 0)) for bits in (7, 8, 9)}
    np.testing.assert_allclose(counted[8], left, atol=0.005)
    np.testing.assert_allclose(counted[9], np.sqrt(left), atol=0.005)
    np.testing.assert_allclose(counted[7], left**2, atol=0.005)
    with jax.enable_x64(True):
        density, slope = jax.value_and_grad(lambda b: density_of_width(jnp.asarray(left), b))(8.0)
        np.testing.assert_allclose(density, left)
        steps = 1e-5 * np.array([-1.0, 1.0])
        low, high = (left ** (2.0**-step) for step in steps)
        np.testing.assert_allclose(slope, (high - low) / (steps[1] - steps[0]), rtol=1e-6)
        # Where a threshold decides, the width does not; nothing left has no slope, nor has all.
        none = jax.grad(lambda b: density_of_width(jnp.asarray(left), b, 0.0))(8.0)
        ends = [
            jax.grad(lambda b, d=d: density_of_width(jnp.asarray(d), b))(8.0) for d in (0.0, 1.0)
        ]
        np.testing.assert_allclose([none, *ends], 0.0, atol=1e-4)
        kept = jax.grad(lambda d: density_of_width(d, jnp.asarray(8.0)))(jnp.asarray(left))
        np.testing.assert_allclose(kept, 1.0)


def test_gates_are_as_narrow_as_their_threshold() -> None:
    """Magnitudes spread by 1: a threshold of 4 is far, one of 0.02 near; half a code is the least."""
    x = jnp.asarray([-0.5, 0.5, 2.5, -2.5]).reshape(1, 4, 1)
    code, exists = jnp.asarray(1e-3), jnp.ones((1, 4, 1))

    def width(threshold: float, temperature: float) -> float:
        tau = jnp.asarray(threshold)
        return float(gate_width(x, tau, code, exists, jnp.asarray(temperature)))

    assert width(8.0, 0.5) == pytest.approx(0.5 * 1.0)
    assert width(0.02, 0.5) == pytest.approx(0.5 * WIDTH_PART * 0.02)
    assert width(0.02, 0.05) == pytest.approx(0.5e-3)


def test_soft_gate_becomes_the_comparison() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 50, 3))
    exists = jnp.ones((2, 50, 1))
    threshold, width = jnp.asarray(0.5), jnp.asarray(1e-6)
    hard = straight_through_prune(x, threshold, threshold, width, exists)
    soft = soft_prune(x, threshold, width, exists)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), soft, hard)


@pytest.mark.parametrize("threshold", [0.2, 0.7, 1.5])
@pytest.mark.parametrize("width", [0.02, 0.1])
def test_sparsity_rises_by_the_density_of_magnitudes(threshold: float, width: float) -> None:
    """Of a normal: d rho / d tau is 2 phi(tau), smeared by the gate."""
    grid = np.linspace(0.0, 8.0, 80_001)
    magnitudes = 2.0 * np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi)
    gate = 1.0 / (1.0 + np.exp(-(grid - threshold) / width))
    smeared = np.sum(magnitudes * gate * (1 - gate)) / width * (grid[1] - grid[0])
    x = jax.random.normal(jax.random.key(1), (1, 200_000))
    cut = jnp.asarray(threshold)

    def sparsity(tau: jax.Array) -> jax.Array:
        width_ = jnp.asarray(width)
        return 1.0 - straight_through_prune(x, tau, cut, width_, jnp.ones((1, 1)))[1][0]

    slope = float(jax.grad(sparsity)(cut))
    assert (
        abs(slope - smeared) < 0.012
    )  # of 200,000 samples, three standard errors at the narrow width
    if width == 0.02:
        assert abs(smeared - 2.0 * np.exp(-(threshold**2) / 2) / np.sqrt(2 * np.pi)) < 1e-3


# Hooks

BITS = {"qk_bits": 9, "v_bits": 8, "out.activation_bits": 6}
RANGES = {
    **{"query": 3.0, "key": 5.0, "value": 1.5, "scores": 40.0, "out": 2.0, "gelu": 6.0},
    **{"attention_branch": 4.0, "ffn_branch": 7.0},
}
LARGEST = {"query": 255, "key": 255, "value": 127, "out": 31, "gelu": 511}
SCALES = {name: RANGES[name] / largest for name, largest in LARGEST.items()} | {
    "residual": 20.0 / 32767
}


def stored_thresholds(variable: np.ndarray) -> np.ndarray:
    """What `codes` stores for one layer."""
    knobs = {name: np.asarray([float(bits)]) for name, bits in BITS.items()}
    knobs |= {"threshold": variable[None], "out.activation_clip": np.zeros(1)}
    tensors = {name: np.asarray([value]) for name, value in (RANGES | SCALES).items()}
    return codes(knobs, tensors)["threshold"][0]


def contexts(thresholds: np.ndarray) -> dict[str, Context]:
    """One layer's context on both paths: 5 tokens, the last of the second example padding, causal."""
    valid = np.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], np.float32)
    pairs = np.tril(np.broadcast_to(valid[:, None, None, :], (2, 1, 5, 5)))
    variable = threshold_variable(thresholds)
    own = {
        "soft": jnp.asarray(variable, jnp.float32),
        "hard": jnp.asarray(stored_thresholds(variable), jnp.int32),
    }
    return {
        path: Context(
            knobs={"threshold": own[path]},
            widths={name: jnp.asarray(float(bits)) for name, bits in BITS.items()},
            ranges={name: jnp.asarray(value) for name, value in RANGES.items()},
            relaxation=tiny_model.relaxation(),
            valid=jnp.asarray(valid),
            pairs=jnp.asarray(pairs),
            scales={name: jnp.asarray(value) for name, value in SCALES.items()},
        )
        for path in own
    }


def random_codes(site: str, seed: int) -> tuple[np.ndarray, float]:
    """Codes of a site, and what one is worth in the units of the soft path."""
    rng = np.random.default_rng(seed)
    if site in ("query", "key", "value"):
        return rng.integers(-LARGEST[site], LARGEST[site] + 1, (2, 2, 5, 4)), 1.0
    if site == "scores":
        return rng.integers(-200_000, 200_001, (2, 2, 5, 5)), 1.0
    if site == "probabilities":
        return rng.integers(0, 256, (2, 2, 5, 5)), 1.0 / 255
    limit = LARGEST.get(site, 5000)
    return rng.integers(-limit, limit + 1, (2, 5, 8)), SCALES.get(site, SCALES["residual"])


def run_hook(path: str, context: Context, x: jax.Array, site: str) -> tuple[jax.Array, jax.Array]:
    hooks = getattr(MECHANISMS["acceltran"], path)
    if site == "probabilities":
        one = jnp.ones(())
        selection = Selection(weights=x, fetched=one, fetched_bits=one, trace={})
        y, used, counts = hooks.on_probabilities(context, x, selection)
        assert used is selection.weights  # a pruned probability saves by its density
    elif site.endswith("branch"):
        y, counts = hooks.on_output(context, x, Plan(), site)
    else:
        y, counts = hooks.on_activation(context, x, Plan(), site)
    assert counts.densities.keys() == {site}
    return y, counts.densities[site]


@pytest.mark.parametrize("site", PRUNED_SITES)
def test_both_paths_decide_alike_on_equal_codes(site: str) -> None:
    for seed in range(4):
        share = np.random.default_rng(seed).uniform(0.02, 0.6)
        limits = np.asarray([RANGES.get(name, 1.0) for name in PRUNED_SITES])
        both = contexts(share * limits)
        values, unit = random_codes(site, seed)
        # Values need not lie on the grid: a branch is rounded after its hook.
        off = 0.3 * unit * np.random.default_rng(seed).uniform(-1, 1, values.shape)
        off = off if site.endswith("branch") else 0.0
        soft, soft_left = run_hook("soft", both["soft"], jnp.asarray(values * unit + off), site)
        hard, hard_left = run_hook("hard", both["hard"], jnp.asarray(values), site)
        stored = int(both["hard"].knobs["threshold"][PRUNED_SITES.index(site)])
        np.testing.assert_array_equal(hard, np.where(np.abs(values) > stored, values, 0))
        np.testing.assert_array_equal(np.asarray(soft) != 0, np.asarray(hard) != 0)
        np.testing.assert_allclose(soft_left, hard_left, rtol=1e-6)
        assert 0.05 < np.mean(np.asarray(hard) != 0) < 0.999


def test_stored_thresholds_by_hand() -> None:
    stored = stored_thresholds(threshold_variable(np.full(9, 0.11)))
    # 0.11 over one code: 3/255, 5/255, 1.5/127, their product, 1/255, 2/31, 20/32767, 6/511, 20/32767.
    assert stored.tolist() == [9, 6, 9, 477, 28, 2, 180, 9, 180]
    # Integer bits 3, 4, 2, 7, 1, 2, 3, 4, 4: the largest is 2^(bits - 1) over one code, rounded.
    stored = stored_thresholds(threshold_variable(np.full(9, 1000.0)))
    assert stored.tolist() == [340, 408, 169, 277440, 255, 31, 6553, 681, 13107]


def test_unpruned_sites_count_what_quantisation_left() -> None:
    context = contexts(np.full(9, 0.1))["soft"]
    context = context.replace(
        scales=context.scales | {"up": jnp.asarray(0.5)},
        widths=context.widths | {"up.activation_bits": jnp.asarray(6.0)},
    )
    x = (
        jnp.zeros((2, 5, 4)).at[:, :2].set(0.5).at[1, 4].set(0.5)
    )  # two rows of 5, of 4 without padding
    y, left = run_hook("soft", context, x, "up")
    np.testing.assert_array_equal(y, x)
    np.testing.assert_allclose(left, [0.4, 0.5])


# Scales of thresholds


def test_strengths_settings_and_their_inverse() -> None:
    ranges = {name: np.asarray([value, 2.0 * value]) for name, value in RANGES.items()}
    strength = np.random.default_rng(4).uniform(size=(2, 9))
    variable = from_strength(strength, ranges)
    np.testing.assert_allclose(to_strength(variable, ranges), strength, atol=1e-9)
    one = np.logaddexp(0.0, from_strength(np.ones((2, 9)), ranges))
    np.testing.assert_allclose(one[:, 0], [3.0, 6.0])
    np.testing.assert_allclose(one[:, 4], 1.0)  # a probability's range is 1
    mixed = np.logaddexp(0.0, from_setting((0.5, 0.1), (2, 9), ranges))
    np.testing.assert_allclose(mixed[1], [0.6, 1.0, 0.5, 8.0, 0.5, 0.5, 0.8, 1.2, 1.4])
    off = from_setting((0.0, 0.0), (2, 9), ranges)
    assert not np.any(stored_thresholds(off[0]))
    assert SCALE is not None and SCALE.settings[0] == (0.0, 0.0)
    assert SCALE.names == PRUNED_SITES and len(SCALE.start_kept) == 9


# Weights


def test_weights_are_pruned_alike_in_training_and_on_the_chip() -> None:
    kernel = np.random.default_rng(5).normal(size=(30, 20)).astype(np.float32)
    relaxation = tiny_model.relaxation()
    fractions = []
    for tau in (1e-12, 0.1, 0.3, 0.31, 1.0, 10.0):
        knobs = {"weight_threshold": threshold_variable(tau)}
        stored = stored_weight(knobs, kernel, "up")
        own = {"weight_threshold": jnp.asarray(knobs["weight_threshold"], jnp.float32)}
        soft, left = soft_on_weight(own, jnp.asarray(kernel), "up", relaxation)
        np.testing.assert_array_equal(soft, stored)
        np.testing.assert_array_equal(stored, np.where(np.abs(kernel) > tau, kernel, 0.0))
        np.testing.assert_allclose(left, np.mean(stored != 0), rtol=1e-6)
        fractions.append(np.mean(stored == 0))
    assert fractions[0] == 0.0 and fractions == sorted(fractions) and fractions[-1] == 1.0
    np.testing.assert_array_equal(stored_weight({}, kernel, "up"), kernel)
    assert soft_on_weight({}, jnp.asarray(kernel), "up", relaxation)[1] == 1.0


def test_gradient_of_the_weight_threshold() -> None:
    kernel = jax.random.normal(jax.random.key(2), (30, 20))
    towards = jax.random.normal(jax.random.key(3), (30, 20))
    tau, temperature = 0.3, 0.3

    def loss(variable: jax.Array) -> jax.Array:
        knobs = {"weight_threshold": variable}
        pruned, _ = soft_on_weight(knobs, kernel, "up", tiny_model.relaxation(temperature))
        return jnp.sum(pruned * towards)

    variable = float(threshold_variable(tau))
    width = temperature * np.std(kernel)
    gate = 1.0 / (1.0 + np.exp(-(np.abs(kernel) - tau) / width))
    wanted = -np.sum(towards * kernel * gate * (1 - gate)) / width
    slope = 1.0 / (1.0 + np.exp(-variable))  # of softplus
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(variable)), wanted * slope, rtol=1e-4)
