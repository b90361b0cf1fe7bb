"""Builds a small random vision transformer in float64 and its integer deployment, in NumPy alone."""

import dataclasses
from typing import Any

import numpy as np

from codesign.structure import GELU_LIMIT, ModelStructure

Arrays = dict[str, np.ndarray]
EPSILON = 1e-5  # of the normalisation, in squared real units
MANTISSA_BITS = 15


@dataclasses.dataclass(frozen=True)
class Deployment:
    """Integers, and the real model they came from.

    `widths` are the bits that were asked for; `scales` the real value of one code of a tensor.
    """

    structure: ModelStructure
    layers: Arrays
    ends: Arrays
    parameters: dict[str, Any]
    scales: dict[str, Any]


def structure(**changes: Any) -> ModelStructure:
    """A ViT of 2 layers and 2 heads on 6 x 6 pixels: 9 tokens, 2 rounds of filtering."""
    fields = {
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 8,
        "width": 16,
        "hidden": 32,
        "image_size": 6,
        "channels": 1,
        "patch_size": 4,
        "stride": 2,
        "padding": 1,
        "num_classes": 5,
        "mechanism": "energon",
        "num_rounds": 2,
    }
    return ModelStructure(**(fields | changes))


def largest_code(bits: int) -> int:
    return int(2 ** (bits - 1) - 1)


def multiplier(ratio: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Mantissa of 15 bits and shift of a real factor."""
    ratio = np.asarray(ratio, np.float64)
    shift = np.clip(MANTISSA_BITS - np.frexp(ratio)[1], 0, 62)
    return np.rint(ratio * 2.0**shift).astype(np.int64), shift.astype(np.int64)


def to_codes(values: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    return np.rint(values / scale).astype(np.int64)


def gelu(values: np.ndarray) -> np.ndarray:
    return 0.5 * values * (1 + np.tanh(np.sqrt(2 / np.pi) * (values + 0.044715 * values**3)))


def float_norm(values: np.ndarray, gain: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = values - values.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * gain + bias


def random_parameters(shape: ModelStructure, rng: np.random.Generator) -> dict[str, Any]:
    def weight(inner: int, outer: int, gain: float = 1.0) -> np.ndarray:
        return rng.normal(size=(inner, outer)) * gain / np.sqrt(inner)

    width, hidden, attention = shape.width, shape.hidden, shape.attention_width
    layers = [
        {
            "attention_gain": 1 + 0.2 * rng.normal(size=width),
            "attention_bias": 0.1 * rng.normal(size=width),
            "qkv_weight": weight(width, 3 * attention, 1.5),
            "qkv_bias": 0.1 * rng.normal(size=3 * attention),
            "out_weight": weight(attention, width),
            "out_bias": 0.1 * rng.normal(size=width),
            "ffn_gain": 1 + 0.2 * rng.normal(size=width),
            "ffn_bias": 0.1 * rng.normal(size=width),
            "up_weight": weight(width, hidden),
            "up_bias": 0.1 * rng.normal(size=hidden),
            "down_weight": weight(hidden, width),
            "down_bias": 0.1 * rng.normal(size=width),
        }
        for _ in range(shape.num_layers)
    ]
    return {
        "layers": layers,
        "embed_weight": weight(shape.patch_values, width),
        "embed_bias": 0.1 * rng.normal(size=width),
        "position": 0.3 * rng.normal(size=(shape.num_tokens, width)),
        "head_gain": 1 + 0.2 * rng.normal(size=width),
        "head_offset": 0.1 * rng.normal(size=width),
        "head_weight": weight(width, shape.num_classes),
        "head_bias": 0.1 * rng.normal(size=shape.num_classes),
    }


def run_float(
    shape: ModelStructure,
    parameters: dict[str, Any],
    pixels: np.ndarray,
    keep: np.ndarray | None = None,
) -> dict[str, Any]:
    """The real model on pixels 0 to 16; `keep` `[L, B, H, T, S]` are the pairs that attend (all)."""
    images = (pixels.reshape(len(pixels), shape.image_size, shape.image_size, -1) - 8.0) / 8.0
    padding = shape.padding
    images = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    patches = [
        images[:, y : y + shape.patch_size, x : x + shape.patch_size].reshape(len(pixels), -1)
        for y in range(0, shape.grid_size * shape.stride, shape.stride)
        for x in range(0, shape.grid_size * shape.stride, shape.stride)
    ]
    inputs = np.stack(patches, axis=1)
    residual = inputs @ parameters["embed_weight"] + parameters["embed_bias"]
    residual = residual + parameters["position"]
    seen: dict[str, Any] = {"pixels": images, "residual": [residual], "layers": []}
    for number, layer in enumerate(parameters["layers"]):
        normal = float_norm(residual, layer["attention_gain"], layer["attention_bias"])
        qkv = normal @ layer["qkv_weight"] + layer["qkv_bias"]
        heads = (len(pixels), shape.num_tokens, shape.num_heads, shape.head_dim)
        query, key, value = (
            part.reshape(heads).transpose(0, 2, 1, 3) for part in np.split(qkv, 3, axis=-1)
        )
        scores = query @ key.swapaxes(-1, -2) / np.sqrt(shape.head_dim)
        if keep is not None:
            scores = np.where(keep[number], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        context = weights / weights.sum(-1, keepdims=True) @ value
        context = context.transpose(0, 2, 1, 3).reshape(len(pixels), shape.num_tokens, -1)
        attended = residual + context @ layer["out_weight"] + layer["out_bias"]
        up_input = float_norm(attended, layer["ffn_gain"], layer["ffn_bias"])
        gate = up_input @ layer["up_weight"] + layer["up_bias"]
        residual = attended + gelu(gate) @ layer["down_weight"] + layer["down_bias"]
        seen["residual"] += [attended, residual]
        seen["layers"].append(
            {
                "qkv": normal,
                "query": query,
                "key": key,
                "value": value,
                "context": context,
                "up": up_input,
                "gate": gate,
                "hidden": gelu(gate),
            }
        )
    head_input = float_norm(residual, parameters["head_gain"], parameters["head_offset"])
    seen["head"] = head_input
    seen["logits"] = head_input.mean(1) @ parameters["head_weight"] + parameters["head_bias"]
    return seen


def build(
    shape: ModelStructure,
    *,
    seed: int = 0,
    threshold: int | np.ndarray = 0,
    linear_bits: int = 8,
    attention_bits: int = 12,
) -> tuple[Deployment, np.ndarray]:
    """Returns a calibrated deployment and the images it was calibrated on, `[8, image, image(, C)]`."""
    rng = np.random.default_rng(seed)
    parameters = random_parameters(shape, rng)
    image_shape = (8, shape.image_size, shape.image_size)
    if shape.channels > 1:
        image_shape += (shape.channels,)
    pixels = rng.integers(0, 17, size=image_shape)
    seen = run_float(shape, parameters, pixels)
    linear_limit, attention_limit = largest_code(linear_bits), largest_code(attention_bits)

    def scale_of(values: np.ndarray, limit: int) -> float:
        return float(np.abs(values).max() / limit)

    residual_scale = max(scale_of(values, 30000) for values in seen["residual"])
    scales: dict[str, Any] = {"residual": residual_scale, "layers": []}

    def norm(gain: np.ndarray, bias: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
        return to_codes(gain * 2.0**16, scale), to_codes(bias * 2.0**30, scale)

    def linear(
        site: str, weight: np.ndarray, bias: np.ndarray, scale_in: float, scale_out: Any
    ) -> Arrays:
        scale_weight = np.abs(weight).max(axis=0) / linear_limit
        mantissa, shift = multiplier(scale_in * scale_weight / 256 / scale_out)
        return {
            f"{site}_weight_bits": np.asarray(linear_bits),
            f"{site}_weight": to_codes(weight, scale_weight),
            f"{site}_bias": to_codes(bias, scale_in * scale_weight / 256),
            f"{site}_mantissa": mantissa,
            f"{site}_shift": shift,
        }

    layers = []
    for layer, values in zip(parameters["layers"], seen["layers"], strict=True):
        scale = {name: scale_of(values[name], linear_limit) for name in ("qkv", "context", "up")}
        scale |= {name: scale_of(values[name], attention_limit) for name in ("query", "key")}
        scale["value"] = scale_of(values["value"], attention_limit)
        scale["gate"] = scale_of(values["gate"], GELU_LIMIT)
        scale["hidden"] = scale_of(values["hidden"], linear_limit)
        scales["layers"].append(scale)
        column_scale = np.repeat(
            [scale["query"], scale["key"], scale["value"]], shape.attention_width
        )
        arrays: Arrays = {
            f"{site}_activation_bits": np.asarray(linear_bits)
            for site in ("qkv", "out", "up", "down")
        }
        arrays |= {"qk_bits": np.asarray(attention_bits), "v_bits": np.asarray(attention_bits)}
        arrays["attention_gain"], arrays["attention_bias"] = norm(
            layer["attention_gain"], layer["attention_bias"], scale["qkv"]
        )
        arrays["ffn_gain"], arrays["ffn_bias"] = norm(
            layer["ffn_gain"], layer["ffn_bias"], scale["up"]
        )
        arrays |= linear("qkv", layer["qkv_weight"], layer["qkv_bias"], scale["qkv"], column_scale)
        arrays |= linear(
            "out", layer["out_weight"], layer["out_bias"], scale["context"], residual_scale
        )
        arrays |= linear("up", layer["up_weight"], layer["up_bias"], scale["up"], scale["gate"])
        arrays |= linear(
            "down", layer["down_weight"], layer["down_bias"], scale["hidden"], residual_scale
        )
        octaves = scale["query"] * scale["key"] / np.sqrt(shape.head_dim) * np.log2(np.e)
        arrays["exp_mantissa"], arrays["exp_shift"] = multiplier(octaves * 4096)
        arrays["context_mantissa"], arrays["context_shift"] = multiplier(
            scale["value"] / attention_limit / scale["context"]
        )
        gate_codes = np.arange(-GELU_LIMIT, GELU_LIMIT + 1)
        table = to_codes(gelu(gate_codes * scale["gate"]), scale["hidden"])
        arrays["gelu_table"] = np.clip(table, -linear_limit, linear_limit)
        if shape.mechanism == "energon":
            codes = np.broadcast_to(threshold, (shape.num_heads, shape.num_rounds))
            arrays["threshold"] = codes.astype(np.int64)
            arrays["query_bits"] = np.asarray(4)
            arrays["key_bits"] = 2 + 2 * np.arange(shape.num_rounds)
        layers.append(arrays)

    input_scale = scale_of(seen["pixels"], linear_limit)
    head_scale = scale_of(seen["head"], linear_limit)
    head_weight_scale = scale_of(parameters["head_weight"], linear_limit)
    scales["logits"] = head_scale * head_weight_scale / 256
    input_mantissa, input_shift = multiplier(1 / 8 / input_scale)
    head_gain, head_offset = norm(parameters["head_gain"], parameters["head_offset"], head_scale)
    ends: Arrays = {
        "input_offset": np.asarray(8),
        "input_mantissa": input_mantissa,
        "input_shift": input_shift,
        "embed_activation_bits": np.asarray(linear_bits),
        "position": to_codes(parameters["position"], residual_scale),
        "norm_epsilon": to_codes(EPSILON * shape.width**2, residual_scale**2),
        "head_gain": head_gain,
        "head_offset": head_offset,
        "head_activation_bits": np.asarray(linear_bits),
        "head_weight_bits": np.asarray(linear_bits),
        "head_weight": to_codes(parameters["head_weight"], head_weight_scale),
        "head_bias": to_codes(parameters["head_bias"], scales["logits"]),
    }
    ends |= linear(
        "embed",
        parameters["embed_weight"],
        parameters["embed_bias"],
        input_scale,
        residual_scale,
    )
    stacked = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
    return Deployment(shape, stacked, ends, parameters, scales), pixels
