"""Transformers: an embedding of patches or tokens in front of the blocks, pooling and a linear head behind them.

`apply` is the float path (plain, relaxed or straight-through), `apply_hard` the deployed integer path. Both return outputs,
the workload of the batch, and on request the tensors that docs/integer_path.md names.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from codesign.calibration import Calibration
from codesign.fake_quantize import RESIDUAL_BITS, counted_widths
from codesign.gates import Relaxation
from codesign.mechanisms.protocol import Carry, Context, Mechanism
from codesign.models.arithmetic import FloatArithmetic
from codesign.models.config import ModelConfig
from codesign.models.integer import (
    BIAS_FRACTION_BITS,
    LINEAR_CODE_BITS,
    RESIDUAL_LIMIT,
    IntegerArithmetic,
    limit,
    normalize,
    requantize,
    saturate,
)
from codesign.models.transformer import BlockOutput, ModelOutput, block, run_layers
from codesign.policy import Policy, dense_knobs
from codesign.quantize import exact_einsum, quantize
from codesign.references import tensor_names
from codesign.structure import ModelStructure, PatchInput
from codesign.workload import Gemm, Workload, gemm

Inputs = Mapping[str, ArrayLike]
"""`pixels` `[B, image, image]` (or with channels last), or `tokens` and `valid` `[B, T]`."""


def windows(pixels: jax.Array, patches: PatchInput) -> jax.Array:
    """Cuts images into one vector per patch: rows of pixels first, channels last; padding is zero.

    Args:
      pixels: Images, `[B, image, image]` or `[B, image, image, channels]`.
      patches: Sizes of image and patches.

    Returns:
      `[B, patches, P]`, dtype of `pixels`.
    """
    batch, size = pixels.shape[0], patches.image_size
    images = jnp.reshape(pixels, (batch, size, size, patches.channels))
    pad = patches.padding
    images = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    starts = jnp.arange(patches.grid_size) * patches.stride
    offsets = jnp.arange(patches.patch_size)
    index = starts[:, None] + offsets[None, :]
    cut = images[:, index][:, :, :, index]  # [B, grid, patch, grid, patch, channels]
    cut = jnp.swapaxes(cut, 2, 3)
    return jnp.reshape(cut, (batch, patches.num_patches, patches.patch_values))


def existing_tokens(inputs: Inputs, structure: ModelStructure, dtype: Any) -> jax.Array:
    """Returns 1 for tokens that exist, `[B, T]`."""
    if not isinstance(structure.input, PatchInput):
        return jnp.asarray(inputs["valid"], dtype)
    valid = jnp.ones((jnp.shape(inputs["pixels"])[0], structure.max_tokens), dtype)
    # Not a constant to the compiler, which would spend its time on folding masks.
    held: jax.Array = jax.lax.optimization_barrier(valid)  # type: ignore[no-untyped-call]
    return held


def existing_pairs(valid: jax.Array, structure: ModelStructure) -> jax.Array:
    """Returns 1 for query-key pairs that exist, `[B, 1, T, S]`; `valid` are the tokens, `[B, T]`."""
    batch, tokens = valid.shape
    pairs = jnp.broadcast_to(valid[:, None, None, :], (batch, 1, tokens, tokens))
    return jnp.tril(pairs) if structure.is_causal else pairs


def apply(
    params: dict[str, Any],
    policy: Policy | None,
    calibration: Calibration | None,
    inputs: Inputs,
    *,
    config: ModelConfig,
    mechanism: Mechanism,
    relaxation: Relaxation | None,
    tracing: bool = False,
    calibrating: bool = False,
) -> ModelOutput:
    """Runs the float path.

    Args:
      params: Parameters as `codesign.models.parameters.init_params` returns them.
      policy: Knobs; None with `relaxation` None.
      calibration: Static ranges; None with `relaxation` None.
      inputs: Raw pixels, or tokens and which of them exist.
      config: Sizes and scaling.
      mechanism: The mechanism whose soft hooks run.
      relaxation: Temperature and path; None: plain floating point, nothing quantised (mechanism must have no knobs).
      tracing: Whether to return the tensors of every layer, the mechanism's decisions included.
      calibrating: Whether to measure the ranges of all tensors, and those that the mechanism wants (into `observed`).

    Returns:
      Real logits, the workload, tensors, and absolute maxima.
    """
    structure = config.structure
    valid = existing_tokens(inputs, structure, params["position"].dtype)
    pairs = existing_pairs(valid, structure)
    if policy is None or calibration is None:
        assert relaxation is None, "a quantised path needs a policy and a calibration"
        policy = dense_knobs(
            structure.num_layers,
            linear_bits=8.0,
            attention_bits=16.0,
            end_sites=structure.end_sites,
        )
        ranges: dict[str, dict[str, jax.Array]] = {"layers": {}, "ends": {}}
    else:
        ranges = {"layers": calibration.layers, "ends": calibration.ends}
    counting = relaxation or Relaxation(
        temperature=jnp.ones(()), smoothness=jnp.ones(()), straight_through=True
    )
    widths = counted_widths(policy.layers, counting)
    end_widths = counted_widths(policy.ends, counting)
    ends = FloatArithmetic(
        params,
        policy.ends,
        ranges["ends"],
        valid,
        relaxation,
        structure=structure,
        norm_epsilon=config.norm_epsilon,
        residual_range=ranges["ends"].get("residual"),
        observing=calibrating,
    )
    residual = _embedded(ends, inputs, config)
    ends.observe("residual", residual)
    residual_scale = (
        {} if relaxation is None else {"residual": ranges["ends"]["residual"] / RESIDUAL_LIMIT}
    )

    def layer_fn(
        layer: Any, residual: jax.Array, valid: jax.Array, carry: Carry
    ) -> tuple[jax.Array, jax.Array, Carry, BlockOutput]:
        arithmetic = FloatArithmetic(
            layer["params"],
            layer["knobs"],
            layer["ranges"],
            valid,
            relaxation,
            structure=structure,
            norm_epsilon=config.norm_epsilon,
            residual_range=ranges["ends"].get("residual"),
            hooks=mechanism.soft,
            observing=calibrating,
        )
        context = Context(
            knobs=layer["knobs"],
            widths=layer["widths"],
            ranges=layer["ranges"],
            relaxation=counting,
            valid=valid,
            pairs=pairs * valid[:, None, None, :],
            scales=arithmetic.scales() | residual_scale,
            tracing=tracing,
            calibrating=calibrating,
            is_uniform=not structure.is_causal,
            width=structure.width,
        )
        residual, valid, carry, output = block(
            arithmetic, mechanism.soft, context, structure, residual, carry
        )
        observed = arithmetic.observed | output.observed
        return residual, valid, carry, BlockOutput(output.workload, output.trace, observed)

    stacked = {
        "params": params["blocks"],
        "knobs": policy.layers,
        "widths": widths,
        "ranges": ranges["layers"],
    }
    carry = mechanism.soft.start(valid.shape[0], structure.num_heads, valid.shape[1])
    residual_in = residual
    residual, left, outputs = run_layers(layer_fn, stacked, residual, valid, carry)
    logits = _outputs(ends, residual, left, structure)
    observed_layers = dict(outputs.observed)
    if calibrating:
        largest = jnp.max(observed_layers.pop("residual"))
        ends.observed["residual"] = jnp.maximum(ends.observed["residual"], largest)
    return ModelOutput(
        logits=logits,
        workload=with_ends(outputs.workload, structure, valid, end_widths),
        trace=outputs.trace | {"embedded": residual_in} if tracing else {},
        observed={"layers": observed_layers, "ends": ends.observed},
        num_pooled=_num_pooled(left, structure),
    )


def _embedded(ends: FloatArithmetic, inputs: Inputs, config: ModelConfig) -> jax.Array:
    """Returns the residual stream that enters the first block, `[B, T, D]`."""
    structure, params = config.structure, ends.params
    if isinstance(structure.input, PatchInput):
        position = params["position"]
        pixels = jnp.asarray(inputs["pixels"], position.dtype)
        images = (pixels - config.pixel_offset) * config.pixel_scale
        patches = ends.enter(windows(images, structure.input), "embed")
        products = ends.on_residual_grid(ends.linear(patches, "embed"))
        products = jnp.pad(products, ((0, 0), (structure.input.num_prefix, 0), (0, 0)))
        embedded = products + ends.on_residual_grid(position)[None, :, :]
    else:
        table, position = params["embed"]["table"], params["position"]
        tokens = jnp.asarray(inputs["tokens"])
        rows = jnp.take(table, tokens, axis=0)
        steps = position[: tokens.shape[1]]
        if structure.norm == "post":
            largest = jnp.maximum(jnp.max(jnp.abs(table)), jnp.max(jnp.abs(position)))
            if ends.relaxation is not None:
                range_ = jax.lax.stop_gradient(largest)
                rows, steps = (quantize(part, range_, RESIDUAL_BITS) for part in (rows, steps))
        else:
            rows, steps = ends.on_residual_grid(rows), ends.on_residual_grid(steps)
        embedded = rows + steps[None, :, :]
    if structure.norm == "post":
        embedded = ends.on_residual_grid(ends.normalise(embedded, "embed_norm"))
    return embedded


def _num_pooled(left: jax.Array, structure: ModelStructure) -> jax.Array:
    """Returns `ModelOutput.num_pooled`; `left` are the tokens left, `[B, T]`."""
    return jnp.sum(left, axis=1) if structure.pooling == "mean" else jnp.ones_like(left[:, 0])


def _outputs(
    ends: FloatArithmetic, residual: jax.Array, left: jax.Array, structure: ModelStructure
) -> jax.Array:
    """Returns the logits `[B, C]`, or `[B, T, C]` with one output per token; `left` are the tokens left, `[B, T]`."""
    if structure.pooling == "all":
        return ends.linear(ends.read(residual, "head"), "head")
    if structure.pooling == "mean":
        features = ends.read(residual, "head")
        # An example without tokens has the features 0.
        number = jnp.maximum(jnp.sum(left, axis=1), 1.0)[:, None]
        return ends.linear(jnp.sum(features * left[..., None], axis=1) / number, "head")
    if structure.pooler == "none":
        first = ends.read(residual[:, :1], "head")
    else:
        first = ends.pooled(residual)
    return ends.linear(first[:, 0], "head")


def apply_hard(
    layers: dict[str, jax.Array],
    ends: dict[str, jax.Array],
    inputs: Inputs,
    *,
    structure: ModelStructure,
    mechanism: Mechanism,
    tracing: bool = False,
) -> ModelOutput:
    """Runs the deployed integer path; call it in 64-bit mode.

    Args:
      layers: Integer arrays of the deployment, `[L, ...]`, int64.
      ends: Integer arrays outside the blocks and the tables, int64.
      inputs: Raw integer pixels, or tokens and which of them exist.
      structure: Sizes of the model.
      mechanism: The mechanism whose hard hooks run.
      tracing: Whether to return every tensor that docs/integer_path.md names.

    Returns:
      Integer logits, the workload, and tensors.
    """
    valid = existing_tokens(inputs, structure, jnp.float64)
    pairs = existing_pairs(valid, structure)
    end = IntegerArithmetic(ends, ends, structure=structure)
    residual = _embedded_hard(end, inputs)
    relaxation = Relaxation(temperature=jnp.zeros(()), smoothness=jnp.zeros(()))

    def layer_fn(
        layer: dict[str, jax.Array], residual: jax.Array, valid: jax.Array, carry: Carry
    ) -> tuple[jax.Array, jax.Array, Carry, BlockOutput]:
        arithmetic = IntegerArithmetic(layer, ends, structure=structure, hooks=mechanism.hard)
        context = Context(
            knobs=layer,
            widths=_widths(layer),
            ranges={},
            relaxation=relaxation,
            valid=valid,
            pairs=pairs * valid[:, None, None, :],
            tracing=tracing,
            is_uniform=not structure.is_causal,
            width=structure.width,
        )
        return block(arithmetic, mechanism.hard, context, structure, residual, carry)

    carry = mechanism.hard.start(valid.shape[0], structure.num_heads, valid.shape[1])
    embedded = residual
    residual, left, outputs = run_layers(layer_fn, layers, residual, valid, carry)
    logits = _outputs_hard(end, residual, left)
    tensors = {
        name: value if value.dtype == jnp.bool_ else value.astype(jnp.int64)
        for name, value in (outputs.trace | {"embedded": embedded, "logits": logits}).items()
    }
    return ModelOutput(
        logits=logits,
        workload=with_ends(outputs.workload, structure, valid, _widths(ends)),
        trace={name: tensors[name] for name in tensor_names(structure)} if tracing else {},
        observed={},
        num_pooled=_num_pooled(left, structure),
    )


def _embedded_hard(end: IntegerArithmetic, inputs: Inputs) -> jax.Array:
    """Returns the residual stream that enters the first block, `[B, T, D]`."""
    structure, ends = end.structure, end.arrays
    if isinstance(structure.input, PatchInput):
        codes = requantize(
            jnp.asarray(inputs["pixels"], jnp.int64) - ends["input_offset"],
            ends["input_mantissa"],
            ends["input_shift"],
        )
        codes = saturate(codes, limit(ends["embed_activation_bits"]))
        products = end.linear(windows(codes, structure.input), "embed")
        products = jnp.pad(products, ((0, 0), (structure.input.num_prefix, 0), (0, 0)))
        embedded = products + ends["position"][None, :, :]
    else:
        tokens = jnp.asarray(inputs["tokens"])
        rows = jnp.take(ends["token"], tokens, axis=0)
        embedded = rows + ends["position"][None, : tokens.shape[1], :]
    if structure.norm == "pre":
        return saturate(embedded, RESIDUAL_LIMIT)
    return normalize(
        embedded, ends["embed_gain"], ends["embed_offset"], RESIDUAL_LIMIT, ends["embed_epsilon"]
    )


def _outputs_hard(end: IntegerArithmetic, residual: jax.Array, left: jax.Array) -> jax.Array:
    """Returns the integer logits, `[B, C]` or `[B, T, C]`; `left` are the tokens left, `[B, T]`."""
    structure = end.structure
    if structure.pooling == "all":
        features, number = end.read(residual, "head"), jnp.ones((1, 1, 1), jnp.int64)
    elif structure.pooling == "mean":
        features = end.read(residual, "head") * left[..., None].astype(jnp.int64)
        features = jnp.sum(features, axis=1, keepdims=True)
        number = jnp.sum(left, axis=1).astype(jnp.int64)[:, None, None]
    else:
        number = jnp.ones((1, 1, 1), jnp.int64)
        if structure.pooler == "none":
            features = end.read(residual[:, :1], "head")
        else:
            features = end.pooled(residual)
    summed = residual.shape[1] if structure.pooling == "mean" else 1
    bits = LINEAR_CODE_BITS + math.ceil(math.log2(summed))
    product = exact_einsum("btk,kn->btn", features, end.weight_codes("head"), bits)
    bias = number * end.arrays["head_bias"][None, None, :]
    logits = (product.astype(jnp.int64) << BIAS_FRACTION_BITS) + bias
    return logits if structure.pooling == "all" else logits[:, 0]


def _widths(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the deployed widths under the policy's names: `qkv_weight_bits` is `qkv.weight_bits`."""
    widths = {}
    for name, value in arrays.items():
        for kind in ("weight_bits", "activation_bits"):
            if name.endswith(f"_{kind}"):
                widths[f"{name[: -len(kind) - 1]}.{kind}"] = value
        if name.endswith("bits") and not name.endswith(("_weight_bits", "_activation_bits")):
            widths[name] = value
    return widths


def with_ends(
    workload: Workload,
    structure: ModelStructure,
    valid: jax.Array,
    widths: dict[str, jax.Array],
) -> Workload:
    """Returns the workload with the dense products outside the blocks, `[B, 1]` leaves."""
    tokens, one = jnp.sum(valid, axis=-1), jnp.ones_like(valid[:, 0])
    width = structure.width
    outputs = tokens if structure.pooling == "all" else one
    shapes = {"pool": (one, width, width), "head": (outputs, width, structure.num_outputs)}
    if isinstance(structure.input, PatchInput):
        patches = structure.input
        shapes["embed"] = (one * patches.num_patches, patches.patch_values, width)
    gemms: dict[str, Gemm] = {}
    for site in structure.end_sites:
        product = gemm(
            *shapes[site], widths[f"{site}.activation_bits"], widths[f"{site}.weight_bits"]
        )
        gemms[site] = jax.tree.map(lambda leaf: leaf[:, None], product)
    return workload.replace(end_gemms=gemms)  # type: ignore[attr-defined,no-any-return]
