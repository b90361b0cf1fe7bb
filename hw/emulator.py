"""Runs a deployment in NumPy integers, without JAX, as `docs/integer_path.md` says.

Everything is int64. Matrix products go through float64, after a check that every partial sum stays
below 2**53, where float64 is exact whatever the order of summation.
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from codesign.errors import DataError, ExportError, UnknownNameError
from codesign.structure import GELU_LIMIT, ModelStructure

Integers = npt.NDArray[np.int64]
IntegerLike = Integers | np.int64 | int
Booleans = npt.NDArray[np.bool_]

LAYER_TENSORS = (
    "query",
    "key",
    "value",
    "scores",
    "keep",
    "probabilities",
    "context",
    "attended",
    "hidden",
    "residual",
)
"""Tensors of one layer in order of computation; emulated with the layer axis first."""

TENSORS = ("embedded", *LAYER_TENSORS, "logits")
"""Every tensor on which two implementations must agree, in order of computation."""

RESIDUAL_LIMIT = 32767  # 16-bit residual stream
THRESHOLD_OFF = -128  # code of a round that keeps all keys
THRESHOLD_SHIFT = 7  # thresholds have 7 fraction bits
_EXACT_LIMIT = 2**53  # float64 holds every integer below it
_NORM_SHIFT = 14  # fraction bits of a normalised value
_BIAS_SHIFT = 8  # fraction bits of a sum of products below their scale, for the bias
_GAIN_SHIFT = 30  # fraction bits of a normalised value times its gain

_BITS_LINEAR = (2, 8)
_BITS_ATTENTION = (8, 16)
_RANGES: dict[str, tuple[int, int]] = {
    "query_bits": _BITS_LINEAR,
    "key_bits": _BITS_LINEAR,
    "qk_bits": _BITS_ATTENTION,
    "v_bits": _BITS_ATTENTION,
    "threshold": (THRESHOLD_OFF, 127),
    "position": (-RESIDUAL_LIMIT, RESIDUAL_LIMIT),
    "norm_epsilon": (1, _EXACT_LIMIT),
    "exp_mantissa": (0, _EXACT_LIMIT),
}
_RANGE_BY_SUFFIX: dict[str, tuple[int, int]] = {
    "_activation_bits": _BITS_LINEAR,
    "_weight_bits": _BITS_LINEAR,
    "_shift": (0, 62),
}


def limit(bits: IntegerLike) -> Integers:
    """Returns the largest code of `bits` bits; codes are symmetric."""
    return (np.asarray(1, np.int64) << (np.asarray(bits, np.int64) - 1)) - 1


def saturate(values: Integers, largest: IntegerLike) -> Integers:
    """Returns `values` clipped to [-largest, largest]."""
    return np.minimum(np.maximum(values, -largest), largest)


def round_shift(values: Integers, shift: IntegerLike) -> Integers:
    """Returns rint(values / 2**shift), ties to even; `shift` in [0, 62] broadcasts."""
    places = np.asarray(shift, np.int64)
    floor = values >> places
    twice_rest = (values - (floor << places)) << 1
    unit = np.asarray(1, np.int64) << places
    is_up = (twice_rest > unit) | ((twice_rest == unit) & (floor & 1 == 1))
    rounded: Integers = floor + is_up
    return rounded


def _peak(values: Integers) -> int:
    """Returns the largest magnitude in `values`, 0 if there are none."""
    return max(int(values.max(initial=0)), -int(values.min(initial=0)))


def _exact_product(values: Integers, factor: IntegerLike) -> Integers:
    """Returns `values * factor`, refusing products of 2**53 or more."""
    factor = np.asarray(factor, np.int64)
    bound = _peak(values) * _peak(factor)
    if bound < _EXACT_LIMIT:
        return values * factor
    if bound < 2**63:  # too coarse to decide: the largest factors may not meet
        product: Integers = values * factor
        if _peak(product) < _EXACT_LIMIT:
            return product
    raise ExportError(
        "a product reaches 2**53, beyond what the integer path allows: "
        "lower the multipliers of the deployment"
    )


def _exact_matmul(a: Integers, b: Integers) -> Integers:
    """Returns `a @ b` through float64, refusing sums that could reach 2**53."""
    if _peak(a) * _peak(b) * a.shape[-1] >= _EXACT_LIMIT:
        raise ExportError(
            "a matrix product may reach 2**53, beyond what the integer path allows: "
            "lower the bits of the deployment"
        )
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)


def requantise(values: Integers, mantissa: IntegerLike, shift: IntegerLike) -> Integers:
    """Returns rint(values * mantissa / 2**shift), ties to even; both factors broadcast."""
    return round_shift(_exact_product(values, mantissa), shift)


def normalise(
    residual: Integers, gain: Integers, bias: Integers, epsilon: IntegerLike, bits: IntegerLike
) -> Integers:
    """Returns the layer normalisation of the residual stream as codes.

    Args:
      residual: Residual stream, `[B, T, D]`.
      gain: Gain with 16 fraction bits per output step, `[D]`.
      bias: Bias with 30 fraction bits per output step, `[D]`.
      epsilon: Added to D**2 times the variance, in squared codes; at least 1.
      bits: Bits of the output codes.

    Returns:
      Codes `[B, T, D]`.
    """
    width = residual.shape[-1]
    total = residual.sum(axis=-1, keepdims=True)
    squares = (residual * residual).sum(axis=-1, keepdims=True)
    variance = _exact_product(squares, width) - total * total + epsilon
    centred = (width * residual - total).astype(np.float64)
    ratio = centred / np.sqrt(variance.astype(np.float64))
    normal = np.rint(ratio * 2.0**_NORM_SHIFT).astype(np.int64)
    return saturate(round_shift(_exact_product(normal, gain) + bias, _GAIN_SHIFT), limit(bits))


def reference_filter(
    query: Integers,
    key: Integers,
    valid: Booleans,
    threshold: Integers,
    query_bits: int,
    key_bits: Collection[int],
    qk_bits: int,
) -> tuple[Integers, Booleans]:
    """Returns the scores and keep decisions of every round of Energon's filter.

    Args:
      query: Codes of `qk_bits` bits, `[B, H, T, d]`.
      key: Codes of `qk_bits` bits, `[B, H, S, d]`.
      valid: Keys that exist, at least one per example, `[B, S]`.
      threshold: Codes of alpha with 7 fraction bits, -128 for a round that keeps all, `[H, R]`.
      query_bits: Top bits of the query that enter the filter.
      key_bits: Top bits of the key, one entry per round, R of them.
      qk_bits: Bits of the codes.

    Returns:
      Scores of all pairs `[R, B, H, T, S]`, and which are alive after each round `[R, B, H, T, S]`.

    References:
      Zhou et al., "Energon", IEEE TCAD 2022. The integer threshold is ours.
    """
    coarse_query = query >> (qk_bits - query_bits)
    positions = np.arange(key.shape[-2])
    lowest, highest = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    alive = np.broadcast_to(valid[:, None, None, :], (*query.shape[:-1], key.shape[-2]))
    all_scores, all_keep = [], []
    for number, bits in enumerate(key_bits):
        scores = _exact_matmul(coarse_query, np.swapaxes(key >> (qk_bits - bits), -1, -2))
        alive_scores = np.where(alive, scores, lowest)
        maximum = alive_scores.max(axis=-1)
        minimum = np.where(alive, scores, highest).min(axis=-1)
        count = alive.sum(axis=-1)
        quotient, rest = np.divmod(np.where(alive, scores, 0).sum(axis=-1), count)
        alpha = threshold[:, number][None, :, None]
        weight = np.abs(alpha)
        mean_weight = (1 << THRESHOLD_SHIFT) - weight
        extreme = np.where(alpha >= 0, maximum, minimum)
        theta = (
            weight * extreme + mean_weight * quotient + (mean_weight * rest) // count
        ) >> THRESHOLD_SHIFT
        is_first_maximum = positions == alive_scores.argmax(axis=-1)[..., None]
        is_off = (alpha == THRESHOLD_OFF)[..., None]
        alive = alive & ((scores > theta[..., None]) | is_first_maximum | is_off)
        all_scores.append(scores)
        all_keep.append(alive)
    return np.stack(all_scores), np.stack(all_keep)


@functools.cache
def exp_table() -> Integers:
    """Returns 2**16 * 2**(-x) at the middle of 4096 steps of x in [0, 1), `[4096]`."""
    return np.rint(2.0**16 * 2.0 ** (-(np.arange(4096) + 0.5) / 4096)).astype(np.int64)


@functools.cache
def reciprocal_table() -> Integers:
    """Returns 2**28 / x at the middle of 4096 unit steps of x in [4096, 8192), `[4096]`."""
    middles = np.arange(4096, 8192, dtype=np.float64) + 0.5
    return np.rint(2.0**28 / middles).astype(np.int64)


def softmax_codes(
    scores: Integers, kept: Booleans, mantissa: IntegerLike, shift: IntegerLike, bits: IntegerLike
) -> Integers:
    """Returns attention probabilities as codes of `bits` bits, 0 where not kept.

    Args:
      scores: Exact products of query and key codes, `[B, H, T, S]`.
      kept: Pairs that take part, at least one per row, `[B, H, T, S]`.
      mantissa: Multiplier from a difference of scores to 4096ths of an octave.
      shift: Right shift that follows the multiplier.
      bits: Bits of the codes.

    Returns:
      Codes in [0, limit(bits)], `[B, H, T, S]`.
    """
    maximum = np.where(kept, scores, np.iinfo(np.int64).min).max(axis=-1, keepdims=True)
    distance = np.where(kept, maximum - scores, 0)
    octaves = _exact_product(distance, mantissa) >> np.asarray(shift, np.int64)
    exponential = exp_table()[octaves & 4095] >> np.minimum(octaves >> 12, 31)
    exponential = np.where(kept, exponential, 0)
    total = exponential.sum(axis=-1, keepdims=True)
    floor_log2 = np.frexp(total.astype(np.float64))[1].astype(np.int64) - 1
    reciprocal = reciprocal_table()[(total >> (floor_log2 - 12)) - 4096]
    product = _exact_product(exponential * reciprocal, limit(bits))
    codes: Integers = np.minimum(round_shift(product, 16 + floor_log2), limit(bits))
    return codes


def check_deployment(
    structure: ModelStructure, layers: Mapping[str, Any], ends: Mapping[str, Any]
) -> None:
    """Checks names, shapes, types and ranges of a deployment's arrays.

    Raises:
      ExportError: If an array is missing, unknown, mis-shaped, not of integers, or out of range.
    """
    groups = (
        ("layers", layers, structure.layer_shapes()),
        ("ends", ends, structure.end_shapes()),
    )
    for group, arrays, shapes in groups:
        for name in sorted({*arrays, *shapes}):
            if name not in arrays or name not in shapes:
                state = "is missing from" if name not in arrays else "does not belong to"
                raise ExportError(f"array `{group}/{name}` {state} this deployment")
            _check_array(f"{group}/{name}", name, np.asarray(arrays[name]), shapes[name])
        for name in sorted(shapes):
            width_name = "down_activation_bits" if name == "gelu_table" else f"{name}_bits"
            if width_name in shapes:
                codes = np.asarray(arrays[name], np.int64)
                largest = limit(np.asarray(arrays[width_name], np.int64))
                largest = largest.reshape(largest.shape + (1,) * (codes.ndim - largest.ndim))
                if np.any(np.abs(codes) > largest):
                    raise ExportError(
                        f"array `{group}/{name}` holds codes wider than `{width_name}`"
                    )
    if structure.mechanism == "energon":
        if np.any(np.diff(np.asarray(layers["key_bits"], np.int64), axis=-1) < 1):
            raise ExportError("array `layers/key_bits` must rise from round to round")


def _check_array(label: str, name: str, values: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    """Checks one array of a deployment; raises `ExportError`."""
    if values.shape != shape:
        raise ExportError(f"array `{label}` must have shape {shape}, got {values.shape}")
    if values.dtype.kind not in "iu":
        raise ExportError(f"array `{label}` must hold integers, got {values.dtype}")
    lowest, highest = -_EXACT_LIMIT, _EXACT_LIMIT
    for suffix, bounds in _RANGE_BY_SUFFIX.items():
        if name.endswith(suffix):
            lowest, highest = bounds
    lowest, highest = _RANGES.get(name, (lowest, highest))
    if values.size and (int(values.min()) < lowest or int(values.max()) > highest):
        raise ExportError(
            f"array `{label}` must lie in [{lowest}, {highest}], "
            f"got values from {values.min()} to {values.max()}"
        )


def _embed(structure: ModelStructure, ends: Mapping[str, Integers], pixels: Integers) -> Integers:
    """Returns the residual stream `[B, T, D]` of images `[B, image, image, channels]`."""
    bits = ends["embed_activation_bits"]
    codes = requantise(pixels - ends["input_offset"], ends["input_mantissa"], ends["input_shift"])
    codes = saturate(codes, limit(bits))
    margin = (structure.padding, structure.padding)
    codes = np.pad(codes, ((0, 0), margin, margin, (0, 0)))
    patch = (structure.patch_size, structure.patch_size)
    windows = np.lib.stride_tricks.sliding_window_view(codes, patch, axis=(1, 2))
    windows = windows[:, :: structure.stride, :: structure.stride]  # [B, rows, columns, C, p, p]
    patches = np.moveaxis(windows, 3, -1).reshape(
        len(pixels), structure.num_tokens, structure.patch_values
    )
    sums = (_exact_matmul(patches, ends["embed_weight"]) << _BIAS_SHIFT) + ends["embed_bias"]
    embedded = requantise(sums, ends["embed_mantissa"], ends["embed_shift"]) + ends["position"]
    return saturate(embedded, RESIDUAL_LIMIT)


def _linear(inputs: Integers, layer: Mapping[str, Integers], site: str) -> Integers:
    """Returns the requantised output of the linear layer `site`, last axis transformed."""
    sums = (_exact_matmul(inputs, layer[f"{site}_weight"]) << _BIAS_SHIFT) + layer[f"{site}_bias"]
    return requantise(sums, layer[f"{site}_mantissa"], layer[f"{site}_shift"])


def _layer(
    structure: ModelStructure,
    layer: Mapping[str, Integers],
    epsilon: Integers,
    residual: Integers,
    valid: Booleans,
) -> dict[str, npt.NDArray[Any]]:
    """Returns the tensors `LAYER_TENSORS` of one layer for a residual stream `[B, T, D]`."""
    batch_size, num_tokens = valid.shape
    qk_bits, v_bits = int(layer["qk_bits"]), int(layer["v_bits"])
    inputs = normalise(
        residual,
        layer["attention_gain"],
        layer["attention_bias"],
        epsilon,
        layer["qkv_activation_bits"],
    )
    qkv = _linear(inputs, layer, "qkv").reshape(
        batch_size, num_tokens, 3, structure.num_heads, structure.head_dim
    )
    query, key, value = (
        saturate(part, limit(bits))
        for part, bits in zip(
            np.moveaxis(qkv, (2, 3), (0, 2)), (qk_bits, qk_bits, v_bits), strict=True
        )
    )
    pairs = (batch_size, structure.num_heads, num_tokens, num_tokens)
    if structure.mechanism == "energon":
        key_bits = [int(bits) for bits in layer["key_bits"]]
        scores, keep = reference_filter(
            query, key, valid, layer["threshold"], int(layer["query_bits"]), key_bits, qk_bits
        )
        kept = keep[-1]
    else:
        scores, keep = np.zeros((0, *pairs), np.int64), np.zeros((0, *pairs), np.bool_)
        kept = np.broadcast_to(valid[:, None, None, :], pairs)
    exact_scores = _exact_matmul(query, np.swapaxes(key, -1, -2))
    probabilities = softmax_codes(
        exact_scores, kept, layer["exp_mantissa"], layer["exp_shift"], qk_bits
    )
    outputs = np.swapaxes(_exact_matmul(probabilities, value), 1, 2)
    outputs = outputs.reshape(batch_size, num_tokens, structure.attention_width)
    context = saturate(
        requantise(outputs, layer["context_mantissa"], layer["context_shift"]),
        limit(layer["out_activation_bits"]),
    )
    attended = saturate(residual + _linear(context, layer, "out"), RESIDUAL_LIMIT)
    inputs = normalise(
        attended, layer["ffn_gain"], layer["ffn_bias"], epsilon, layer["up_activation_bits"]
    )
    gelu_codes = saturate(_linear(inputs, layer, "up"), GELU_LIMIT)
    hidden = layer["gelu_table"][gelu_codes + GELU_LIMIT]
    return {
        "query": query,
        "key": key,
        "value": value,
        "scores": scores,
        "keep": keep,
        "probabilities": probabilities,
        "context": context,
        "attended": attended,
        "hidden": hidden,
        "residual": saturate(attended + _linear(hidden, layer, "down"), RESIDUAL_LIMIT),
    }


def _head(ends: Mapping[str, Integers], residual: Integers, valid: Booleans) -> Integers:
    """Returns the logits `[B, classes]`, times the number of valid tokens."""
    inputs = normalise(
        residual,
        ends["head_gain"],
        ends["head_offset"],
        ends["norm_epsilon"],
        ends["head_activation_bits"],
    )
    pooled = np.where(valid[..., None], inputs, 0).sum(axis=1)
    num_valid = valid.sum(axis=1)[:, None]
    logits: Integers = 256 * _exact_matmul(pooled, ends["head_weight"])
    logits += num_valid * ends["head_bias"]
    return logits


def _checked_inputs(
    structure: ModelStructure, pixels: npt.ArrayLike, valid: npt.ArrayLike | None
) -> tuple[Integers, Booleans]:
    """Returns pixels `[B, image, image, channels]` and valid tokens `[B, T]`, checked."""
    images = np.asarray(pixels)
    if images.ndim == 3 and structure.channels == 1:
        images = images[..., None]
    expected = (structure.image_size, structure.image_size, structure.channels)
    if images.shape[1:] != expected or images.dtype.kind not in "iu":
        raise DataError(
            f"`pixels` must be integers of shape [B, {', '.join(map(str, expected))}], "
            f"got {images.dtype} of shape {list(images.shape)}"
        )
    tokens = (len(images), structure.num_tokens)
    exists = np.ones(tokens, np.bool_) if valid is None else np.asarray(valid).astype(np.bool_)
    if exists.shape != tokens or not exists.any(axis=1).all():
        raise DataError(
            f"`valid` must have shape {list(tokens)} with at least one token per example"
        )
    return images.astype(np.int64), exists


def emulate(
    structure: ModelStructure,
    layers: Mapping[str, npt.NDArray[Any]],
    ends: Mapping[str, npt.NDArray[Any]],
    pixels: npt.ArrayLike,
    valid: npt.ArrayLike | None = None,
    *,
    tensors: Collection[str] | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Returns every named tensor of the integer path.

    Args:
      structure: Sizes of the model.
      layers: Integer arrays of the blocks, layer axis first (`ModelStructure.layer_shapes`).
      ends: Integer arrays of input, embedding and head (`ModelStructure.end_shapes`).
      pixels: Raw integer images, `[B, image, image]` or `[B, image, image, channels]`.
      valid: Tokens that exist, `[B, T]`; all of them by default.
      tensors: Names to return, to save memory; all of `TENSORS` by default.

    Returns:
      Tensors by name, int64 (`keep` bool), shaped as `ModelStructure.tensor_shapes` says.

    Raises:
      ExportError: If the deployment is malformed, or a product reaches 2**53.
      DataError: If `pixels` or `valid` do not fit the structure.
      UnknownNameError: If `tensors` holds another name.
    """
    wanted = TENSORS if tensors is None else tuple(tensors)
    for name in wanted:
        if name not in TENSORS:
            raise UnknownNameError(f"tensor {name!r} is not one of {', '.join(TENSORS)}")
    check_deployment(structure, layers, ends)
    images, exists = _checked_inputs(structure, pixels, valid)
    end_arrays = {name: np.asarray(values, np.int64) for name, values in ends.items()}
    layer_arrays = {name: np.asarray(values, np.int64) for name, values in layers.items()}

    residual = _embed(structure, end_arrays, images)
    results: dict[str, npt.NDArray[Any]] = {"embedded": residual}
    stacks: dict[str, list[npt.NDArray[Any]]] = {
        name: [] for name in LAYER_TENSORS if name in wanted
    }
    for number in range(structure.num_layers):
        layer = {name: values[number] for name, values in layer_arrays.items()}
        computed = _layer(structure, layer, end_arrays["norm_epsilon"], residual, exists)
        residual = computed["residual"]
        for name, stack in stacks.items():
            stack.append(computed[name])
    results |= {name: np.stack(stack) for name, stack in stacks.items()}
    results["logits"] = _head(end_arrays, residual, exists)
    return {name: results[name] for name in TENSORS if name in wanted}
