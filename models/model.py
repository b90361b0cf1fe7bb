"""Vision transformer: patch embedding in front of the block, mean pooling and a linear head behind it.

`apply` is the float path (plain, relaxed or straight-through), `apply_hard` the deployed integer path. Both return logits,
the workload of the batch, and on request the mechanism's decisions.
"""

from typing import Any

import jax
import jax.numpy as jnp

from codesign.calibration import Calibration
from codesign.gates import Relaxation
from codesign.mechanisms.protocol import Carry, Context, Mechanism
from codesign.models.arithmetic import FloatArithmetic, counted_widths
from codesign.models.config import VisionConfig
from codesign.models.integer import (
    BIAS_FRACTION_BITS,
    LINEAR_LIMIT,
    RESIDUAL_LIMIT,
    IntegerArithmetic,
    limit,
    requantize,
    saturate,
)
from codesign.models.transformer import BlockOutput, ModelOutput, block, run_layers
from codesign.policy import Policy, dense_knobs
from codesign.quantize import exact_einsum
from codesign.structure import ModelStructure
from codesign.workload import Gemm, Workload, gemm


def windows(pixels: jax.Array, structure: ModelStructure) -> jax.Array:
    """Cuts images into one vector per token: rows of pixels first, channels last; padding is zero.

    Args:
      pixels: Images, `[B, image, image]` or `[B, image, image, channels]`.
      structure: Sizes of the model.

    Returns:
      `[B, T, P]`, dtype of `pixels`.
    """
    batch = pixels.shape[0]
    images = jnp.reshape(
        pixels, (batch, structure.image_size, structure.image_size, structure.channels)
    )
    pad = structure.padding
    images = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    starts = jnp.arange(structure.grid_size) * structure.stride
    offsets = jnp.arange(structure.patch_size)
    index = starts[:, None] + offsets[None, :]
    patches = images[:, index][:, :, :, index]  # [B, grid, patch, grid, patch, channels]
    patches = jnp.swapaxes(patches, 2, 3)
    return jnp.reshape(patches, (batch, structure.num_tokens, structure.patch_values))


def apply(
    params: dict[str, Any],
    policy: Policy | None,
    calibration: Calibration | None,
    pixels: jax.Array,
    *,
    config: VisionConfig,
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
      pixels: Raw pixels, `[B, image, image]` or with channels last.
      config: Sizes and scaling.
      mechanism: The mechanism whose soft hooks run.
      relaxation: Temperature and path; None: plain floating point, nothing quantised (mechanism must have no knobs).
      tracing: Whether to return the mechanism's decisions.
      calibrating: Whether to measure the ranges that the mechanism wants (into `observed`).

    Returns:
      Real logits `[B, classes]`, the workload, decisions, and absolute maxima.
    """
    structure = config.structure
    images = (pixels.astype(params["position"].dtype) - config.pixel_offset) * config.pixel_scale
    tokens = windows(images, structure)
    valid = jnp.ones(tokens.shape[:2], tokens.dtype)
    if policy is None or calibration is None:
        assert relaxation is None, "a quantised path needs a policy and a calibration"
        policy = dense_knobs(structure.num_layers, linear_bits=8.0, attention_bits=16.0)
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
        num_heads=structure.num_heads,
        norm_epsilon=config.norm_epsilon,
        residual_range=ranges["ends"].get("residual"),
    )
    embedded = ends.on_residual_grid(ends.linear(ends.enter(tokens, "embed"), "embed"))
    residual = embedded + ends.on_residual_grid(params["position"])[None, :, :]
    ends.observe("residual", residual)
    pairs = valid[:, None, None, :] * jnp.ones_like(valid)[:, None, :, None]
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
            num_heads=structure.num_heads,
            norm_epsilon=config.norm_epsilon,
            residual_range=ranges["ends"].get("residual"),
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
    carry = mechanism.soft.start(valid.shape[0], structure.num_heads, structure.num_tokens)
    residual, left, outputs = run_layers(layer_fn, stacked, residual, valid, carry)
    features = ends.norm(residual, "head")
    pooled = jnp.sum(features * left[..., None], axis=1) / jnp.sum(left, axis=1)[:, None]
    logits = ends.linear(pooled, "head")
    observed_layers = dict(outputs.observed)
    ends.observed["residual"] = jnp.maximum(
        ends.observed["residual"], jnp.max(observed_layers.pop("residual"))
    )
    return ModelOutput(
        logits=logits,
        workload=_with_ends(outputs.workload, structure, valid, end_widths),
        trace=outputs.trace,
        observed={"layers": observed_layers, "ends": ends.observed},
    )


def apply_hard(
    layers: dict[str, jax.Array],
    ends: dict[str, jax.Array],
    pixels: jax.Array,
    *,
    structure: ModelStructure,
    mechanism: Mechanism,
    tracing: bool = False,
) -> ModelOutput:
    """Runs the deployed integer path; call it in 64-bit mode.

    Args:
      layers: Integer arrays of the deployment, `[L, ...]`, int64.
      ends: Integer arrays outside the blocks and the tables, int64.
      pixels: Raw integer pixels, `[B, image, image]` or with channels last.
      structure: Sizes of the model.
      mechanism: The mechanism whose hard hooks run.
      tracing: Whether to return every tensor that docs/integer_path.md names.

    Returns:
      Integer logits `[B, classes]`, the workload, decisions and tensors.
    """
    end = IntegerArithmetic(ends, ends, num_heads=structure.num_heads, tracing=tracing)
    inputs = requantize(
        pixels.astype(jnp.int64) - ends["input_offset"], ends["input_mantissa"], ends["input_shift"]
    )
    inputs = saturate(inputs, limit(ends["embed_activation_bits"]))
    tokens = windows(inputs, structure)
    residual = saturate(end.linear(tokens, "embed") + ends["position"][None, :, :], RESIDUAL_LIMIT)
    end.trace("embedded", residual)
    valid = jnp.ones(tokens.shape[:2], jnp.float64)
    pairs = valid[:, None, None, :] * jnp.ones_like(valid)[:, None, :, None]
    relaxation = Relaxation(temperature=jnp.zeros(()), smoothness=jnp.zeros(()))

    def layer_fn(
        layer: dict[str, jax.Array], residual: jax.Array, valid: jax.Array, carry: Carry
    ) -> tuple[jax.Array, jax.Array, Carry, BlockOutput]:
        arithmetic = IntegerArithmetic(layer, ends, num_heads=structure.num_heads, tracing=tracing)
        context = Context(
            knobs=layer,
            widths=_widths(layer),
            ranges={},
            relaxation=relaxation,
            valid=valid,
            pairs=pairs * valid[:, None, None, :],
            tracing=tracing,
        )
        residual, valid, carry, output = block(
            arithmetic, mechanism.hard, context, structure, residual, carry
        )
        trace = output.trace | arithmetic.traced
        return residual, valid, carry, BlockOutput(output.workload, trace, {})

    carry = mechanism.hard.start(valid.shape[0], structure.num_heads, structure.num_tokens)
    residual, left, outputs = run_layers(layer_fn, layers, residual, valid, carry)
    features = end.norm(residual, "head")
    number = jnp.sum(left, axis=1)[:, None].astype(jnp.int64)
    pooled = jnp.sum(features * left[..., None].astype(jnp.int64), axis=1)
    product = exact_einsum(
        "bk,kn->bn", pooled, ends["head_weight"], LINEAR_LIMIT * structure.num_tokens
    )
    logits = (product.astype(jnp.int64) << BIAS_FRACTION_BITS) + number * ends["head_bias"][None, :]
    return ModelOutput(
        logits=logits,
        workload=_with_ends(outputs.workload, structure, valid, _widths(ends)),
        trace=(outputs.trace | end.traced) if tracing else {},
        observed={},
    )


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


def _with_ends(
    workload: Workload,
    structure: ModelStructure,
    valid: jax.Array,
    widths: dict[str, jax.Array],
) -> Workload:
    """Returns the workload with the dense products of the embedding and the head, `[B, 1]` leaves."""
    tokens = jnp.sum(valid, axis=-1)
    shapes = {
        "embed": (tokens, structure.patch_values, structure.width),
        "head": (jnp.ones_like(tokens), structure.width, structure.num_classes),
    }
    gemms: dict[str, Gemm] = {}
    for site, (rows, inner, outer) in shapes.items():
        one = gemm(
            rows, inner, outer, widths[f"{site}.activation_bits"], widths[f"{site}.weight_bits"]
        )
        gemms[site] = jax.tree.map(lambda leaf: leaf[:, None], one)
    return workload.replace(end_gemms=gemms)  # type: ignore[attr-defined,no-any-return]
