"""Runs a deployment in NumPy integers, without JAX, as `docs/integer_path.md` says.

Everything is computed in int64; arrays may be stored in narrower types.
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from codesign.errors import DataError, ExportError, UnknownNameError
from codesign.references import LAYER_TENSORS, layer_shapes, reference_by_name, tensor_names
from codesign.references.integers import (
    BIAS_SHIFT,
    EXACT_LIMIT,
    Booleans,
    IntegerLike,
    Integers,
    exact_matmul,
    exact_product,
    exponentials,
    limit,
    linear_output,
    requantise,
    round_shift,
    saturate,
)
from codesign.references.protocol import LayerTensors
from codesign.structure import ACTIVATION_LIMIT, ModelStructure, PatchInput, TokenInput

Array = npt.NDArray[Any]

RESIDUAL_LIMIT = 32767  # 16-bit residual stream
_NORM_SHIFT = 14  # fraction bits of a normalised value
_GAIN_SHIFT = 30  # fraction bits of a normalised value times its gain
_MIN_TOTAL = 4096  # least sum of exponentials, that of a row without kept keys

_BITS_LINEAR = (2, 8)
_BITS_ATTENTION = (8, 16)
_RANGES: dict[str, tuple[int, int]] = {
    "qk_bits": _BITS_ATTENTION,
    "v_bits": _BITS_ATTENTION,
    "token": (-RESIDUAL_LIMIT, RESIDUAL_LIMIT),
    "position": (-RESIDUAL_LIMIT, RESIDUAL_LIMIT),
    "norm_epsilon": (1, EXACT_LIMIT),
    "embed_epsilon": (1, EXACT_LIMIT),
    "exp_mantissa": (0, EXACT_LIMIT),
}
_RANGE_BY_SUFFIX: dict[str, tuple[int, int]] = {
    "_activation_bits": _BITS_LINEAR,
    "_weight_bits": _BITS_LINEAR,
    "_shift": (0, 62),
}
_TABLE_WIDTHS = {"activation_table": "down_activation_bits", "pool_table": "head_activation_bits"}


def normalise(
    residual: Integers, gain: Integers, bias: Integers, epsilon: IntegerLike, largest: IntegerLike
) -> Integers:
    """Returns the layer normalisation of a tensor as codes.

    Args:
      residual: Integers of one scale, `[..., D]`.
      gain: Gain with 16 fraction bits per output step, `[D]`.
      bias: Bias with 30 fraction bits per output step, `[D]`.
      epsilon: Added to D**2 times the variance, in squared codes; at least 1.
      largest: Largest output code.

    Returns:
      Codes in [-largest, largest], `[..., D]`.
    """
    width = residual.shape[-1]
    total = residual.sum(axis=-1, keepdims=True)
    squares = (residual * residual).sum(axis=-1, keepdims=True)
    variance = exact_product(squares, width) - total * total + epsilon
    centred = (width * residual - total).astype(np.float64)
    ratio = centred / np.sqrt(variance.astype(np.float64))
    normal = np.rint(ratio * 2.0**_NORM_SHIFT).astype(np.int64)
    return saturate(round_shift(exact_product(normal, gain) + bias, _GAIN_SHIFT), largest)


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
      kept: Pairs that take part, `[B, H, T, S]`; a row without any gets probabilities 0.
      mantissa: Multiplier from a difference of scores to 4096ths of an octave.
      shift: Right shift that follows the multiplier.
      bits: Bits of the codes.

    Returns:
      Codes in [0, limit(bits)], `[B, H, T, S]`.
    """
    maximum = np.where(kept, scores, np.iinfo(np.int64).min).max(axis=-1, keepdims=True)
    distance = np.where(kept, maximum - scores, 0)
    exponential = np.where(kept, exponentials(distance, mantissa, shift), 0)
    total = np.maximum(exponential.sum(axis=-1, keepdims=True), _MIN_TOTAL)
    floor_log2 = np.frexp(total.astype(np.float64))[1].astype(np.int64) - 1
    reciprocal = reciprocal_table()[(total >> (floor_log2 - 12)) - 4096]
    product = exact_product(exponential * reciprocal, limit(bits))
    codes: Integers = np.minimum(round_shift(product, 16 + floor_log2), limit(bits))
    return codes


def check_deployment(
    structure: ModelStructure, layers: Mapping[str, Any], ends: Mapping[str, Any]
) -> None:
    """Checks names, shapes, types and ranges of a deployment's arrays.

    Raises:
      ExportError: If an array is missing, unknown, mis-shaped, not of integers, or out of range.
      UnknownNameError: If the mechanism has no integer path.
    """
    reference = reference_by_name(structure.mechanism)
    groups = (
        ("layers", layers, layer_shapes(structure)),
        ("ends", ends, structure.end_shapes()),
    )
    for group, arrays, shapes in groups:
        for name in sorted({*arrays, *shapes}):
            if name not in arrays or name not in shapes:
                state = "is missing from" if name not in arrays else "does not belong to"
                raise ExportError(f"array `{group}/{name}` {state} this deployment")
            bounds = _RANGES.get(name, (-EXACT_LIMIT, EXACT_LIMIT))
            for suffix, limits in _RANGE_BY_SUFFIX.items():
                bounds = limits if name.endswith(suffix) else bounds
            bounds = reference.ranges.get(name, bounds) if group == "layers" else bounds
            _check_array(f"{group}/{name}", np.asarray(arrays[name]), shapes[name], bounds)
        for name in sorted(shapes):
            width_name = _TABLE_WIDTHS.get(name, f"{name}_bits")
            if width_name in shapes:
                codes = np.asarray(arrays[name])
                largest = limit(np.asarray(arrays[width_name]))
                codes = codes.reshape(*largest.shape, -1)
                if np.any(codes.max(axis=-1) > largest) or np.any(codes.min(axis=-1) < -largest):
                    raise ExportError(
                        f"array `{group}/{name}` holds codes wider than `{width_name}`"
                    )
    reference.check(structure, layers)


def _check_array(
    label: str, values: Array, shape: tuple[int, ...], bounds: tuple[int, int]
) -> None:
    """Checks one array of a deployment; raises `ExportError`."""
    if values.shape != shape:
        raise ExportError(f"array `{label}` must have shape {shape}, got {values.shape}")
    if values.dtype.kind not in "iu":
        raise ExportError(f"array `{label}` must hold integers, got {values.dtype}")
    lowest, highest = bounds
    if values.size and (int(values.min()) < lowest or int(values.max()) > highest):
        raise ExportError(
            f"array `{label}` must lie in [{lowest}, {highest}], "
            f"got values from {values.min()} to {values.max()}"
        )


def checked_inputs(
    structure: ModelStructure, inputs: Mapping[str, npt.ArrayLike]
) -> dict[str, Array]:
    """Returns the inputs of a model in full, or says what is wrong with them.

    Args:
      structure: Sizes of the model.
      inputs: As for `emulate`.

    Returns:
      `pixels` int64 `[B, image, image, channels]`, or `tokens` int64 `[B, T]` and `valid` bool `[B, T]`.

    Raises:
      DataError: If an input is missing, unknown, mis-shaped or out of range.
    """
    names = ("pixels",) if isinstance(structure.input, PatchInput) else ("tokens", "valid")
    for name in sorted({*inputs, names[0]}):
        if name not in inputs or name not in names:
            state = "is missing" if name in names else "is unknown"
            raise DataError(f"input `{name}` {state}: the model takes {', '.join(names)}")
    values = np.asarray(inputs[names[0]])
    if isinstance(structure.input, PatchInput):
        size, channels = structure.input.image_size, structure.input.channels
        if values.ndim == 3 and channels == 1:
            values = values[..., None]
        if values.shape[1:] != (size, size, channels) or values.dtype.kind not in "iu":
            raise DataError(
                f"`pixels` must be integers of shape [B, {size}, {size}, {channels}], "
                f"got {values.dtype} of shape {list(values.shape)}"
            )
        return {"pixels": values.astype(np.int64)}
    return _checked_tokens(structure.input, values, inputs.get("valid"))


def _checked_tokens(
    sizes: TokenInput, tokens: Array, valid: npt.ArrayLike | None
) -> dict[str, Array]:
    """Returns token numbers and which exist, `[B, T]` both; raises `DataError`."""
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise DataError(
            f"`tokens` must be integers of shape [B, T], got {tokens.dtype} of shape "
            f"{list(tokens.shape)}"
        )
    if not 1 <= tokens.shape[1] <= sizes.max_tokens:
        raise DataError(
            f"`tokens` must have 1 to {sizes.max_tokens} tokens per example, got {tokens.shape[1]}: "
            "cut the sequences"
        )
    is_foreign = (tokens < 0) | (tokens >= sizes.vocabulary_size)
    if is_foreign.any():
        place = np.unravel_index(int(is_foreign.argmax()), tokens.shape)
        raise DataError(
            f"`tokens` must lie in [0, {sizes.vocabulary_size - 1}], got {tokens[place]} "
            f"at {[int(i) for i in place]}: use the tokenizer of this model"
        )
    exists = np.ones(tokens.shape, np.bool_) if valid is None else np.asarray(valid) != 0
    if exists.shape != tokens.shape:
        raise DataError(
            f"`valid` must have the shape {list(tokens.shape)} of `tokens`, got {list(exists.shape)}"
        )
    is_wrong = ~exists[:, 0] | (exists[:, 1:] & ~exists[:, :-1]).any(axis=1)
    if is_wrong.any():
        raise DataError(
            "`valid` must mark at least one token, and padding only at the end, "
            f"not so in example {int(is_wrong.argmax())}"
        )
    return {"tokens": tokens.astype(np.int64), "valid": exists}


def _linear(inputs: Integers, arrays: Mapping[str, Integers], site: str) -> Integers:
    """Returns the requantised output of the linear layer `site`, last axis transformed."""
    return linear_output(exact_matmul(inputs, arrays[f"{site}_weight"]), arrays, site)


def _embed_patches(sizes: PatchInput, ends: Mapping[str, Integers], pixels: Integers) -> Integers:
    """Returns the embedded patches `[B, T, D]` behind their prefix, without positions."""
    codes = requantise(pixels - ends["input_offset"], ends["input_mantissa"], ends["input_shift"])
    codes = saturate(codes, limit(ends["embed_activation_bits"]))
    margin = (sizes.padding, sizes.padding)
    codes = np.pad(codes, ((0, 0), margin, margin, (0, 0)))
    patch = (sizes.patch_size, sizes.patch_size)
    windows = np.lib.stride_tricks.sliding_window_view(codes, patch, axis=(1, 2))
    windows = windows[:, :: sizes.stride, :: sizes.stride]  # [B, rows, columns, C, p, p]
    patches = np.moveaxis(windows, 3, -1).reshape(
        len(pixels), sizes.num_patches, sizes.patch_values
    )
    return np.pad(_linear(patches, ends, "embed"), ((0, 0), (sizes.num_prefix, 0), (0, 0)))


def _embed(
    structure: ModelStructure, ends: Mapping[str, Integers], inputs: Mapping[str, Array]
) -> Integers:
    """Returns the residual stream `[B, T, D]` that enters the first layer."""
    if isinstance(structure.input, PatchInput):
        embedded = _embed_patches(structure.input, ends, inputs["pixels"])
    else:
        embedded = ends["token"][inputs["tokens"]].astype(np.int64)
    embedded = embedded + ends["position"][: embedded.shape[1]]
    if structure.norm == "pre":
        return saturate(embedded, RESIDUAL_LIMIT)
    return normalise(
        embedded, ends["embed_gain"], ends["embed_offset"], ends["embed_epsilon"], RESIDUAL_LIMIT
    )


def _enter(
    structure: ModelStructure,
    arrays: Mapping[str, Integers],
    epsilon: Integers,
    residual: Integers,
    site: str,
    gain_and_bias: tuple[str, str],
) -> Integers:
    """Returns the residual stream as it enters the linear layer `site`."""
    largest = limit(arrays[f"{site}_activation_bits"])
    if structure.norm == "pre":
        gain, bias = (arrays[name] for name in gain_and_bias)
        return normalise(residual, gain, bias, epsilon, largest)
    mantissa, shift = arrays[f"{site}_enter_mantissa"], arrays[f"{site}_enter_shift"]
    return saturate(requantise(residual, mantissa, shift), largest)


def entering(
    structure: ModelStructure,
    layers: Mapping[str, Integers],
    ends: Mapping[str, Integers],
    tensors: Mapping[str, Array],
) -> dict[str, Integers]:
    """Returns what enters `qkv` and `up` of every layer, `[L, B, T, D]`, from the named tensors of a batch."""
    norms = {"qkv": ("attention_gain", "attention_bias"), "up": ("ffn_gain", "ffn_bias")}
    residuals = {
        "qkv": [tensors["embedded"], *tensors["residual"]],
        "up": list(tensors["attended"]),
    }
    found: dict[str, list[Integers]] = {site: [] for site in norms}
    for index in range(structure.num_layers):
        layer = {name: values[index] for name, values in layers.items()}
        for site, norm in norms.items():
            residual = residuals[site][index]
            found[site].append(_enter(structure, layer, ends["norm_epsilon"], residual, site, norm))
    return {site: np.stack(of_layers) for site, of_layers in found.items()}


def _leave(
    structure: ModelStructure,
    layer: Mapping[str, Integers],
    epsilon: Integers,
    residual: Integers,
    branch: Integers,
    gain_and_bias: tuple[str, str],
) -> Integers:
    """Returns the residual stream after a branch joins it."""
    total = saturate(residual + branch, RESIDUAL_LIMIT)
    if structure.norm == "pre":
        return total
    gain, bias = (layer[name] for name in gain_and_bias)
    return normalise(total, gain, bias, epsilon, RESIDUAL_LIMIT)


def _layer(
    structure: ModelStructure,
    layer: Mapping[str, Integers],
    epsilon: Integers,
    residual: Integers,
    exists: Booleans,
    carry: LayerTensors,
) -> tuple[dict[str, Array], Booleans, LayerTensors]:
    """Returns the tensors of one layer, of any mechanism, for a residual stream `[B, T, D]`, and what the next one gets.

    `exists` are the pairs of query and key that exist, `[B, 1, T, S]`; returned are those left, and the carry.
    """
    reference = reference_by_name(structure.mechanism)
    leave = functools.partial(reference.on_output, layer)
    batch_size, num_tokens = residual.shape[:2]
    qk_limit, v_limit = limit(layer["qk_bits"]), limit(layer["v_bits"])

    norm = ("attention_gain", "attention_bias")
    inputs = _enter(structure, layer, epsilon, residual, "qkv", norm)
    planned = reference.plan(structure, layer, inputs, exists, carry)
    if "tokens" in planned:
        exists = exists & planned["tokens"][:, None, None, :]

    def prune(x: Integers, site: str) -> Integers:
        return reference.on_activation(layer, x, site, planned)

    qkv = _linear(inputs, layer, "qkv").reshape(
        batch_size, num_tokens, 3, structure.num_heads, structure.head_dim
    )
    query, key, value = (
        prune(saturate(part, largest), site)
        for part, largest, site in zip(
            np.moveaxis(qkv, (2, 3), (0, 2)),
            (qk_limit, qk_limit, v_limit),
            ("query", "key", "value"),
            strict=True,
        )
    )
    kept, filter_tensors = reference.filter(layer, query, key, exists, planned)
    raw_scores = filter_tensors.pop("raw_scores", None)
    if raw_scores is None:
        raw_scores = exact_matmul(query, np.swapaxes(key, -1, -2))
    raw_scores = prune(raw_scores, "scores")
    probabilities = softmax_codes(
        raw_scores, kept, layer["exp_mantissa"], layer["exp_shift"], layer["qk_bits"]
    )
    probabilities, used = reference.on_probabilities(
        layer, prune(probabilities, "probabilities"), kept, planned
    )
    outputs = np.swapaxes(exact_matmul(probabilities, value), 1, 2)
    outputs = outputs.reshape(batch_size, num_tokens, structure.attention_width)
    context = requantise(outputs, layer["context_mantissa"], layer["context_shift"])
    context = saturate(context, limit(layer["out_activation_bits"]))
    context = prune(leave(context, "attention", planned), "out")
    attention_branch = leave(_linear(context, layer, "out"), "attention_branch", planned)
    attended = _leave(structure, layer, epsilon, residual, attention_branch, norm)

    norm = ("ffn_gain", "ffn_bias")
    inputs = prune(_enter(structure, layer, epsilon, attended, "up", norm), "up")
    gelu = prune(saturate(_linear(inputs, layer, "up"), ACTIVATION_LIMIT), "gelu")
    hidden = prune(layer["activation_table"][gelu + ACTIVATION_LIMIT], "down")
    ffn_branch = leave(_linear(hidden, layer, "down"), "ffn_branch", planned)
    tensors = (
        planned
        | filter_tensors
        | used
        | {
            "query": query,
            "key": key,
            "value": value,
            "raw_scores": raw_scores,
            "probabilities": probabilities,
            "context": context,
            "attention_branch": attention_branch,
            "attended": attended,
            "gelu": gelu,
            "hidden": hidden,
            "ffn_branch": ffn_branch,
            "residual": _leave(structure, layer, epsilon, attended, ffn_branch, norm),
        }
    )
    return tensors, exists, reference.carry(layer, carry, tensors, exists)


def _head(
    structure: ModelStructure, ends: Mapping[str, Integers], residual: Integers, valid: Booleans
) -> Integers:
    """Returns the logits, `[B, C]` or of every token `[B, T, C]`; mean pooling: times the valid tokens."""
    reader = "head" if structure.pooler == "none" else "pool"
    read = residual[:, 0] if structure.pooling == "first" else residual
    norm = (f"{reader}_gain", f"{reader}_offset")
    inputs = _enter(structure, ends, ends["norm_epsilon"], read, reader, norm)
    if reader == "pool":
        codes = saturate(_linear(inputs, ends, "pool"), ACTIVATION_LIMIT)
        inputs = ends["pool_table"][codes + ACTIVATION_LIMIT]
    bias = ends["head_bias"]
    if structure.pooling == "mean":
        inputs = np.where(valid[..., None], inputs, 0).sum(axis=1)
        bias = exact_product(valid.sum(axis=1)[:, None], bias)
    logits: Integers = (exact_matmul(inputs, ends["head_weight"]) << BIAS_SHIFT) + bias
    return logits


def emulate(
    structure: ModelStructure,
    layers: Mapping[str, Array],
    ends: Mapping[str, Array],
    inputs: Mapping[str, npt.ArrayLike],
    *,
    tensors: Collection[str] | None = None,
) -> dict[str, Array]:
    """Returns every named tensor of the integer path.

    Args:
      structure: Sizes and wiring of the model.
      layers: Integer arrays of the blocks, layer axis first (`codesign.references.layer_shapes`).
      ends: Integer arrays of input, embedding, pooler and head (`ModelStructure.end_shapes`).
      inputs: `pixels`, raw integer images `[B, image, image]` or `[B, image, image, channels]`; or
        `tokens`, numbers `[B, T]`, and `valid`, those that are not padding, `[B, T]` (default: all).
      tensors: Names to return, to save memory; all of `codesign.references.tensor_names` by default.

    Returns:
      Tensors by name, int64 (`keep` bool), shaped as `codesign.references.tensor_shapes` says.

    Raises:
      ExportError: If the deployment is malformed, or a product reaches 2**53.
      DataError: If `inputs` do not fit the structure.
      UnknownNameError: If `tensors` holds another name, or the mechanism has no integer path.
    """
    names = tensor_names(structure)
    wanted = names if tensors is None else tuple(tensors)
    for name in wanted:
        if name not in names:
            raise UnknownNameError(f"tensor {name!r} is not one of {', '.join(names)}")
    check_deployment(structure, layers, ends)
    given = checked_inputs(structure, inputs)
    # The table of tokens stays as it is stored: only the rows that are looked up get wider.
    end_arrays = {
        name: np.asarray(values, None if name == "token" else np.int64)
        for name, values in ends.items()
    }
    residual = _embed(structure, end_arrays, given)
    valid = given.get("valid", np.ones(residual.shape[:2], np.bool_))
    exists = valid[:, None, None, :]
    if structure.is_causal:
        exists = exists & np.tri(residual.shape[1], dtype=np.bool_)
    exists = np.broadcast_to(exists, (len(valid), 1, residual.shape[1], residual.shape[1]))

    results: dict[str, Array] = {"embedded": residual}
    stacks: dict[str, list[Array]] = {name: [] for name in wanted if name in LAYER_TENSORS}
    carry = reference_by_name(structure.mechanism).start(structure, *residual.shape[:2])
    for number in range(structure.num_layers):
        layer = {name: np.asarray(values[number], np.int64) for name, values in layers.items()}
        computed, exists, carry = _layer(
            structure, layer, end_arrays["norm_epsilon"], residual, exists, carry
        )
        residual = computed["residual"]
        valid = valid & computed.get("tokens", valid)
        for name, stack in stacks.items():
            stack.append(computed[name])
    results |= {name: np.stack(stack) for name, stack in stacks.items()}
    results["logits"] = _head(structure, end_arrays, residual, valid)
    return {name: results[name] for name in names if name in wanted}
