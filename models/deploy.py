"""Hardening: trained parameters, policy and calibration to the integers that the chip would hold.

Everything here runs once, in NumPy float64; docs/integer_path.md says how the integers are used.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codesign.calibration import Calibration
from codesign.mechanisms.protocol import Mechanism
from codesign.models.config import VisionConfig
from codesign.models.integer import (
    BIAS_FRACTION_BITS,
    EXP_FRACTION_BITS,
    GAIN_SHIFT,
    NORM_FRACTION_BITS,
    RECIPROCAL_BITS,
    RESIDUAL_LIMIT,
)
from codesign.policy import ATTENTION_BITS, BLOCK_SITES, Policy, deployed_bits, group
from codesign.quantize import code_limit, multiplier, quantize_codes
from codesign.structure import GELU_LIMIT, ModelStructure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """Integer arrays of a deployed model, named as in docs/integer_path.md.

    `layers` have a leading axis L; `logit_scale / num_tokens` turns integer logits into real ones; `scales` are the real
    values of one code by tensor, for the reader of an export.
    """

    structure: ModelStructure
    layers: dict[str, NDArray[np.int64]]
    ends: dict[str, NDArray[np.int64]]
    logit_scale: float
    scales: dict[str, list[float] | float]

    def hard_arrays(self) -> tuple[dict[str, NDArray[np.int64]], dict[str, NDArray[np.int64]]]:
        """Returns what the JAX hard path reads: `layers`, and `ends` with the fixed tables."""
        tables = {"exp_table": exp_table(), "reciprocal_table": reciprocal_table()}
        return self.layers, self.ends | tables


def exp_table() -> NDArray[np.int64]:
    """Returns 2^16 * 2^-((f + 1/2) / 4096) for f = 0..4095, rounded."""
    entries = 2**EXP_FRACTION_BITS
    fractions = (np.arange(entries) + 0.5) / entries
    table: NDArray[np.int64] = np.rint(2.0**16 * 2.0**-fractions).astype(np.int64)
    return table


def reciprocal_table() -> NDArray[np.int64]:
    """Returns 2^28 / (4096 + i + 1/2) for i = 0..4095, rounded."""
    entries = 2**RECIPROCAL_BITS
    table: NDArray[np.int64] = np.rint(2.0**28 / (entries + np.arange(entries) + 0.5)).astype(
        np.int64
    )
    return table


def gelu_table(input_scale: float, output_scale: float, output_limit: int) -> NDArray[np.int64]:
    """Returns GELU from input codes -511..511 to output codes."""
    x = np.arange(-GELU_LIMIT, GELU_LIMIT + 1) * input_scale
    erf = np.asarray([math.erf(value / math.sqrt(2.0)) for value in x])
    codes = np.rint(0.5 * x * (1.0 + erf) / output_scale)
    return np.clip(codes, -output_limit, output_limit).astype(np.int64)


def harden(
    params: dict[str, Any],
    policy: Policy,
    calibration: Calibration,
    config: VisionConfig,
    mechanism: Mechanism,
) -> Deployment:
    """Returns the integers of a trained model.

    Args:
      params: Parameters of the model.
      policy: Trained knobs; widths are rounded here, floor(b + 1/2).
      calibration: Static ranges.
      config: Sizes and scaling of the model.
      mechanism: The mechanism of the deployment.

    Raises:
      CodesignError: If a scale cannot be expressed as a multiplier and a shift.
    """
    policy = deployed_bits(policy)
    knobs = {name: np.asarray(value, np.float64) for name, value in policy.layers.items()}
    end_knobs = {name: np.asarray(value, np.float64) for name, value in policy.ends.items()}
    ranges = {name: np.asarray(value, np.float64) for name, value in calibration.layers.items()}
    end_ranges = {name: float(value) for name, value in calibration.ends.items()}
    own = {
        name: np.rint(value).astype(np.int64)
        for name, value in knobs.items()
        if group(name) == "bits" and name not in ATTENTION_BITS and "." not in name
    }
    residual_scale = end_ranges["residual"] / RESIDUAL_LIMIT
    per_layer = [
        _harden_layer(
            {site: _slice(params["blocks"][site], index) for site in params["blocks"]},
            {name: value[index] for name, value in knobs.items()},
            {name: value[index] for name, value in ranges.items()},
            config.structure,
            residual_scale,
        )
        for index in range(config.structure.num_layers)
    ]
    layers = {name: np.stack([one[0][name] for one in per_layer]) for name in per_layer[0][0]}
    ends, end_scales, logit_scale = _harden_ends(
        params, end_knobs, end_ranges, config, residual_scale
    )
    scales: dict[str, list[float] | float] = {
        name: [one[1][name] for one in per_layer] for name in per_layer[0][1]
    } | {"residual": residual_scale}
    codes = mechanism.codes(
        knobs, ranges | {name: np.asarray(value) for name, value in scales.items()}
    )
    structure = dataclasses.replace(
        config.structure,
        mechanism=mechanism.name,
        num_rounds=codes["threshold"].shape[-1] if "threshold" in codes else 0,
    )
    return Deployment(
        structure=structure,
        layers=layers | codes | own,
        ends=ends,
        logit_scale=logit_scale,
        scales=scales | end_scales,
    )


def _slice(group: dict[str, Any], index: int) -> dict[str, NDArray[np.float64]]:
    return {name: np.asarray(value[index], np.float64) for name, value in group.items()}


def _bits(knobs: dict[str, Any], name: str) -> int:
    return round(float(knobs[name]))


def _activation_scale(knobs: dict[str, Any], ranges: dict[str, Any], site: str) -> float:
    """Returns the real value of one activation code entering `site`."""
    largest: int = code_limit(_bits(knobs, f"{site}.activation_bits"))
    return float(ranges[site]) * math.exp(float(knobs[f"{site}.activation_clip"])) / largest


def _weight_codes(
    kernel: NDArray[np.float64], bits: int, clip: float, *, by_tensor: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns weight codes and the scale of each output column `[outputs]`; exp(`clip`) is a factor on the range."""
    largest = np.max(np.abs(kernel), axis=None if by_tensor else 0, keepdims=True)
    scale = np.maximum(largest, 1e-12) * math.exp(clip) / code_limit(bits)
    scale = np.broadcast_to(scale, (1, kernel.shape[1]))
    return quantize_codes(kernel, scale, bits), scale[0]


def _norm(
    layer: dict[str, NDArray[np.float64]], scale: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns gain and bias of a normalisation whose result is in units of `scale`."""
    gain = np.rint(layer["scale"] / scale * 2.0 ** (GAIN_SHIFT - NORM_FRACTION_BITS))
    bias = np.rint(layer["bias"] / scale * 2.0**GAIN_SHIFT)
    return gain.astype(np.int64), bias.astype(np.int64)


def _dense(
    site: str,
    layer: dict[str, NDArray[np.float64]],
    knobs: dict[str, Any],
    input_scale: float,
    output_scale: float | NDArray[np.float64],
) -> dict[str, NDArray[np.int64]]:
    """Returns the integer arrays of one dense product."""
    weight_bits = _bits(knobs, f"{site}.weight_bits")
    weight, weight_scale = _weight_codes(
        layer["kernel"], weight_bits, float(knobs[f"{site}.weight_clip"])
    )
    accumulator_scale = input_scale * weight_scale / 2**BIAS_FRACTION_BITS
    mantissa, shift = multiplier(accumulator_scale / output_scale)
    return {
        f"{site}_weight": weight,
        f"{site}_weight_bits": np.asarray(weight_bits),
        f"{site}_activation_bits": np.asarray(_bits(knobs, f"{site}.activation_bits")),
        f"{site}_bias": np.rint(layer["bias"] / accumulator_scale).astype(np.int64),
        f"{site}_mantissa": mantissa,
        f"{site}_shift": shift,
    }


def _harden_layer(
    params: dict[str, dict[str, NDArray[np.float64]]],
    knobs: dict[str, Any],
    ranges: dict[str, Any],
    structure: ModelStructure,
    residual_scale: float,
) -> tuple[dict[str, NDArray[np.int64]], dict[str, float]]:
    """Returns the integer arrays and the scales of one layer."""
    scale = {site: _activation_scale(knobs, ranges, site) for site in BLOCK_SITES}
    qk_bits, v_bits = _bits(knobs, "qk_bits"), _bits(knobs, "v_bits")
    for name, largest in (
        ("query", code_limit(qk_bits)),
        ("key", code_limit(qk_bits)),
        ("value", code_limit(v_bits)),
        ("gelu", GELU_LIMIT),
    ):
        scale[name] = float(ranges[name]) / largest
    attention = structure.attention_width
    qkv_scale = np.repeat([scale["query"], scale["key"], scale["value"]], attention)
    arrays: dict[str, NDArray[np.int64]] = {}
    arrays["attention_gain"], arrays["attention_bias"] = _norm(
        params["attention_norm"], scale["qkv"]
    )
    arrays["ffn_gain"], arrays["ffn_bias"] = _norm(params["ffn_norm"], scale["up"])
    arrays |= _dense("qkv", params["qkv"], knobs, scale["qkv"], qkv_scale)
    arrays |= _dense("out", params["out"], knobs, scale["out"], residual_scale)
    arrays |= _dense("up", params["up"], knobs, scale["up"], scale["gelu"])
    arrays |= _dense("down", params["down"], knobs, scale["down"], residual_scale)
    exponent = scale["query"] * scale["key"] / math.sqrt(structure.head_dim) * math.log2(math.e)
    arrays["exp_mantissa"], arrays["exp_shift"] = multiplier(exponent * 2.0**EXP_FRACTION_BITS)
    context = scale["value"] / (code_limit(qk_bits) * scale["out"])
    arrays["context_mantissa"], arrays["context_shift"] = multiplier(context)
    down_limit: int = code_limit(_bits(knobs, "down.activation_bits"))
    arrays["gelu_table"] = gelu_table(scale["gelu"], scale["down"], down_limit)
    arrays["qk_bits"], arrays["v_bits"] = np.asarray(qk_bits), np.asarray(v_bits)
    return arrays, scale


def _harden_ends(
    params: dict[str, Any],
    knobs: dict[str, Any],
    ranges: dict[str, float],
    config: VisionConfig,
    residual_scale: float,
) -> tuple[dict[str, NDArray[np.int64]], dict[str, list[float] | float], float]:
    """Returns the integer arrays outside the blocks, their scales, and the scale of the logits."""
    embed_scale = _activation_scale(knobs, ranges, "embed")
    head_scale = _activation_scale(knobs, ranges, "head")
    embed = {name: np.asarray(value, np.float64) for name, value in params["embed"].items()}
    head = {name: np.asarray(value, np.float64) for name, value in params["head"].items()}
    norm = {name: np.asarray(value, np.float64) for name, value in params["norm"].items()}
    ends = _dense("embed", embed, knobs, embed_scale, residual_scale)
    ends["input_offset"] = np.asarray(config.pixel_offset)
    ends["input_mantissa"], ends["input_shift"] = multiplier(config.pixel_scale / embed_scale)
    position = np.rint(np.asarray(params["position"], np.float64) / residual_scale)
    ends["position"] = np.clip(position, -RESIDUAL_LIMIT, RESIDUAL_LIMIT).astype(np.int64)
    epsilon = config.norm_epsilon * (config.structure.width / residual_scale) ** 2
    ends["norm_epsilon"] = np.asarray(max(1, round(epsilon)))
    ends["head_gain"], ends["head_offset"] = _norm(norm, head_scale)
    head_bits = _bits(knobs, "head.weight_bits")
    head_clip = float(knobs["head.weight_clip"])
    weight, weight_scale = _weight_codes(head["kernel"], head_bits, head_clip, by_tensor=True)
    logit_scale = head_scale * float(weight_scale[0]) / 2**BIAS_FRACTION_BITS
    ends["head_weight"] = weight
    ends["head_weight_bits"] = np.asarray(head_bits)
    ends["head_activation_bits"] = np.asarray(_bits(knobs, "head.activation_bits"))
    ends["head_bias"] = np.rint(head["bias"] / logit_scale).astype(np.int64)
    scales: dict[str, list[float] | float] = {"embed": embed_scale, "head": head_scale}
    return ends, scales, logit_scale
