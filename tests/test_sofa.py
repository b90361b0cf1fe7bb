"""SOFA: codes of prediction, whole models on the integer path against the emulator and against training, and counts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import existing, tensors
from tiny_policies import policy_of, run_hard, run_soft

from codesign.log_codes import LEADING_ONE_GAIN, leading_one, leading_one_operand
from codesign.mechanisms import MECHANISMS
from codesign.mechanisms.sofa import codes, from_strength, to_strength
from codesign.references import integers
from codesign.references.sofa import reference_segments
from codesign.segments import RADIUS_OFF, SHARE_ONE

VARIANTS = pytest.mark.parametrize("variant", ["patches", "bert", "decoder"])
SOFT_VARIANTS = pytest.mark.parametrize("variant", ["patches", "decoder"])
"""Without padding and with it, all pairs and causal ones: what soft paths tell apart, at two thirds of the compilation."""
SCALE = MECHANISMS["sofa"].thresholds


TILE_BITS = 2.0
"""Segments of four keys."""


# Codes


def test_leading_ones_of_integers_and_of_numbers() -> None:
    whole = np.asarray([0, 1, -1, 5, -3, 6, -4, 127, -128, 32767])
    expected = np.asarray([0, 1, -1, 4, -2, 4, -4, 64, -128, 16384])
    for dtype in (jnp.int32, jnp.float32):
        np.testing.assert_array_equal(leading_one(jnp.asarray(whole, dtype)), expected)
    np.testing.assert_array_equal(integers.leading_one(whole), expected)
    np.testing.assert_array_equal(leading_one(jnp.asarray([0.3, -0.75])), [0.25, -0.5])
    with jax.enable_x64(True):
        np.testing.assert_array_equal(leading_one(jnp.asarray([0.3, -6.5, 0.0])), [0.25, -4.0, 0.0])


def test_a_product_with_a_leading_one_is_half_of_dlzs() -> None:
    """The specification's `dlzs(x, y) = x sign(y) 2^(floor(log2 |y|) + 1)`."""
    for x, y, doubled in ((5, 6, 40), (-3, -4, 24), (7, 1, 14)):
        assert 2 * x * int(leading_one(jnp.asarray(y))) == doubled
    left, right = np.asarray([5, -3, 7]), np.asarray([6, -4, 1])
    assert 2 * left @ integers.leading_one(right) == 78 and left @ right == 49
    y = jnp.arange(1, 32768)
    ratio = np.asarray(2 * leading_one(y) / y)
    assert ratio.min() > 1.0 and ratio.max() == 2.0
    is_power = np.asarray(y & (y - 1) == 0)
    np.testing.assert_array_equal(ratio == 2.0, is_power)
    assert np.mean(ratio) == pytest.approx(1.3865, abs=1e-4)


def test_leading_one_has_the_derivative_of_its_gain() -> None:
    slope = jax.grad(lambda y: jnp.sum(leading_one_operand(y)))(jnp.asarray([5.0, -3.0]))
    np.testing.assert_allclose(slope, LEADING_ONE_GAIN)


def test_the_chain_of_both_predictions() -> None:
    """The specification's example, whose estimates are four times ours before its shift by two."""
    tokens, weights = np.asarray([[10, -4], [3, 7]]), np.asarray([5, -9])
    keys = tokens @ integers.leading_one(weights)
    np.testing.assert_array_equal(keys, [72, -44])
    scores = keys * integers.leading_one(np.asarray(300))
    np.testing.assert_array_equal(scores, [18432, -11264])


@pytest.mark.parametrize("seed", range(4))
def test_one_operand_prediction_recalls_nine_of_ten(seed: int) -> None:
    rng = np.random.default_rng(seed)
    query, key = rng.standard_normal((64, 64)), rng.standard_normal((1024, 64))
    query, key = (np.rint(x / np.abs(x).max() * 32767).astype(np.int64) for x in (query, key))

    def best(scores: np.ndarray) -> np.ndarray:
        return np.argsort(-scores, axis=-1, kind="stable")[:, :256]

    exact, predicted = best(query @ key.T), best(integers.leading_one(query) @ key.T)
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(exact, predicted, strict=True)])
    assert recall == pytest.approx(0.90, abs=0.01)


def test_index_error_of_segments_on_gaussian_rows() -> None:
    """Keys kept by segments that are not among the largest quarter of 1024; the specification's figures."""
    rng, errors = np.random.default_rng(0), []
    for number in (2, 4, 8, 16, 32):
        scores = np.rint(rng.standard_normal((1, 1, 300, 1024)) * 2**40).astype(np.int64)
        exists = np.ones(scores.shape, bool)
        quarter, off = np.asarray([SHARE_ONE // 4]), np.asarray([RADIUS_OFF])
        kept, _ = reference_segments(scores, exists, quarter, off, 1024 // number)
        best, _ = reference_segments(scores, exists, quarter, off, 1024)
        np.testing.assert_array_equal(kept.sum(-1), 256)
        errors.append(100.0 * (1.0 - np.sum(kept & best) / np.sum(best)))
    np.testing.assert_allclose(errors, [2.1, 3.7, 5.6, 8.3, 11.9], atol=0.4)
    assert np.all(np.diff(errors) > 0.0)


def test_codes_of_shares_radii_and_the_shift_of_scores() -> None:
    share = np.asarray([[[0.0, 100.0], [-100.0, 0.0]]])
    # The largest score is 3 * 2^20 codes, which leaves 15 bits of magnitude after 7.
    tensors = {
        "scores": np.asarray([3 * 2.0**20 * 0.5 * 0.25]),
        "query": np.asarray([0.5]),
        "key": np.asarray([0.25]),
    }
    stored = codes({"threshold": share}, tensors)
    np.testing.assert_array_equal(stored["threshold"], [[[512, RADIUS_OFF], [1, 32768]]])
    np.testing.assert_array_equal(stored["score_shift"], [7])


def test_strengths_go_from_all_keys_to_one() -> None:
    strength = np.linspace(0.0, 1.0, 9)
    assert np.all(np.diff(from_strength(strength, {})) < 0.0)
    np.testing.assert_allclose(to_strength(from_strength(strength, {}), {}), strength, atol=1e-3)
    for chosen, share in ((0.0, SHARE_ONE), (1.0, 1)):
        variable = np.full((1, 1, 2), from_strength(np.asarray(chosen), {}))
        one = np.ones((1,))
        stored = codes({"threshold": variable}, {"scores": one, "query": one, "key": one})
        assert stored["threshold"][0, 0, 0] == share


# Whole models


@VARIANTS
def test_integer_path_equals_the_emulator(variant: str) -> None:
    model = tiny_model.random_model(variant)
    _, pairs = existing(model)
    for seed, bits in ((0, 16.0), (1, 9.0)):
        deployment, output = run_hard(
            model, policy_of(model, "sofa", seed=seed, tile_bits=2.0 + seed, bits=bits), "sofa"
        )
        got = tiny_model.emulated(model, deployment, output)
        keep = got["keep"] & pairs[None, None, :, None]
        shares = np.sum(keep, axis=(0, 2, 3, 4, 5)) / (
            np.sum(pairs) * keep.shape[0] * keep.shape[3]
        )
        assert 0.2 < shares[1] < shares[0] < 0.98


@SOFT_VARIANTS
def test_straight_through_decides_as_the_integer_path(variant: str) -> None:
    model = tiny_model.random_model(variant)
    _, pairs = existing(model)
    policy = policy_of(model, "sofa", seed=3, tile_bits=TILE_BITS)
    hard, soft = run_hard(model, policy, "sofa")[1], run_soft(model, policy, "sofa")
    mask = np.broadcast_to(pairs[None, None, :, None], hard.trace["keep"].shape)
    agree = np.asarray(soft.trace["keep"]) == hard.trace["keep"]
    # Float32 rounds a code the other way now and then, and every layer adds to it.
    assert np.mean(agree[mask]) > 0.98
    for key, operation in hard.workload.operations.items():
        other = soft.workload.operations[key]
        np.testing.assert_allclose(other.count, operation.count, rtol=0.08, err_msg=key)
        np.testing.assert_allclose(other.bits_a, operation.bits_a, err_msg=key)
    for key, stream in hard.workload.streams.items():
        np.testing.assert_allclose(
            soft.workload.streams[key].vectors, stream.vectors, rtol=0.08, err_msg=key
        )


@SOFT_VARIANTS
def test_soft_tends_to_the_integer_path(variant: str) -> None:
    model = tiny_model.random_model(variant)
    _, pairs = existing(model)
    policy = policy_of(model, "sofa", seed=4, tile_bits=TILE_BITS)
    _, hard = run_hard(model, policy, "sofa")
    apart = []
    for temperature in (0.5, 1e-4):
        soft = run_soft(model, policy, "sofa", temperature=temperature, straight_through=False)
        count = soft.workload.operations["pv.mac"].count
        apart.append(np.abs(count / hard.workload.operations["pv.mac"].count - 1.0).mean())
        mask = np.broadcast_to(pairs[None, None, :, None], hard.trace["keep"].shape)
        agree = (np.asarray(soft.trace["keep"]) == hard.trace["keep"])[mask]
    assert apart[1] < 0.03 < apart[0]
    assert np.mean(agree) > 0.97


@VARIANTS
def test_all_keys_are_dense_attention_bit_for_bit(variant: str) -> None:
    model = tiny_model.random_model(variant)
    policy = policy_of(model, "sofa", tile_bits=3.0)
    _, whole = run_hard(model, policy, "sofa")
    _, dense = run_hard(model, policy, "dense")
    for name, value in tensors(dense).items():
        np.testing.assert_array_equal(tensors(whole)[name], value, err_msg=name)
    valid, pairs = existing(model)
    assert SCALE is not None
    np.testing.assert_array_equal(SCALE.kept(whole.workload), 1.0)
    tokens = valid.sum(1)
    shape = model.structure
    macs = 2 * tokens * shape.width * shape.head_dim
    generated = whole.workload.operations["generate.mac"].count
    np.testing.assert_array_equal(generated, np.broadcast_to(macs[:, None, None], generated.shape))
    np.testing.assert_array_equal(
        whole.workload.operations["qk.mac"].count[:, 0, 0], pairs.sum((1, 2)) * shape.head_dim
    )


@VARIANTS
def test_counts_are_those_of_a_plain_loop(variant: str) -> None:
    model = tiny_model.random_model(variant)
    deployment, output = run_hard(
        model, policy_of(model, "sofa", seed=5, tile_bits=TILE_BITS), "sofa"
    )
    shape, layers = deployment.structure, deployment.layers
    valid, pairs = existing(model)
    keep = output.trace["keep"] & pairs[None, None, :, None]
    operations, streams = output.workload.operations, output.workload.streams
    for layer in range(shape.num_layers):
        length = 2 ** int(layers["tile_bits"][layer])
        for example in range(len(valid)):
            tokens = int(valid[example].sum())
            wanted_by_any = np.zeros(shape.max_tokens, bool)
            for head in range(shape.num_heads):
                largest, kept = keep[layer, :, example, head]
                share = int(layers["threshold"][layer, head, 0])
                cycles = joins = 0
                for row in range(tokens):
                    for start in range(0, shape.max_tokens, length):
                        there = int(pairs[example, row, start : start + length].sum())
                        number = -(-share * there // SHARE_ONE)
                        cycles += -(-there // 12) * -(-number // 4)
                        joins += there > 0
                wanted = kept.any(axis=0)
                wanted_by_any |= wanted
                expected = {
                    "predict.shift_add": tokens * shape.width * shape.head_dim,
                    "encode.encode": tokens * shape.head_dim,
                    "filter0.shift_add": pairs[example].sum() * shape.head_dim,
                    "select.compare": cycles,
                    "threshold.compare": largest.sum(),
                    "generate.mac": 2 * wanted.sum() * shape.width * shape.head_dim,
                    "qk.mac": kept.sum() * shape.head_dim,
                    "softmax.exp": kept.sum() + joins,
                    "softmax.add": kept.sum() + joins * (shape.head_dim + 1),
                    "softmax.compare": joins,
                    "softmax.multiply": joins * (shape.head_dim + 1),
                    "pv.mac": kept.sum() * shape.head_dim,
                    "output.divide": tokens * shape.head_dim,
                }
                assert operations.keys() == expected.keys()
                for key, count in expected.items():
                    assert operations[key].count[example, layer, head] == count, key
            generated = streams["generate_tokens"].vectors[example, layer, :, 0].sum()
            assert generated == pytest.approx(wanted_by_any.sum())
            blocks = streams["generate_weights"].vectors[example, layer, 0]
            expected_blocks = [
                -(-tokens // 2**level) * 2 * shape.head_dim for level in range(len(blocks))
            ]
            np.testing.assert_array_equal(blocks, expected_blocks)


def test_a_larger_share_never_costs_less() -> None:
    """All counts but those of the prediction; the first layer alone, since later ones see what it lets through."""
    model = tiny_model.random_model("bert")
    counts = []
    for share in (0.1, 0.3, 0.6, 1.0):
        tried = policy_of(model, "sofa", setting=(share, 1.0), tile_bits=4.0)
        workload = run_hard(model, tried, "sofa")[1].workload
        counts.append({name: one.count[:, 0] for name, one in workload.operations.items()})
    fixed = {"predict.shift_add", "encode.encode", "filter0.shift_add", "output.divide"}
    for few, more in itertools.pairwise(counts):
        for name in few:
            assert np.all(few[name] <= more[name]), name
            assert name not in fixed or np.array_equal(few[name], more[name]), name
    for name in counts[0].keys() - fixed - {"softmax.compare", "softmax.multiply"}:
        assert np.sum(counts[0][name]) < np.sum(counts[-1][name]), name


def test_every_knob_has_a_gradient() -> None:
    model = tiny_model.random_model("bert")
    slopes = tiny_model.knob_slopes(
        model, policy_of(model, "sofa", seed=6, tile_bits=TILE_BITS, bits=11.4), "sofa"
    )
    own = "tile_bits"
    for knob in ("threshold", own, "qk_bits", "qkv.weight_bits", "qkv.activation_bits"):
        assert np.all(np.isfinite(slopes[knob])), knob
        assert np.any(slopes[knob] != 0.0), knob
    assert np.all(slopes["threshold"][..., 0] != 0.0)
