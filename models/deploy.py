"""Hardening: trained parameters, policy and calibration to the integers that the chip would hold.

Everything here runs once, in NumPy float64; docs/integer_path.md says how the integers are used.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codesign.calibration import Calibration
from codesign.mechanisms.protocol import Mechanism
from codesign.models.config import ModelConfig
from codesign.models.integer import (
    BIAS_FRACTION_BITS,
    GAIN_SHIFT,
    NORM_FRACTION_BITS,
    RECIPROCAL_BITS,
    RESIDUAL_LIMIT,
)
from codesign.policy import ATTENTION_BITS, Policy, deployed_bits, group
from codesign.quantize import code_limit, multiplier, quantize_codes
from codesign.structure import ACTIVATION_LIMIT, ModelStructure, PatchInput
from codesign.tables import EXP_FRACTION_BITS, exp_table
from codesign.vocabulary import BLOCK_SITES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """Integer arrays of a deployed model, named as in docs/integer_path.md.

    `layers` have a leading axis L; `logit_scale` over the number of pooled tokens turns integer logits into real ones;
    `scales` are the real values of one code by tensor, for the reader of an export.
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

    def real_logits(
        self, logits: NDArray[np.int64], num_pooled: NDArray[Any]
    ) -> NDArray[np.float64]:
        """Returns integer logits `[B, ...]` as real ones; `num_pooled` `[B]` is the model's."""
        number = np.reshape(np.maximum(num_pooled, 1), (-1,) + (1,) * (np.ndim(logits) - 1))
        real: NDArray[np.float64] = np.asarray(logits * self.logit_scale, np.float64) / number
        return real


def reciprocal_table() -> NDArray[np.int64]:
    """Returns 2^28 / (4096 + i + 1/2) for i = 0..4095, rounded."""
    entries = 2**RECIPROCAL_BITS
    table: NDArray[np.int64] = np.rint(2.0**28 / (entries + np.arange(entries) + 0.5)).astype(
        np.int64
    )
    return table


def _gelu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * x * (1.0 + np.asarray([math.erf(value / math.sqrt(2.0)) for value in x]))


def _gelu_tanh(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


NON_LINEARITIES: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: np.asarray(np.maximum(x, 0.0), np.float64),
    "tanh": np.tanh,
}
"""Non-linearities in float64, from which tables are made."""


def activation_table(
    name: str, input_scale: float, output_scale: float, output_limit: int
) -> NDArray[np.int64]:
    """Returns a non-linearity from input codes -511..511 to output codes."""
    x = np.arange(-ACTIVATION_LIMIT, ACTIVATION_LIMIT + 1) * input_scale
    codes = np.rint(NON_LINEARITIES[name](x.astype(np.float64)) / output_scale)
    return np.clip(codes, -output_limit, output_limit).astype(np.int64)


def harden(
    params: dict[str, Any],
    policy: Policy,
    calibration: Calibration,
    config: ModelConfig,
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
            mechanism,
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
    tensors = {name: np.asarray(value) for name, value in scales.items()}
    tensors["logit"] = tensors["query"] * tensors["key"] / math.sqrt(config.structure.head_dim)
    codes = mechanism.codes(knobs, ranges | tensors)
    structure = dataclasses.replace(
        config.structure,
        mechanism=mechanism.name,
        num_rounds=codes["threshold"].shape[-1] if mechanism.has_rounds else 0,
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


def _enter(site: str, residual_scale: float, scale: float) -> dict[str, NDArray[np.int64]]:
    """Returns what turns the residual stream of a post-norm model into the activation of a site."""
    mantissa, shift = multiplier(residual_scale / scale)
    return {f"{site}_enter_mantissa": mantissa, f"{site}_enter_shift": shift}


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
    mechanism: Mechanism,
) -> tuple[dict[str, NDArray[np.int64]], dict[str, float]]:
    """Returns the integer arrays and the scales of one layer."""
    scale = {site: _activation_scale(knobs, ranges, site) for site in BLOCK_SITES}
    qk_bits, v_bits = _bits(knobs, "qk_bits"), _bits(knobs, "v_bits")
    for name, largest in (
        ("query", code_limit(qk_bits)),
        ("key", code_limit(qk_bits)),
        ("value", code_limit(v_bits)),
        ("gelu", ACTIVATION_LIMIT),
    ):
        scale[name] = float(ranges[name]) / largest
    attention = structure.attention_width
    qkv_scale = np.repeat([scale["query"], scale["key"], scale["value"]], attention)
    arrays: dict[str, NDArray[np.int64]] = {}
    for site, name in (("qkv", "attention"), ("up", "ffn")):
        is_post = structure.norm == "post"
        output_scale = residual_scale if is_post else scale[site]
        gain, bias = _norm(params[f"{name}_norm"], output_scale)
        arrays |= {f"{name}_gain": gain, f"{name}_bias": bias}
        if is_post:
            arrays |= _enter(site, residual_scale, scale[site])
    for site, output in (
        ("qkv", qkv_scale),
        ("out", residual_scale),
        ("up", scale["gelu"]),
        ("down", residual_scale),
    ):
        kernel = mechanism.prune_weight(knobs, params[site]["kernel"], site)
        arrays |= _dense(site, params[site] | {"kernel": kernel}, knobs, scale[site], output)
    exponent = scale["query"] * scale["key"] / math.sqrt(structure.head_dim) * math.log2(math.e)
    arrays["exp_mantissa"], arrays["exp_shift"] = multiplier(exponent * 2.0**EXP_FRACTION_BITS)
    context = scale["value"] / (code_limit(qk_bits) * scale["out"])
    arrays["context_mantissa"], arrays["context_shift"] = multiplier(context)
    down_limit: int = code_limit(_bits(knobs, "down.activation_bits"))
    arrays["activation_table"] = activation_table(
        structure.activation, scale["gelu"], scale["down"], down_limit
    )
    arrays["qk_bits"], arrays["v_bits"] = np.asarray(qk_bits), np.asarray(v_bits)
    return arrays, scale


def _harden_ends(
    params: dict[str, Any],
    knobs: dict[str, Any],
    ranges: dict[str, float],
    config: ModelConfig,
    residual_scale: float,
) -> tuple[dict[str, NDArray[np.int64]], dict[str, list[float] | float], float]:
    """Returns the integer arrays outside the blocks, their scales, and the scale of the logits."""
    structure = config.structure
    scales = {site: _activation_scale(knobs, ranges, site) for site in structure.end_sites}
    groups = {
        name: {key: np.asarray(value, np.float64) for key, value in params[name].items()}
        for name in params.keys() - {"blocks", "position"}
    }
    ends = _harden_input(groups, params["position"], knobs, config, residual_scale, scales)
    first = "head" if structure.pooler == "none" else "pool"
    if structure.norm == "pre":
        ends[f"{first}_gain"], ends[f"{first}_offset"] = _norm(groups["norm"], scales[first])
    else:
        ends |= _enter(first, residual_scale, scales[first])
    if structure.pooler != "none":
        pooled_scale = ranges["pooled"] / ACTIVATION_LIMIT
        ends |= _dense("pool", groups["pool"], knobs, scales["pool"], pooled_scale)
        head_limit: int = code_limit(_bits(knobs, "head.activation_bits"))
        ends["pool_table"] = activation_table(
            structure.pooler, pooled_scale, scales["head"], head_limit
        )
    head = groups["head"]
    head_bits = _bits(knobs, "head.weight_bits")
    head_clip = float(knobs["head.weight_clip"])
    weight, weight_scale = _weight_codes(head["kernel"], head_bits, head_clip, by_tensor=True)
    logit_scale = scales["head"] * float(weight_scale[0]) / 2**BIAS_FRACTION_BITS
    ends["head_weight"] = weight
    ends["head_weight_bits"] = np.asarray(head_bits)
    ends["head_activation_bits"] = np.asarray(_bits(knobs, "head.activation_bits"))
    ends["head_bias"] = np.rint(head["bias"] / logit_scale).astype(np.int64)
    return ends, dict(scales), logit_scale


def _harden_input(
    groups: dict[str, dict[str, NDArray[np.float64]]],
    position: Any,
    knobs: dict[str, Any],
    config: ModelConfig,
    residual_scale: float,
    scales: dict[str, float],
) -> dict[str, NDArray[np.int64]]:
    """Returns the integer arrays of the input and its embedding."""
    structure, embed = config.structure, groups["embed"]
    position = np.asarray(position, np.float64)
    ends: dict[str, NDArray[np.int64]] = {}
    embedded_scale = residual_scale
    if isinstance(structure.input, PatchInput):
        ends |= _dense("embed", embed, knobs, scales["embed"], residual_scale)
        ends["input_offset"] = np.asarray(config.pixel_offset)
        ends["input_mantissa"], ends["input_shift"] = multiplier(
            config.pixel_scale / scales["embed"]
        )
    else:
        if structure.norm == "post":
            # The normalisation that follows takes away the scale.
            largest = max(np.abs(embed["table"]).max(), np.abs(position).max())
            embedded_scale = float(largest) / RESIDUAL_LIMIT
        ends["token"] = _residual_codes(embed["table"], embedded_scale)
    ends["position"] = _residual_codes(position, embedded_scale)
    ends["norm_epsilon"] = _epsilon(config, residual_scale)
    if structure.norm == "post":
        gain, offset = _norm(groups["embed_norm"], residual_scale)
        ends |= {"embed_gain": gain, "embed_offset": offset}
        ends["embed_epsilon"] = _epsilon(config, embedded_scale)
    return ends


def _residual_codes(x: NDArray[np.float64], scale: float) -> NDArray[np.int64]:
    return np.clip(np.rint(x / scale), -RESIDUAL_LIMIT, RESIDUAL_LIMIT).astype(np.int64)


def _epsilon(config: ModelConfig, scale: float) -> NDArray[np.int64]:
    """Returns what is added to D^2 times the variance of codes that are worth `scale`."""
    return np.asarray(max(1, round(config.norm_epsilon * (config.structure.width / scale) ** 2)))
