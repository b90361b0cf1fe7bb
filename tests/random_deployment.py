"""Builds small random transformers in float64 and their integer deployments, in NumPy alone."""

import dataclasses
from typing import Any

import numpy as np

from codesign.structure import ACTIVATION_LIMIT, ModelStructure, PatchInput, TokenInput

Arrays = dict[str, np.ndarray]
EPSILON = 1e-5  # of the normalisation, in squared real units
MANTISSA_BITS = 15
PRUNED_FRACTION = 0.3  # of the elements of every site, by acceltran


def patches(**changes: Any) -> PatchInput:
    """6 x 6 pixels in 9 patches that overlap."""
    sizes = {"image_size": 6, "channels": 1, "patch_size": 4, "stride": 2, "padding": 1}
    return PatchInput(**(sizes | changes))


WORDS = TokenInput(vocabulary_size=23, max_tokens=10)

VARIANTS: dict[str, dict[str, Any]] = {
    "patches": {"input": patches()},
    "prefix": {"input": patches(channels=3, num_prefix=2), "pooling": "first"},
    "bert": {"input": WORDS, "norm": "post", "activation": "relu"},
    "pooler": {"input": WORDS, "norm": "post", "pooling": "first", "pooler": "tanh"},
    "decoder": {
        "input": WORDS,
        "is_causal": True,
        "activation": "gelu_tanh",
        "pooling": "all",
        "num_outputs": 23,
    },
}
"""Every way of building a model that the integer path has."""

MECHANISMS = {
    "dense": 0,
    "energon": 2,
    "acceltran": 0,
    "sofa": 2,
    "lapa": 3,
    "esact": 0,
    "topk": 1,
    "bitserial": 1,
    "sanger": 1,
    "a3": 1,
    "spatten": 0,
    "fact": 0,
}
"""Rounds by mechanism."""


@dataclasses.dataclass(frozen=True)
class Deployment:
    """Integers, and the real model they came from; `scales` are the real values of one code."""

    structure: ModelStructure
    layers: Arrays
    ends: Arrays
    parameters: dict[str, Any]
    scales: dict[str, Any]


def structure(
    variant: str = "patches", mechanism: str = "energon", **changes: Any
) -> ModelStructure:
    """A transformer of 2 layers and 2 heads."""
    fields = {
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 8,
        "width": 16,
        "hidden": 32,
        "num_outputs": 5,
        "mechanism": mechanism,
        "num_rounds": MECHANISMS[mechanism],
    }
    return ModelStructure(**(fields | VARIANTS[variant] | changes))


def random_inputs(shape: ModelStructure, seed: int = 0, batch_size: int = 8) -> Arrays:
    """Images of pixels 0 to 16; or padded sequences, the first without padding, the last of one token."""
    rng = np.random.default_rng(seed)
    if isinstance(shape.input, PatchInput):
        size, channels = shape.input.image_size, shape.input.channels
        return {"pixels": rng.integers(0, 17, (batch_size, size, size, channels))}
    lengths = np.linspace(shape.max_tokens, 1, batch_size).astype(int)
    return {
        "tokens": rng.integers(0, shape.input.vocabulary_size, (batch_size, shape.max_tokens)),
        "valid": np.arange(shape.max_tokens) < lengths[:, None],
    }


def largest_code(bits: int) -> int:
    return int(2 ** (bits - 1) - 1)


def multiplier(ratio: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Mantissa of 15 bits and shift of a real factor."""
    ratio = np.asarray(ratio, np.float64)
    shift = np.clip(MANTISSA_BITS - np.frexp(ratio)[1], 0, 62)
    return np.rint(ratio * 2.0**shift).astype(np.int64), shift.astype(np.int64)


def to_codes(values: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    return np.rint(values / scale).astype(np.int64)


def scale_of(values: np.ndarray, limit: int) -> float:
    return float(np.abs(values).max() / limit)


def gelu(values: np.ndarray) -> np.ndarray:
    return 0.5 * values * (1 + np.tanh(np.sqrt(2 / np.pi) * (values + 0.044715 * values**3)))


ACTIVATIONS = {
    "gelu": gelu,  # within 0.001 of the exact one
    "gelu_tanh": gelu,
    "relu": lambda values: np.maximum(values, 0.0),
    "tanh": np.tanh,
}


def float_norm(values: np.ndarray, gain: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = values - values.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * gain + bias


def random_parameters(shape: ModelStructure, rng: np.random.Generator) -> dict[str, Any]:
    width, hidden, attention = shape.width, shape.hidden, shape.attention_width

    def linear(site: str, inner: int, outer: int, gain: float = 1.0) -> Arrays:
        return {
            f"{site}_weight": rng.normal(size=(inner, outer)) * gain / np.sqrt(inner),
            f"{site}_bias": 0.1 * rng.normal(size=outer),
        }

    def norm(gain: str, bias: str) -> Arrays:
        return {gain: 1 + 0.2 * rng.normal(size=width), bias: 0.1 * rng.normal(size=width)}

    parameters: dict[str, Any] = {"position": 0.3 * rng.normal(size=(shape.max_tokens, width))}
    parameters["layers"] = [
        norm("attention_gain", "attention_bias")
        | linear("qkv", width, 3 * attention, 1.5)
        | linear("out", attention, width)
        | norm("ffn_gain", "ffn_bias")
        | linear("up", width, hidden)
        | linear("down", hidden, width)
        for _ in range(shape.num_layers)
    ]
    if isinstance(shape.input, PatchInput):
        parameters |= linear("embed", shape.input.patch_values, width)
    else:
        parameters["token"] = rng.normal(size=(shape.input.vocabulary_size, width))
    for name in ("embed", "pool", "head"):
        parameters |= norm(f"{name}_gain", f"{name}_offset")
    return parameters | linear("pool", width, width) | linear("head", width, shape.num_outputs)


def _embedded(shape: ModelStructure, parameters: dict[str, Any], inputs: Arrays) -> Arrays:
    """The embedding in real numbers, and the pixels it saw."""
    if isinstance(shape.input, TokenInput):
        tokens = inputs["tokens"]
        position = parameters["position"][: tokens.shape[1]]
        return {"embedding": parameters["token"][tokens] + position}
    sizes = shape.input
    images = (inputs["pixels"] - 8.0) / 8.0
    margin = (sizes.padding, sizes.padding)
    images = np.pad(images, ((0, 0), margin, margin, (0, 0)))
    starts = range(0, sizes.grid_size * sizes.stride, sizes.stride)
    cut = [
        images[:, y : y + sizes.patch_size, x : x + sizes.patch_size].reshape(len(images), -1)
        for y in starts
        for x in starts
    ]
    embedded = np.stack(cut, axis=1) @ parameters["embed_weight"] + parameters["embed_bias"]
    prefix = np.zeros((len(images), sizes.num_prefix, shape.width))
    embedded = np.concatenate([prefix, embedded], axis=1) + parameters["position"]
    return {"embedding": embedded, "pixels": images}


def run_float(
    shape: ModelStructure,
    parameters: dict[str, Any],
    inputs: Arrays,
    result: Arrays | None = None,
) -> dict[str, Any]:
    """The real model; given the integer tensors of a mechanism, what it dropped is dropped here too."""
    seen: dict[str, Any] = _embedded(shape, parameters, inputs)
    residual = seen["embedding"]
    batch_size, num_tokens = residual.shape[:2]
    valid = inputs.get("valid", np.ones((batch_size, num_tokens), bool))
    exists = np.broadcast_to(valid[:, None, None, :], (batch_size, 1, num_tokens, num_tokens))
    if shape.is_causal:
        exists = exists & (np.arange(num_tokens)[:, None] >= np.arange(num_tokens))
    is_post = shape.norm == "post"
    if is_post:
        residual = float_norm(residual, parameters["embed_gain"], parameters["embed_offset"])
    seen |= {"embedded": residual, "layers": []}

    def leave(total: np.ndarray, gain: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return float_norm(total, gain, bias) if is_post else total

    for number, layer in enumerate(parameters["layers"]):

        def prune(name: str, values: np.ndarray, number: int = number) -> np.ndarray:
            if result is None or shape.mechanism != "acceltran":
                return values
            return np.where(result[name][number] != 0, values, 0.0)

        def enter(r: np.ndarray, gain: np.ndarray, bias: np.ndarray) -> np.ndarray:
            return r if is_post else float_norm(r, gain, bias)

        gain, bias = layer["attention_gain"], layer["attention_bias"]
        entered = enter(residual, gain, bias)
        qkv = entered @ layer["qkv_weight"] + layer["qkv_bias"]
        heads = (batch_size, num_tokens, shape.num_heads, shape.head_dim)
        query, key, value = (
            prune(name, part.reshape(heads).transpose(0, 2, 1, 3))
            for name, part in zip(("query", "key", "value"), np.split(qkv, 3, axis=-1), strict=True)
        )
        raw_scores = prune("raw_scores", query @ key.swapaxes(-1, -2))
        kept = exists if result is None or "keep" not in result else result["keep"][number, -1]
        scores = np.where(kept, raw_scores / np.sqrt(shape.head_dim), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        probabilities = prune("probabilities", weights / weights.sum(-1, keepdims=True))
        context = (probabilities @ value).transpose(0, 2, 1, 3)
        if result is not None and "source" in result:
            sources = result["source"][number].swapaxes(1, 2)[..., None]
            split = context.reshape(*sources.shape[:3], -1)
            context = np.take_along_axis(split, sources, axis=1)
        context = prune("context", context.reshape(batch_size, num_tokens, -1))
        branch = prune("attention_branch", context @ layer["out_weight"] + layer["out_bias"])
        total = residual + branch
        attended = leave(total, gain, bias)

        gain, bias = layer["ffn_gain"], layer["ffn_bias"]
        up_entered = enter(attended, gain, bias)
        gate = prune("gelu", up_entered @ layer["up_weight"] + layer["up_bias"])
        hidden = ACTIVATIONS[shape.activation](gate)
        ffn_branch = prune("ffn_branch", hidden @ layer["down_weight"] + layer["down_bias"])
        if result is not None and "ffn_source" in result:
            sources = result["ffn_source"][number][..., None]
            ffn_branch = np.take_along_axis(ffn_branch, sources, axis=1)
        ffn_total = attended + ffn_branch
        residual = leave(ffn_total, gain, bias)
        seen["layers"].append(
            {
                "qkv": entered,
                "query": query,
                "key": key,
                "value": value,
                "raw_scores": raw_scores,
                "probabilities": probabilities,
                "context": context,
                "attention_branch": branch,
                "totals": np.concatenate([total, ffn_total]),
                "attended": attended,
                "up": up_entered,
                "gelu": gate,
                "hidden": hidden,
                "ffn_branch": ffn_branch,
                "residual": residual,
            }
        )

    read = residual[:, 0] if shape.pooling == "first" else residual
    reader = "head" if shape.pooler == "none" else "pool"
    if not is_post:
        read = float_norm(read, parameters[f"{reader}_gain"], parameters[f"{reader}_offset"])
    if reader == "pool":
        seen["pool"] = read
        seen["pool_gate"] = read @ parameters["pool_weight"] + parameters["pool_bias"]
        read = ACTIVATIONS[shape.pooler](seen["pool_gate"])
    seen["head"] = read
    if shape.pooling == "mean":
        read = np.where(valid[..., None], read, 0).sum(1) / valid.sum(1, keepdims=True)
    seen["logits"] = read @ parameters["head_weight"] + parameters["head_bias"]
    return seen


def build(
    shape: ModelStructure,
    *,
    seed: int = 0,
    threshold: int | np.ndarray = 0,
    linear_bits: int = 8,
    attention_bits: int = 12,
) -> tuple[Deployment, Arrays]:
    """Returns a deployment and the inputs it was calibrated on; `threshold` is that of energon."""
    parameters = random_parameters(shape, np.random.default_rng(seed))
    inputs = random_inputs(shape, seed)
    seen = run_float(shape, parameters, inputs)
    linear_limit, attention_limit = largest_code(linear_bits), largest_code(attention_bits)
    streams = [seen["embedded"]]
    streams += [values[name] for values in seen["layers"] for name in ("totals", "residual")]
    residual_scale = max(scale_of(values, 30000) for values in streams)
    scales: dict[str, Any] = {"residual": residual_scale, "layers": []}

    def norm(source: dict[str, Any], gain: str, bias: str, scale: float) -> Arrays:
        return {
            gain: to_codes(source[gain] * 2.0**16, scale),
            bias: to_codes(source[bias] * 2.0**30, scale),
        }

    def enter(site: str, scale: float) -> Arrays:
        mantissa, shift = multiplier(residual_scale / scale)
        return {f"{site}_enter_mantissa": mantissa, f"{site}_enter_shift": shift}

    def linear(source: dict[str, Any], site: str, scale_in: float, scale_out: Any) -> Arrays:
        weight = source[f"{site}_weight"]
        scale_weight = np.abs(weight).max(axis=0) / linear_limit
        mantissa, shift = multiplier(scale_in * scale_weight / 256 / scale_out)
        return {
            f"{site}_activation_bits": np.asarray(linear_bits),
            f"{site}_weight_bits": np.asarray(linear_bits),
            f"{site}_weight": to_codes(weight, scale_weight),
            f"{site}_bias": to_codes(source[f"{site}_bias"], scale_in * scale_weight / 256),
            f"{site}_mantissa": mantissa,
            f"{site}_shift": shift,
        }

    def table(name: str, scale_in: float, scale_out: float) -> np.ndarray:
        reals = np.arange(-ACTIVATION_LIMIT, ACTIVATION_LIMIT + 1) * scale_in
        codes = to_codes(ACTIVATIONS[name](reals), scale_out)
        return np.clip(codes, -linear_limit, linear_limit)

    layers = []
    for layer, values in zip(parameters["layers"], seen["layers"], strict=True):
        scale = {name: scale_of(values[name], linear_limit) for name in ("qkv", "context", "up")}
        scale |= {
            name: scale_of(values[name], attention_limit) for name in ("query", "key", "value")
        }
        scale["gelu"] = scale_of(values["gelu"], ACTIVATION_LIMIT)
        scale["hidden"] = scale_of(values["hidden"], linear_limit)
        scale["raw_scores"] = scale["query"] * scale["key"]
        scale["probabilities"] = 1 / attention_limit
        scale |= dict.fromkeys(
            ("attention_branch", "attended", "ffn_branch", "residual"), residual_scale
        )
        scales["layers"].append(scale)
        columns = np.repeat([scale["query"], scale["key"], scale["value"]], shape.attention_width)
        arrays = linear(layer, "qkv", scale["qkv"], columns)
        arrays |= linear(layer, "out", scale["context"], residual_scale)
        arrays |= linear(layer, "up", scale["up"], scale["gelu"])
        arrays |= linear(layer, "down", scale["hidden"], residual_scale)
        arrays |= {"qk_bits": np.asarray(attention_bits), "v_bits": np.asarray(attention_bits)}
        for name, site in (("attention", "qkv"), ("ffn", "up")):
            out_scale = scale[site] if shape.norm == "pre" else residual_scale
            arrays |= norm(layer, f"{name}_gain", f"{name}_bias", out_scale)
            if shape.norm == "post":
                arrays |= enter(site, scale[site])
        octaves = scale["raw_scores"] / np.sqrt(shape.head_dim) * np.log2(np.e)
        arrays["exp_mantissa"], arrays["exp_shift"] = multiplier(octaves * 4096)
        arrays["context_mantissa"], arrays["context_shift"] = multiplier(
            scale["value"] / attention_limit / scale["context"]
        )
        arrays["activation_table"] = table(shape.activation, scale["gelu"], scale["hidden"])
        if shape.mechanism == "energon":
            codes = np.broadcast_to(threshold, (shape.num_heads, shape.num_rounds))
            arrays["threshold"] = codes.astype(np.int64)
            arrays["query_bits"] = np.asarray(4)
            arrays["key_bits"] = 2 + 2 * np.arange(shape.num_rounds)
        if shape.mechanism == "lapa":
            alphas = np.linspace(90, 200, shape.num_heads * 3).astype(np.int64)
            arrays["threshold"] = np.reshape(alphas, (shape.num_heads, 3))
            arrays["key_bits"] = np.asarray([2, 4, 8] if len(layers) % 2 else [3, 5, 6])
        if shape.mechanism == "sofa":
            largest = np.abs(values["raw_scores"]).max() / scale["raw_scores"]
            arrays["score_shift"] = np.asarray(max(int(np.frexp(largest)[1]) - 15, 0))
            # Few enough keys of few enough segments that both rules drop some.
            arrays["tile_bits"] = np.asarray(2 + len(layers) % 2)
            shares = np.linspace(300, 900, shape.num_heads).astype(np.int64)
            radii = np.linspace(20000, 2000, shape.num_heads).astype(np.int64)
            arrays["threshold"] = np.stack([shares, radii], axis=-1)
        if shape.mechanism == "esact":
            shares = np.linspace(400, 900, shape.num_heads).astype(np.int64)
            similarities = np.linspace(80, 127, shape.num_heads).astype(np.int64)
            arrays["threshold"] = np.stack([shares, similarities], axis=-1)
            arrays["vote_cut"] = np.asarray(1 + len(layers) % 2)
        if shape.mechanism == "topk":
            shares = np.linspace(300, 900, shape.num_heads).astype(np.int64)
            arrays["threshold"] = shares[:, None]
        if shape.mechanism == "bitserial":
            arrays["plane_bits"] = np.asarray(9 + len(layers) % 2)
            unit = scale["raw_scores"] * 2.0 ** max(attention_bits - 9 - len(layers) % 2, 0)
            unit *= 2.0 ** max(attention_bits - 12, 0)
            largest = np.abs(values["raw_scores"]).max() / unit
            distances = np.linspace(0.1, 0.6, shape.num_heads) * largest
            arrays["threshold"] = distances.astype(np.int64)[:, None]
        if shape.mechanism == "sanger":
            probabilities = np.linspace(0.02, 0.2, shape.num_heads) * 2**16
            arrays["threshold"] = probabilities.astype(np.int64)[:, None]
            arrays["query_range"], arrays["key_range"] = np.asarray(26000), np.asarray(22000)
            unit = scale["raw_scores"] / np.sqrt(shape.head_dim) * 4.0 ** (attention_bits - 8)
            unit *= 26000 * 22000 / (7 * 2**15) ** 2
            arrays["mask_mantissa"], arrays["mask_shift"] = multiplier(unit * np.log2(np.e) * 4096)
        if shape.mechanism == "a3":
            largest = np.abs(values["raw_scores"]).max() / scale["raw_scores"]
            distances = np.linspace(0.1, 0.5, shape.num_heads) * largest
            arrays["threshold"] = distances.astype(np.int64)[:, None]
            arrays["search_bits"] = np.asarray(3 + 2 * (len(layers) % 2))
        if shape.mechanism == "spatten":
            # The first layer keeps all; heads are ranked where there are several.
            shares = [1024, 1024, 700, 60] if not layers else [800, 500, 600, 90]
            arrays["threshold"] = np.asarray(shares)
            arrays["head_factor"] = np.asarray(900 + 100 * (len(layers) % 2))
        if shape.mechanism == "fact":
            shares = np.linspace(400, 900, shape.num_heads).astype(np.int64)
            gaps = np.linspace(300, 6000, shape.num_heads).astype(np.int64)
            arrays["threshold"] = np.stack([shares, gaps], axis=-1)
            arrays["importance"] = np.asarray(230 + 40 * (len(layers) % 2))
        if shape.mechanism == "acceltran":
            sites = "query key value raw_scores probabilities context attention_branch gelu"
            quantiles = [
                np.quantile(np.abs(values[name]), PRUNED_FRACTION) / scale[name]
                for name in (*sites.split(), "ffn_branch")
            ]
            arrays["threshold"] = np.floor(quantiles).astype(np.int64)
        layers.append(arrays)

    embed_scale = residual_scale if shape.norm == "pre" else scale_of(seen["embedding"], 30000)
    ends: Arrays = {
        "position": to_codes(parameters["position"], embed_scale),
        "norm_epsilon": to_codes(np.asarray(EPSILON * shape.width**2), residual_scale**2),
    }
    if isinstance(shape.input, PatchInput):
        input_scale = scale_of(seen["pixels"], linear_limit)
        ends["input_offset"] = np.asarray(8)
        ends["input_mantissa"], ends["input_shift"] = multiplier(1 / 8 / input_scale)
        ends |= linear(parameters, "embed", input_scale, embed_scale)
    else:
        ends["token"] = to_codes(parameters["token"], embed_scale)
    if shape.norm == "post":
        ends |= norm(parameters, "embed_gain", "embed_offset", residual_scale)
        ends["embed_epsilon"] = to_codes(np.asarray(EPSILON * shape.width**2), embed_scale**2)
    reader = "head" if shape.pooler == "none" else "pool"
    reader_scale = scale_of(seen[reader], linear_limit)
    if shape.norm == "pre":
        ends |= norm(parameters, f"{reader}_gain", f"{reader}_offset", reader_scale)
    else:
        ends |= enter(reader, reader_scale)
    head_scale = scale_of(seen["head"], linear_limit)
    if reader == "pool":
        gate_scale = scale_of(seen["pool_gate"], ACTIVATION_LIMIT)
        ends |= linear(parameters, "pool", reader_scale, gate_scale)
        ends["pool_table"] = table(shape.pooler, gate_scale, head_scale)
    head_weight_scale = scale_of(parameters["head_weight"], linear_limit)
    scales["logits"] = head_scale * head_weight_scale / 256
    ends |= {
        "head_activation_bits": np.asarray(linear_bits),
        "head_weight_bits": np.asarray(linear_bits),
        "head_weight": to_codes(parameters["head_weight"], head_weight_scale),
        "head_bias": to_codes(parameters["head_bias"], scales["logits"]),
    }
    stacked = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
    return Deployment(shape, stacked, ends, parameters, scales), inputs


def real_logits(deployment: Deployment, logits: np.ndarray, inputs: Arrays) -> np.ndarray:
    """Integer logits as real numbers."""
    if deployment.structure.pooling != "mean":
        return logits * deployment.scales["logits"]
    num_tokens = deployment.structure.max_tokens
    valid = inputs.get("valid", np.ones((len(logits), num_tokens), bool))
    return logits * deployment.scales["logits"] / valid.sum(1, keepdims=True)
