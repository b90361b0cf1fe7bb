"""The NumPy emulator: hand examples of the filter, each operation against exact rationals, the whole
against a model in real numbers."""

import functools
import math
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction

import jax
import numpy as np
import pytest
import random_deployment

from codesign.errors import DataError, ExportError, UnknownNameError
from codesign.hw import emulator
from codesign.hw.export import first_difference
from codesign.mechanisms import mechanism_by_name
from codesign.models import vit
from codesign.structure import ModelStructure

# Hand example of two rounds: codes of 4 bits, filter codes of 4 (query), 2 and 4 (key) bits.
HAND_QUERY = [6, -3]
HAND_KEYS = [[7, -8], [4, -4], [1, 2], [-3, 1], [-6, 5], [5, 3]]


def filter_row(
    query: Sequence[int],
    keys: Sequence[Sequence[int]],
    threshold: Sequence[int],
    *,
    query_bits: int = 4,
    key_bits: Sequence[int] = (2, 4),
    qk_bits: int = 4,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and decisions `[R, S]` of one row with all keys valid."""
    scores, keep = emulator.reference_filter(
        np.asarray([[[query]]]),
        np.asarray([[keys]]),
        np.ones((1, len(keys)), bool),
        np.asarray([threshold]),
        query_bits,
        key_bits,
        qk_bits,
    )
    return scores[:, 0, 0, 0], keep[:, 0, 0, 0]


def filter_scores(scores: Sequence[int], threshold: int) -> set[int]:
    """Indices of the keys that one round keeps of given scores (query 1, keys the scores)."""
    _, keep = filter_row(
        [1], [[score] for score in scores], [threshold], query_bits=16, key_bits=[16], qk_bits=16
    )
    return set(np.flatnonzero(keep[0]).tolist())


def random_codes(seed: int, bits: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query and key codes `[2, 3, 20, 16]`, `[2, 3, 33, 16]`, and valid keys `[2, 33]`."""
    rng = np.random.default_rng(seed)
    limit = 2 ** (bits - 1) - 1
    query = np.clip(np.rint(rng.normal(size=(2, 3, 20, 16)) * limit / 3), -limit, limit)
    key = np.clip(np.rint(rng.normal(size=(2, 3, 33, 16)) * limit / 3), -limit, limit)
    valid = rng.random((2, 33)) < 0.8
    valid[:, 5] = True
    return query.astype(np.int64), key.astype(np.int64), valid


def test_slices_are_nested() -> None:
    codes = np.arange(-32767, 32768)
    four, two = codes >> 12, codes >> 14
    low = four - 4 * two
    assert low.min() == 0 and low.max() == 3
    assert four.min() == -8 and four.max() == 7 and two.min() == -2 and two.max() == 1


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("threshold", "kept"),
    # Round 1 over scores 66, 36, 21 (sum 123, mean 41): 128 * 3 * S = 25344, 13824, 8064 against
    # 32 * 3 * 66 + 96 * 123 = 18144; 32 * 3 * 21 + 96 * 123 = 13824 (strict); 40: 13344.
    [(32, {0}), (-32, {0}), (-40, {0, 1})],
)
def test_hand_example(threshold: int, kept: set[int]) -> None:
    scores, keep = filter_row(HAND_QUERY, HAND_KEYS, [0, threshold])
    assert scores[0].tolist() == [12, 9, 0, -6, -15, 6]
    assert scores[1, [0, 1, 5]].tolist() == [66, 36, 21]
    assert np.flatnonzero(keep[0]).tolist() == [0, 1, 5]
    assert set(np.flatnonzero(keep[1]).tolist()) == kept


def test_second_round_reuses_the_first() -> None:
    query, keys = np.asarray(HAND_QUERY), np.asarray(HAND_KEYS)
    scores, _ = filter_row(HAND_QUERY, HAND_KEYS, [-128, -128])
    low = keys - 4 * (keys >> 2)
    np.testing.assert_array_equal(scores[1], 4 * scores[0] + low @ query)


def test_negative_sum() -> None:
    # S = -15, -6, 0, -1 and a = -40: q = -6, rest 2, (-600 - 528 + 44) >> 7 = -9.
    assert filter_scores([-15, -6, 0, -1], -40) == {1, 2, 3}


def test_limits() -> None:
    query, key, valid = random_codes(0)
    _, keep = emulator.reference_filter(query, key, valid, np.full((3, 2), -128), 4, [2, 4], 16)
    np.testing.assert_array_equal(keep, np.broadcast_to(valid[:, None, None, :], keep.shape))
    assert filter_scores([3, 3, 3, 3], 0) == {0}
    assert filter_scores([1, 5, 5, 2], -1) == {1, 2}
    assert filter_scores([0, -40, 100, 7], 127) == {2}
    # (127 * 100 + 1 * 58) >> 7 = 99: a score of 99 is not above it, a theta of 98 lets it stay.
    assert filter_scores([-41, 99, 100, -100], 127) == {2}
    assert filter_scores([-400, 99, 100, -100], 127) == {1, 2}


@pytest.mark.parametrize("seed", range(4))
def test_keep_equals_the_exact_rational_form(seed: int) -> None:
    query, key, valid = random_codes(seed, bits=12)
    rng = np.random.default_rng(100 + seed)
    threshold = rng.integers(-127, 128, size=(3, 2))
    scores, keep = emulator.reference_filter(query, key, valid, threshold, 5, [3, 6], 12)
    alive = np.broadcast_to(valid[:, None, None, :], keep.shape[1:])
    for number in range(2):
        for row in np.ndindex(keep.shape[1:-1]):
            alpha = int(threshold[row[1], number])
            indices = np.flatnonzero(alive[row]).tolist()
            row_scores = {j: int(scores[number][row][j]) for j in indices}
            values = list(row_scores.values())
            extreme = alpha * max(values) if alpha >= 0 else -alpha * min(values)
            right = len(values) * extreme + (128 - abs(alpha)) * sum(values)
            kept = {j for j, value in row_scores.items() if 128 * len(values) * value > right}
            kept.add(next(j for j, value in row_scores.items() if value == max(values)))
            assert set(np.flatnonzero(keep[number][row]).tolist()) == kept
        alive = keep[number]


@pytest.mark.parametrize("seed", range(2))
def test_filter_is_monotone(seed: int) -> None:
    query, key, valid = random_codes(seed)
    before = None
    for alpha in range(-128, 128, 15):
        _, keep = emulator.reference_filter(query, key, valid, np.full((3, 1), alpha), 4, [4], 16)
        assert keep.any(axis=-1).all()
        if before is not None:
            assert not np.any(keep & ~before)
        before = keep
    _, keep = emulator.reference_filter(query, key, valid, np.zeros((3, 2), int), 4, [2, 4], 16)
    assert not np.any(keep[1] & ~keep[0])
    assert not np.any(keep[0] & ~valid[:, None, None, :])


@pytest.mark.parametrize("alpha", [-100, -3, 0, 60])
def test_filter_ignores_factor_and_offset(alpha: int) -> None:
    scores = np.random.default_rng(alpha + 200).integers(-300, 300, size=40)
    kept = filter_scores(scores.tolist(), alpha)
    assert filter_scores((scores * 7).tolist(), alpha) == kept
    assert filter_scores((scores - 1234).tolist(), alpha) == kept


def test_kept_fraction_and_recall_of_two_rounds_at_zero() -> None:
    fractions, recalls = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        query, key = rng.normal(size=(256, 64)), rng.normal(size=(512, 64))
        codes = [np.rint(x / np.abs(x).max() * 32767).astype(int)[None, None] for x in (query, key)]
        _, keep = emulator.reference_filter(
            codes[0], codes[1], np.ones((1, 512), bool), np.zeros((1, 2), int), 4, [2, 4], 16
        )
        kept = keep[:, 0, 0]
        fractions.append(kept.mean(axis=(1, 2)))
        order = np.argsort(np.argsort(-(query @ key.T), axis=-1), axis=-1)
        top = order < kept[1].sum(axis=-1, keepdims=True)
        recalls.append((top & kept[1]).sum() / kept[1].sum())
    np.testing.assert_allclose(np.mean(fractions, axis=0), [0.500, 0.238], atol=0.01)
    assert np.mean(recalls) == pytest.approx(0.82, abs=0.01)


def test_round_shift_is_exact() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(-(2**53), 2**53, size=2000)
    shifts = rng.integers(0, 63, size=2000)
    ties = np.asarray([(2 * k + 1) << 9 for k in range(-6, 6)])
    values = np.concatenate([values, ties, [-1, 0, 1, 2**52, -(2**52)]])
    shifts = np.concatenate([shifts, np.full(12, 10), [62, 62, 62, 53, 53]])
    got = emulator.round_shift(values, shifts)
    wanted = [round(Fraction(int(v), 2 ** int(s))) for v, s in zip(values, shifts, strict=True)]
    assert got.tolist() == wanted


def test_products_beyond_float64_are_refused() -> None:
    with pytest.raises(ExportError, match=r"2\*\*53"):
        emulator.requantise(np.asarray([2**40]), np.asarray([2**14]), 3)
    # The largest value and the largest multiplier do not meet: no product reaches the limit.
    assert emulator.requantise(np.asarray([2**40, 1]), np.asarray([1, 2**14]), 0).tolist() == [
        2**40,
        2**14,
    ]


def test_normalisation_against_rationals() -> None:
    rng = np.random.default_rng(0)
    residual = rng.integers(-32767, 32768, size=(1, 6, 48))
    residual[0, 0] = 17  # no variance: the bias alone remains
    gain, bias = rng.integers(-600000, 600000, 48), rng.integers(-(2**34), 2**34, 48)
    got = emulator.normalise(residual, gain, bias, 1000, 8)
    for token in range(6):
        values = [int(v) for v in residual[0, token]]
        total = sum(values)
        variance = 48 * sum(v * v for v in values) - total**2 + 1000
        for c, value in enumerate(values):
            normal = round((48 * value - total) / math.sqrt(variance) * 2**14)
            wanted = round(Fraction(normal * int(gain[c]) + int(bias[c]), 2**30))
            assert got[0, token, c] == max(-127, min(127, wanted))


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_softmax_codes_are_close_to_the_softmax(bits: int) -> None:
    rng = np.random.default_rng(bits)
    scores = rng.integers(-(2**20), 2**20, size=(2, 2, 8, 40))
    kept = rng.random(scores.shape) < 0.5
    kept[..., 3] = True
    mantissa, shift = 20000, 22
    codes = emulator.softmax_codes(scores, kept, mantissa, shift, bits)
    octaves = np.where(kept, scores * (mantissa / 2**shift) / 4096, -np.inf)
    weights = 2.0 ** (octaves - octaves.max(axis=-1, keepdims=True))
    wanted = weights / weights.sum(axis=-1, keepdims=True) * (2 ** (bits - 1) - 1)
    assert not codes[~kept].any()
    # Half a step of rounding; table steps of 2**(1/4096) and 2**-13 are within 0.1 %; the shift of
    # an exponential drops less than 2**-16, half a step of 16 bits.
    np.testing.assert_allclose(codes, wanted, rtol=1e-3, atol=0.51 + 2.0 ** (bits - 17))


def test_softmax_by_hand() -> None:
    # One key: E = 65530 (2**16 * 2**(-0.5/4096)), e = 15, Z >> 3 = 8191, R = 2**28/8191.5 = 32770;
    # 65530 * 32770 * 127 / 2**31 = 127.00.
    one = emulator.softmax_codes(np.asarray([[[[5, 9]]]]), np.asarray([[[[True, False]]]]), 1, 0, 8)
    assert emulator.exp_table()[0] == 65530 and emulator.reciprocal_table()[8191 - 4096] == 32770
    assert one.ravel().tolist() == [127, 0]
    # Two keys one octave apart: 2/3 and 1/3 of 127 are 84.7 and 42.3.
    two = emulator.softmax_codes(
        np.asarray([[[[8192, 4096]]]]), np.ones((1, 1, 1, 2), bool), 1, 0, 8
    )
    assert two.ravel().tolist() == [85, 42]


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.smoke
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mechanism": "dense", "num_rounds": 0},
        {"channels": 3, "stride": 1, "padding": 0},
        {"num_rounds": 1, "num_heads": 3, "num_layers": 1},
    ],
)
def test_emulator_follows_the_real_model(changes: dict[str, object]) -> None:
    shape = random_deployment.structure(**changes)
    deployment, pixels = random_deployment.build(shape, attention_bits=14, threshold=-20)
    result = emulator.emulate(shape, deployment.layers, deployment.ends, pixels)
    assert {name: values.shape for name, values in result.items()} == shape.tensor_shapes(8)
    keep = result["keep"][:, -1] if shape.num_rounds else None
    seen = random_deployment.run_float(shape, deployment.parameters, pixels, keep)

    scale = deployment.scales["residual"]
    assert relative_error(result["embedded"] * scale, seen["residual"][0]) < 0.01
    # Quantisation noise of 8 bits, about 1 % per linear layer, and clipping: ranges are those
    # of the dense model.
    for layer in range(shape.num_layers):
        attended, residual = seen["residual"][2 * layer + 1 : 2 * layer + 3]
        assert relative_error(result["attended"][layer] * scale, attended) < 0.06
        assert relative_error(result["residual"][layer] * scale, residual) < 0.06
        scales = deployment.scales["layers"][layer]
        for name in ("query", "key", "value", "context", "hidden"):
            got = result[name][layer] * scales[name]
            assert relative_error(got, seen["layers"][layer][name]) < 0.06, name
    logits = result["logits"] * deployment.scales["logits"] / shape.num_tokens
    assert relative_error(logits, seen["logits"]) < 0.06
    assert np.corrcoef(logits.ravel(), seen["logits"].ravel())[0, 1] > 0.998
    if shape.num_rounds:
        assert 0.2 < result["keep"][:, -1].mean() < 0.9


def test_the_distance_from_the_real_model_is_quantisation_noise() -> None:
    errors = {}
    shape = random_deployment.structure(mechanism="dense", num_rounds=0)
    for bits in (5, 8):
        deployment, pixels = random_deployment.build(shape, linear_bits=bits, attention_bits=16)
        result = emulator.emulate(shape, deployment.layers, deployment.ends, pixels)
        seen = random_deployment.run_float(shape, deployment.parameters, pixels)
        logits = result["logits"] * deployment.scales["logits"] / shape.num_tokens
        errors[bits] = relative_error(logits, seen["logits"])
    # Three bits more divide the step by 8.
    assert errors[8] < errors[5] / 4


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({"num_heads": 3}, 16),
        ({"channels": 3, "num_rounds": 1, "stride": 1}, 8),
        ({"mechanism": "dense", "num_rounds": 0}, 12),
    ],
)
def test_jax_path_agrees_in_every_bit(changes: dict[str, object], bits: int) -> None:
    shape = random_deployment.structure(**changes)
    threshold = np.random.default_rng(bits).integers(-100, 60, (shape.num_heads, shape.num_rounds))
    deployment, pixels = random_deployment.build(
        shape, seed=bits, attention_bits=bits, threshold=threshold
    )
    tables = {
        "exp_table": emulator.exp_table(),
        "reciprocal_table": emulator.reciprocal_table(),
    }
    hard_fn = functools.partial(
        vit.apply_hard,
        structure=shape,
        mechanism=mechanism_by_name(shape.mechanism),
        tracing=True,
    )
    with jax.enable_x64(True):
        output = jax.jit(hard_fn)(deployment.layers, deployment.ends | tables, pixels)
    expected = emulator.emulate(shape, deployment.layers, deployment.ends, pixels)
    assert first_difference(expected, output.trace | {"logits": output.logits}) is None


def test_round_off_everywhere_is_dense() -> None:
    sparse = random_deployment.structure()
    dense = random_deployment.structure(mechanism="dense", num_rounds=0)
    filtered, pixels = random_deployment.build(sparse, threshold=-128)
    plain, _ = random_deployment.build(dense)
    got = emulator.emulate(sparse, filtered.layers, filtered.ends, pixels)
    wanted = emulator.emulate(dense, plain.layers, plain.ends, pixels)
    for name in set(emulator.TENSORS) - {"scores", "keep"}:
        np.testing.assert_array_equal(got[name], wanted[name])


def test_an_example_does_not_depend_on_its_batch() -> None:
    shape = random_deployment.structure()
    deployment, pixels = random_deployment.build(shape)
    batch = emulator.emulate(shape, deployment.layers, deployment.ends, pixels)
    alone = emulator.emulate(shape, deployment.layers, deployment.ends, pixels[3:4])
    for name, shape_alone in shape.tensor_shapes(1).items():
        axis = next(i for i, n in enumerate(shape.tensor_shapes(8)[name]) if n != shape_alone[i])
        np.testing.assert_array_equal(np.take(batch[name], [3], axis=axis), alone[name])


def test_padded_tokens_change_nothing() -> None:
    shape = random_deployment.structure()
    deployment, pixels = random_deployment.build(shape)
    valid = np.ones((len(pixels), shape.num_tokens), bool)
    valid[:, -2:] = False
    # With stride 2 and patches of 4 the last pixels lie in the last two tokens among others; so the
    # positions of padded tokens are changed instead of pixels.
    other = dict(deployment.ends)
    other["position"] = deployment.ends["position"].copy()
    other["position"][-2:] += 500
    first = emulator.emulate(shape, deployment.layers, deployment.ends, pixels, valid)
    second = emulator.emulate(shape, deployment.layers, other, pixels, valid)
    np.testing.assert_array_equal(first["logits"], second["logits"])
    assert not first["keep"][..., -2:].any() and not first["probabilities"][..., -2:].any()
    np.testing.assert_array_equal(first["residual"][:, :, :-2], second["residual"][:, :, :-2])
    assert np.any(first["residual"] != second["residual"])


def test_selected_tensors_only() -> None:
    shape = random_deployment.structure()
    deployment, pixels = random_deployment.build(shape)
    result = emulator.emulate(
        shape, deployment.layers, deployment.ends, pixels, tensors=("logits", "keep")
    )
    assert list(result) == ["keep", "logits"]
    with pytest.raises(UnknownNameError, match="'kept' is not one of"):
        emulator.emulate(shape, deployment.layers, deployment.ends, pixels, tensors=["kept"])


def test_malformed_input_is_named() -> None:
    shape = random_deployment.structure()
    deployment, pixels = random_deployment.build(shape)
    layers, ends = deployment.layers, deployment.ends
    broken = {
        "`layers/qkv_bias` is missing": {k: v for k, v in layers.items() if k != "qkv_bias"},
        "`layers/extra` does not belong": layers | {"extra": np.zeros(2, int)},
        r"`layers/out_weight` must have shape \(2, 16, 16\)": layers
        | {"out_weight": layers["out_weight"][:, :-1]},
        "`layers/out_bias` must hold integers": layers | {"out_bias": layers["out_bias"] * 1.0},
        r"`layers/threshold` must lie in \[-128, 127\]": layers
        | {"threshold": layers["threshold"] + 200},
        "`layers/key_bits` must rise": layers | {"key_bits": layers["key_bits"] * 0 + 4},
        "`layers/gelu_table` holds codes wider": layers
        | {"down_activation_bits": layers["down_activation_bits"] - 1},
        "`layers/up_weight` holds codes wider than `up_weight_bits`": layers
        | {"up_weight_bits": layers["up_weight_bits"] - 1},
    }
    for message, arrays in broken.items():
        with pytest.raises(ExportError, match=message):
            emulator.emulate(shape, arrays, ends, pixels)
    with pytest.raises(DataError, match="`pixels` must be integers"):
        emulator.emulate(shape, layers, ends, pixels * 1.0)
    with pytest.raises(DataError, match="at least one token"):
        emulator.emulate(shape, layers, ends, pixels, np.zeros((8, 9), bool))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mechanism": "topk"}, "one of dense, energon"),
        ({"num_rounds": 0}, "`num_rounds` must be 0 for `dense`"),
        ({"width": 0}, "`width` must be at least 1"),
        ({"patch_size": 9}, "`patch_size` must fit the padded image"),
    ],
)
def test_structure_is_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_deployment.structure(**changes)


def test_structure_sizes() -> None:
    # 6 pixels, 1 of padding, patches of 4 at stride 2: starts 0, 2, 4 of 8.
    shape: ModelStructure = random_deployment.structure()
    assert (shape.grid_size, shape.num_tokens, shape.patch_values) == (3, 9, 16)


def test_imports_without_jax() -> None:
    code = (
        "import sys; sys.modules['jax'] = None; sys.modules['flax'] = None\n"
        "import codesign.hw.emulator, codesign.structure\n"
        "assert 'jaxlib' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
