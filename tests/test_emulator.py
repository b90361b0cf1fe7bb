"""The NumPy emulator: each operation against exact rationals, the whole against a model in real numbers,
and what padding, causality and a single token must mean."""

import math
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import random_deployment
from random_deployment import Arrays, Deployment

from codesign.errors import CodesignError, DataError, ExportError, UnknownNameError
from codesign.hw import emulator
from codesign.references import tensor_names, tensor_shapes
from codesign.references.acceltran import acceltran
from codesign.references.integers import exp_table, limit

EVERY_MODEL = pytest.mark.parametrize("variant", random_deployment.VARIANTS)
EVERY_MECHANISM = pytest.mark.parametrize("mechanism", random_deployment.MECHANISMS)
EVERY_TEXT_MODEL = pytest.mark.parametrize("variant", ["bert", "pooler", "decoder"])


def run(deployment: Deployment, inputs: Arrays, **ends: np.ndarray) -> Arrays:
    return emulator.emulate(deployment.structure, deployment.layers, deployment.ends | ends, inputs)


def test_normalisation_against_rationals() -> None:
    rng = np.random.default_rng(0)
    residual = rng.integers(-32767, 32768, size=(1, 6, 48))
    residual[0, 0] = 17  # no variance: the bias alone remains
    gain, bias = rng.integers(-600000, 600000, 48), rng.integers(-(2**34), 2**34, 48)
    got = emulator.normalise(residual, gain, bias, 1000, 127)
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
    assert exp_table()[0] == 65530 and emulator.reciprocal_table()[8191 - 4096] == 32770
    assert one.ravel().tolist() == [127, 0]
    # Two keys one octave apart: 2/3 and 1/3 of 127 are 84.7 and 42.3.
    two = emulator.softmax_codes(
        np.asarray([[[[8192, 4096]]]]), np.ones((1, 1, 1, 2), bool), 1, 0, 8
    )
    assert two.ravel().tolist() == [85, 42]


def test_a_row_without_keys_has_no_probabilities() -> None:
    scores = np.asarray([[[[3, -9], [5, 5]]]])
    kept = np.asarray([[[[False, False], [True, True]]]])
    codes = emulator.softmax_codes(scores, kept, 1, 0, 8)
    # Two equal keys: Z = 131060, e = 16, Z >> 4 = 8191, R = 32770; 65530 * 32770 * 127 / 2**32 = 63.498.
    assert codes[0, 0, 0].tolist() == [0, 0] and codes[0, 0, 1].tolist() == [63, 63]


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.smoke
@EVERY_MODEL
@EVERY_MECHANISM
def test_emulator_follows_the_real_model(variant: str, mechanism: str) -> None:
    if mechanism == "spatten":
        pytest.skip(
            "rows of tokens that are gone mean nothing: compared with the training path elsewhere"
        )
    shape = random_deployment.structure(variant, mechanism)
    check_against_the_real_model(shape)


@pytest.mark.parametrize(
    "changes",
    [
        {"input": random_deployment.patches(channels=3, stride=1, padding=0)},
        {"num_rounds": 1, "num_heads": 3, "num_layers": 1},
        {"activation": "relu", "norm": "post", "pooling": "first", "pooler": "relu"},
        {"is_causal": True, "pooling": "all"},
    ],
)
def test_other_sizes_and_wirings(changes: dict[str, Any]) -> None:
    check_against_the_real_model(random_deployment.structure(**changes))


def check_against_the_real_model(shape: random_deployment.ModelStructure) -> None:
    deployment, inputs = random_deployment.build(shape, attention_bits=14, threshold=-20)
    if shape.mechanism == "fact":  # Rows of four bits are no part of the real model.
        deployment.layers["importance"][:] = 0
    result = run(deployment, inputs)
    shapes = tensor_shapes(shape, 8, shape.max_tokens)
    assert {name: values.shape for name, values in result.items()} == shapes
    seen = random_deployment.run_float(shape, deployment.parameters, inputs, result)
    assert (
        relative_error(result["embedded"] * deployment.scales["residual"], seen["embedded"]) < 0.01
    )
    # Quantisation noise of 8 bits, about 1 % per linear layer, and clipping: ranges are those
    # of the dense model.
    compared = 0
    for layer, scales in enumerate(deployment.scales["layers"]):
        # Of bits that a key's planes leave out every score of a row loses about as much, which no softmax notices.
        left_out = {"raw_scores"} if shape.mechanism == "bitserial" else set()
        for name in scales.keys() & result.keys() - left_out:
            got = result[name][layer] * scales[name]
            assert relative_error(got, seen["layers"][layer][name]) < 0.06, name
            compared += 1
    own = 4 if shape.mechanism == "acceltran" else 0
    assert compared == shape.num_layers * (8 + own)
    logits = random_deployment.real_logits(deployment, result["logits"], inputs)
    assert relative_error(logits, seen["logits"]) < 0.06
    assert np.corrcoef(logits.ravel(), seen["logits"].ravel())[0, 1] > 0.998
    if "keep" in result:
        assert 0.1 < result["keep"][:, -1].mean() < 0.9
    if shape.mechanism == "acceltran":
        assert 0.25 < (result["raw_scores"] == 0).mean() < 0.45


def test_the_distance_from_the_real_model_is_quantisation_noise() -> None:
    errors = {}
    shape = random_deployment.structure(mechanism="dense")
    for bits in (5, 8):
        deployment, inputs = random_deployment.build(shape, linear_bits=bits, attention_bits=16)
        seen = random_deployment.run_float(shape, deployment.parameters, inputs)
        logits = run(deployment, inputs)["logits"]
        real = random_deployment.real_logits(deployment, logits, inputs)
        errors[bits] = relative_error(real, seen["logits"])
    # Three bits more divide the step by 8.
    assert errors[8] < errors[5] / 4


def same_but_own(got: Arrays, wanted: Arrays) -> None:
    assert wanted.keys() <= got.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)


@EVERY_MODEL
def test_round_off_everywhere_is_dense(variant: str) -> None:
    shape = random_deployment.structure(variant)
    filtered, inputs = random_deployment.build(shape, threshold=-128)
    plain, _ = random_deployment.build(random_deployment.structure(variant, "dense"))
    same_but_own(run(filtered, inputs), run(plain, inputs))


@EVERY_MODEL
def test_threshold_0_prunes_nothing(variant: str) -> None:
    shape = random_deployment.structure(variant, "acceltran")
    pruned, inputs = random_deployment.build(shape)
    pruned.layers["threshold"][:] = 0
    plain, _ = random_deployment.build(random_deployment.structure(variant, "dense"))
    same_but_own(run(pruned, inputs), run(plain, inputs))


@pytest.mark.parametrize("variant", ["patches", "pooler"])
@pytest.mark.parametrize(("place", "name"), list(enumerate(acceltran.decision_tensors)))
def test_each_threshold_prunes_its_tensor(variant: str, place: int, name: str) -> None:
    deployment, inputs = random_deployment.build(random_deployment.structure(variant, "acceltran"))
    threshold = deployment.layers["threshold"]
    threshold[:] = 0
    before = run(deployment, inputs)
    code = int(np.median(np.abs(before[name][0])))
    threshold[0, place] = code
    after = run(deployment, inputs)
    # All that the first layer computes before is as it was.
    for earlier in list(before)[1 : list(before).index(name)]:
        np.testing.assert_array_equal(after[earlier][0], before[earlier][0])
    wanted = np.where(np.abs(before[name][0]) > code, before[name][0], 0)
    assert np.any(wanted != before[name][0])
    np.testing.assert_array_equal(after[name][0], wanted)


@pytest.mark.parametrize("variant", ["patches", "decoder"])
def test_a_large_threshold_leaves_the_residual_stream_alone(variant: str) -> None:
    deployment, inputs = random_deployment.build(random_deployment.structure(variant, "acceltran"))
    deployment.layers["threshold"][:] = 2**40
    result = run(deployment, inputs)
    for name in ("query", "context", "attention_branch", "gelu", "ffn_branch"):
        assert not result[name].any()
    for name in ("attended", "residual"):
        for layer in range(2):
            np.testing.assert_array_equal(result[name][layer], result["embedded"])


def test_a_pruned_score_is_logit_0_not_a_dropped_key() -> None:
    deployment, inputs = random_deployment.build(random_deployment.structure("bert", "acceltran"))
    deployment.layers["threshold"][:] = 0
    deployment.layers["threshold"][:, 3] = 2**40
    result = run(deployment, inputs)
    assert not result["raw_scores"].any() and result["query"].any()
    # Equal logits: every existing key gets 1/n, within the tables' steps.
    share = int(limit(deployment.layers["qk_bits"][0])) / inputs["valid"].sum(axis=1)
    wanted = inputs["valid"] * share[:, None]
    got = result["probabilities"]
    np.testing.assert_allclose(got, np.broadcast_to(wanted[:, None, None], got.shape), atol=0.7)


def test_an_example_does_not_depend_on_its_batch() -> None:
    deployment, inputs = random_deployment.build(random_deployment.structure())
    batch = run(deployment, inputs)
    alone = run(deployment, {"pixels": inputs["pixels"][3:4]})
    check_part(batch, 3, alone)


def check_part(batch: Arrays, example: int, alone: Arrays) -> None:
    """The tensors of a batch of 8 hold those of one example, which may be shorter."""
    for name, values in alone.items():
        axis = next(i for i, n in enumerate(batch[name].shape) if n == 8 and values.shape[i] == 1)
        own = np.take(batch[name], [example], axis=axis)
        cut = own[tuple(slice(length) for length in values.shape)]
        np.testing.assert_array_equal(cut, values, err_msg=name)


@EVERY_TEXT_MODEL
@EVERY_MECHANISM
@pytest.mark.parametrize("example", [0, 3, 7])
def test_alone_and_in_a_padded_batch(variant: str, mechanism: str, example: int) -> None:
    deployment, inputs = random_deployment.build(random_deployment.structure(variant, mechanism))
    length = int(inputs["valid"][example].sum())
    assert {0: length == 10, 3: 1 < length < 10, 7: length == 1}[example]
    alone = run(deployment, {"tokens": inputs["tokens"][example : example + 1, :length]})
    check_part(run(deployment, inputs), example, alone)
    # Of one token there is one key: all attention goes there, but in heads that are gone.
    if length == 1 and mechanism not in ("acceltran", "spatten"):
        assert (alone["probabilities"] == limit(12)).all()


@EVERY_TEXT_MODEL
@EVERY_MECHANISM
def test_what_stands_in_the_padding_changes_nothing(variant: str, mechanism: str) -> None:
    deployment, inputs = random_deployment.build(random_deployment.structure(variant, mechanism))
    valid = inputs["valid"]
    other = np.where(valid, inputs["tokens"], (inputs["tokens"] + 7) % 23)
    first = run(deployment, inputs)
    second = run(deployment, {"tokens": other, "valid": valid})
    for name in ("embedded", "residual"):
        np.testing.assert_array_equal(first[name][..., valid, :], second[name][..., valid, :])
        assert np.any(first[name] != second[name])
    is_per_token = variant == "decoder"
    np.testing.assert_array_equal(
        first["logits"][valid] if is_per_token else first["logits"],
        second["logits"][valid] if is_per_token else second["logits"],
    )
    to_padding = np.broadcast_to(~valid[:, None, None, :], first["probabilities"].shape[1:])
    assert not first["probabilities"][:, to_padding].any()


@EVERY_MECHANISM
def test_the_future_changes_nothing_before_it(mechanism: str) -> None:
    deployment, inputs = random_deployment.build(random_deployment.structure("decoder", mechanism))
    tokens, changed = inputs["tokens"], 6
    other = tokens.copy()
    other[:, changed:] = (other[:, changed:] + 5) % 23
    first, second = (run(deployment, {"tokens": numbers}) for numbers in (tokens, other))
    for name, values in first.items():
        # The second axis from the end is that of the token; scores are there of all pairs.
        rows = (..., slice(changed), slice(changed if "scores" in name else None))
        if name.endswith("source") or name in (
            "heads",
            "tokens",
            "one_hot",
            "ffn_full",
        ):  # one number per token
            rows = (..., slice(changed))
        np.testing.assert_array_equal(values[rows], second[name][rows], err_msg=name)
        # Tokens of a causal model all live on.
        assert np.any(values != second[name]) or name == "tokens", name
    is_future = np.triu(np.ones((10, 10), bool), k=1)
    assert not first["probabilities"][..., is_future].any()
    # The first token sees itself alone.
    if mechanism not in ("acceltran", "spatten"):
        assert (first["probabilities"][..., 0, 0] == limit(12)).all()


def test_a_bidirectional_model_sees_the_future() -> None:
    deployment, inputs = random_deployment.build(random_deployment.structure("bert", "dense"))
    tokens = inputs["tokens"]
    other = tokens.copy()
    other[:, -1] = (other[:, -1] + 5) % 23
    first, second = (run(deployment, {"tokens": numbers}) for numbers in (tokens, other))
    assert np.any(first["residual"][0, :, 0] != second["residual"][0, :, 0])


def test_embeddings_by_hand() -> None:
    shape = random_deployment.structure("decoder", "dense")
    deployment, inputs = random_deployment.build(shape)
    ends = deployment.ends
    ends["token"][4, 2], ends["position"][1, 2] = 30000, 4000  # beyond 16 bits: saturated
    result = run(deployment, {"tokens": np.asarray([[3, 4]])})
    wanted = ends["token"][[3, 4]] + ends["position"][:2]
    assert wanted[1, 2] == 34000
    wanted[1, 2] = 32767
    np.testing.assert_array_equal(result["embedded"], wanted[None])

    shape = random_deployment.structure("prefix", "dense")
    deployment, inputs = random_deployment.build(shape)
    embedded = run(deployment, inputs)["embedded"]
    assert shape.max_tokens == embedded.shape[1] == 11
    # The two learned tokens are rows of `position` alone.
    np.testing.assert_array_equal(embedded[5, :2], deployment.ends["position"][:2])
    plain = run(deployment, inputs, position=0 * deployment.ends["position"])["embedded"]
    assert not plain[:, :2].any() and plain[:, 2:].any(axis=(0, 2)).all()


def test_the_pooler_reads_the_first_token_only() -> None:
    deployment, inputs = random_deployment.build(random_deployment.structure("pooler", "dense"))
    result = run(deployment, inputs)
    ends = deployment.ends
    code = np.rint(
        result["residual"][-1, :, 0]
        * (ends["pool_enter_mantissa"] / 2.0 ** ends["pool_enter_shift"])
    )
    products = np.clip(code, -127, 127) @ ends["pool_weight"]
    codes = np.rint(
        (256 * products + ends["pool_bias"]) * ends["pool_mantissa"] / 2.0 ** ends["pool_shift"]
    )
    hidden = ends["pool_table"][np.clip(codes, -511, 511).astype(int) + 511]
    wanted = 256 * (hidden @ ends["head_weight"]) + ends["head_bias"]
    np.testing.assert_array_equal(result["logits"], wanted)


def test_selected_tensors_only() -> None:
    shape = random_deployment.structure()
    deployment, inputs = random_deployment.build(shape)
    layers, ends = deployment.layers, deployment.ends
    result = emulator.emulate(shape, layers, ends, inputs, tensors=("logits", "keep"))
    assert list(result) == ["keep", "logits"]
    for name in ("kept", "raw_scores"):
        with pytest.raises(UnknownNameError, match=f"'{name}' is not one of"):
            emulator.emulate(shape, layers, ends, inputs, tensors=[name])
    assert "raw_scores" in tensor_names(random_deployment.structure(mechanism="acceltran"))


def test_arrays_may_be_narrow() -> None:
    deployment, inputs = random_deployment.build(random_deployment.structure("bert"))

    def narrowed(arrays: Arrays) -> Arrays:
        return {name: a.astype(np.min_scalar_type(-abs(a).max() - 1)) for name, a in arrays.items()}

    layers, ends = narrowed(deployment.layers), narrowed(deployment.ends)
    assert layers["qkv_weight"].dtype == np.int8 and ends["token"].dtype == np.int16
    result = emulator.emulate(deployment.structure, layers, ends, inputs)
    same_but_own(result, run(deployment, inputs))


def test_malformed_deployment_is_named() -> None:
    shape = random_deployment.structure()
    deployment, inputs = random_deployment.build(shape)
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
        "`layers/activation_table` holds codes wider": layers
        | {"down_activation_bits": layers["down_activation_bits"] - 1},
        "`layers/up_weight` holds codes wider than `up_weight_bits`": layers
        | {"up_weight_bits": layers["up_weight_bits"] - 1},
    }
    for message, arrays in broken.items():
        with pytest.raises(ExportError, match=message):
            emulator.emulate(shape, arrays, ends, inputs)
    pruned = random_deployment.structure("pooler", "acceltran")
    deployment, inputs = random_deployment.build(pruned)
    layers, ends = deployment.layers, deployment.ends
    with pytest.raises(ExportError, match=r"`layers/threshold` must lie in \[0,"):
        emulator.emulate(pruned, layers | {"threshold": layers["threshold"] - 10**6}, ends, inputs)
    with pytest.raises(ExportError, match="`ends/pool_table` holds codes wider"):
        emulator.emulate(pruned, layers, ends | {"pool_table": ends["pool_table"] + 1}, inputs)
    # -128 is no code of 8 bits, though it fits the type.
    lowest = np.full(ends["pool_table"].shape, -128, np.int8)
    with pytest.raises(ExportError, match="`ends/pool_table` holds codes wider"):
        emulator.emulate(pruned, layers, ends | {"pool_table": lowest}, inputs)


@pytest.mark.parametrize(
    ("variant", "inputs", "message"),
    [
        ("patches", {"pixels": np.zeros((2, 6, 6))}, "`pixels` must be integers"),
        ("patches", {"pixels": np.zeros((2, 5, 6), int)}, r"shape \[B, 6, 6, 1\]"),
        ("prefix", {"pixels": np.zeros((2, 6, 6), int)}, r"shape \[B, 6, 6, 3\]"),
        ("patches", {"tokens": np.zeros((2, 3), int)}, "input `pixels` is missing"),
        ("patches", {"pixels": np.zeros((2, 6, 6), int), "valid": 1}, "input `valid` is unknown"),
        ("bert", {"valid": np.ones((2, 3), bool)}, "input `tokens` is missing"),
        ("bert", {"tokens": np.zeros((2, 3))}, "`tokens` must be integers of shape"),
        ("bert", {"tokens": np.zeros(3, int)}, "`tokens` must be integers of shape"),
        ("bert", {"tokens": np.zeros((2, 11), int)}, "1 to 10 tokens per example, got 11"),
        ("bert", {"tokens": np.zeros((2, 0), int)}, "1 to 10 tokens per example, got 0"),
        ("bert", {"tokens": np.asarray([[1, 2], [22, 23]])}, r"got 23 at \[1, 1\]"),
        ("bert", {"tokens": np.asarray([[-1]])}, r"\[0, 22\], got -1 at \[0, 0\]"),
        (
            "bert",
            {"tokens": np.zeros((2, 3), int), "valid": np.ones((2, 2), bool)},
            r"the shape \[2, 3\] of `tokens`, got \[2, 2\]",
        ),
        (
            "decoder",
            {"tokens": np.zeros((2, 3), int), "valid": np.asarray([[1, 1, 0], [0, 0, 0]])},
            "at least one token.* example 1",
        ),
        (
            "bert",
            {"tokens": np.zeros((2, 3), int), "valid": np.asarray([[1, 0, 1], [1, 1, 0]])},
            "padding only at the end, not so in example 0",
        ),
    ],
)
def test_malformed_input_is_named(variant: str, inputs: Arrays, message: str) -> None:
    deployment, _ = random_deployment.build(random_deployment.structure(variant, "dense"))
    with pytest.raises(DataError, match=message) as error:
        run(deployment, inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mechanism", "num_rounds", "message"),
    [
        ("dense", 2, "`num_rounds` must be 0 for `dense`"),
        ("acceltran", 1, "`num_rounds` must be 0 for `acceltran`"),
        ("energon", 0, "`num_rounds` must be at least 1 for `energon`"),
    ],
)
def test_rounds_fit_the_mechanism(mechanism: str, num_rounds: int, message: str) -> None:
    shape = random_deployment.structure(mechanism=mechanism, num_rounds=num_rounds)
    deployment, inputs = random_deployment.build(shape)
    with pytest.raises(ExportError, match=message):
        run(deployment, inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "`width` must be at least 1"),
        ({"norm": "both"}, "`norm` must be one of pre, post"),
        ({"pooler": "tanh"}, "`pooling` must be first"),
    ],
)
def test_structure_is_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CodesignError, match=message):
        random_deployment.structure(**changes)
    with pytest.raises(CodesignError, match="`patch_size` must fit the padded image"):
        random_deployment.patches(patch_size=9)


def test_structure_sizes() -> None:
    # 6 pixels, 1 of padding, patches of 4 at stride 2: starts 0, 2, 4 of 8.
    sizes = random_deployment.patches(num_prefix=2)
    assert (sizes.grid_size, sizes.num_patches, sizes.patch_values, sizes.max_tokens) == (
        *(3, 9, 16),
        11,
    )
    assert random_deployment.structure("pooler").end_sites == ("pool", "head")
    assert random_deployment.structure().end_sites == ("embed", "head")


def test_imports_without_jax() -> None:
    code = (
        "import sys; sys.modules['jax'] = None; sys.modules['flax'] = None\n"
        "import codesign.hw.emulator\n"
        "assert 'jaxlib' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
