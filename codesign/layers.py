"""Attention and linear layers for any Flax module: a policy's quantisation, a mechanism's hooks, and their counts.

Pure functions of arrays, for Linen and NNX alike, under `jit`, `grad`, `vmap`, `lax.scan` and sharded inputs. A model
takes an `AppliedPolicy`, hands `.layer(i)` to the calls of layer i and `.ends()` to linear layers outside the layers, adds
up what the calls count, and returns `collect(layers, ends)` beside its output (docs/own_model.md, examples/own_model.py):

    y, counted = codesign.linear(x, kernel, bias, layer, "qkv")
    y, counted = codesign.attention(query, key, value, layer)

What is not called here (norms, non-linearities, the residual stream) stays in floating point.
"""

from typing import Any

import jax
import jax.numpy as jnp

from codesign import gates
from codesign.applied import LayerPolicy
from codesign.backward import dense_product
from codesign.errors import CodesignError, UnknownNameError
from codesign.fake_quantize import (
    RESIDUAL_BITS,
    WIDTHS,
    attention_probabilities,
    counted_widths,
    operand_codes,
    quantize_activation,
    quantize_weight,
    tensor_scale,
    weight_density,
    weight_scale,
)
from codesign.gates import Relaxation
from codesign.layer_counts import LayerCounts
from codesign.mechanisms.protocol import (
    Context,
    Counts,
    Operands,
    Plan,
    keep_activation,
    keep_carry,
    no_carry,
    plan_all,
    reuse_rows,
)
from codesign.policy import ATTENTION_BITS, bits_range
from codesign.quantize import code_limit
from codesign.vocabulary import BLOCK_SITES, LINEAR_SITES
from codesign.workload import gemm

BETWEEN_SITES = ("gelu", "attention_branch", "ffn_branch")
"""Sites between the calls of `linear` and `attention`, for `at_site`."""


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    layer: LayerPolicy,
    *,
    mask: jax.Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[jax.Array, LayerCounts]:
    """Returns self-attention under one layer's policy; axes as in Flax and `jax.nn.dot_product_attention`.

    Straight-through, codes and keep decisions are those an integer implementation would have; probabilities are
    exponentials in float32, then quantised.

    Args:
      query: `[B, T, H, d]`, real values of any floating dtype; computed in at least float32.
      key: The same shape.
      value: The same shape.
      layer: The layer's policy.
      mask: True for pairs that exist, `[B or 1, 1, T or 1, T]`. Says nothing of which queries exist: that is `valid`.
      is_causal: Whether a token sees only itself and earlier ones.
      scale: Factor on the scores; None: `1 / sqrt(d)`.

    Returns:
      Output `[B, T, H, d]` in the dtype of `query`, zeros in a row without any pair; and counts, `[B, H]` and the like.

    Raises:
      CodesignError: If shapes do not fit, a range is missing, or the mechanism needs hooks that have no place here.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    _check_shapes(query, key, value, mask)
    hooks, relaxation = layer.hooks, layer.relaxation
    _check_hooks(layer)
    _check_heads(layer, query.shape[2])
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    batch, tokens, _, head_dim = query.shape
    context = _context(layer, batch, tokens, dtype, mask=mask, is_causal=is_causal)
    real = {
        name: jnp.swapaxes(x.astype(dtype), 1, 2)
        for name, x in (("query", query), ("key", key), ("value", value))
    }
    codes, scales, counts = {}, {}, Counts()
    for name, x in real.items():
        counts += _observed(layer, name, x, context.valid[:, None, :, None])
        if relaxation is None:
            codes[name], scales[name] = x, jnp.ones((), dtype)
        else:
            scales[name] = tensor_scale(_range(layer, name), layer.knobs, name)
            codes[name] = operand_codes(x, scales[name], layer.knobs, name, relaxation)
        codes[name], added = hooks.on_activation(context, codes[name], Plan(), name)
        counts += added
    factor = jnp.asarray(head_dim**-0.5 if scale is None else scale, dtype)
    operands = Operands(
        query=codes["query"],
        key=codes["key"],
        value=codes["value"],
        logit_scale=scales["query"] * scales["key"] * factor,
        value_scale=scales["value"],
    )
    selection, added = hooks.filter(context, operands, Plan(), ())
    counts += added
    scores = selection.scores
    if scores is None:
        scores = jnp.einsum("bhtd,bhsd->bhts", operands.query, operands.key)
        counts += _observed(layer, "scores", scores, context.pairs)
    scores, added = hooks.on_activation(context, scores, Plan(), "scores")
    counts += added
    is_masked = not (mask is None and layer.valid is None) or is_causal
    probabilities = attention_probabilities(
        scores * operands.logit_scale,
        selection.weights,
        layer.knobs,
        relaxation,
        mask=jnp.broadcast_to(context.pairs > 0.5, scores.shape) if is_masked else None,
    )
    probabilities, value_weights, added = hooks.on_probabilities(context, probabilities, selection)
    counts += added + hooks.execution(context, operands, selection, Plan(), value_weights)
    heads = jnp.einsum("bhts,bhsd->bthd", probabilities, operands.value) * operands.value_scale
    output, added = hooks.on_output(
        context, jnp.reshape(heads, (batch, tokens, -1)), Plan(), "attention"
    )
    counts += added
    output = jnp.reshape(output, query.shape).astype(_floating(query.dtype))
    return output, LayerCounts(counts, head_dim=head_dim)


def linear(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, layer: LayerPolicy, site: str
) -> tuple[jax.Array, LayerCounts]:
    """Returns the output of a dense layer under one layer's policy, which gives its activation and weight their widths.

    Args:
      x: `[B, T, inputs]` in a layer, `[B, ..., inputs]` outside; computed in at least float32.
      kernel: `[inputs, outputs]`.
      bias: `[outputs]`; None: there is none.
      layer: The layer's policy, `applied.layer(i)` or, outside the layers, `applied.ends()`.
      site: `qkv`, `out`, `up`, `down` in a layer, `embed`, `pool`, `head` outside.

    Returns:
      Output `[B, ..., outputs]` in the dtype of `x` (float32 for integers), and counts.

    Raises:
      CodesignError: If the site is unknown, shapes do not fit, or knobs or a range are missing.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if site not in LINEAR_SITES:
        raise UnknownNameError(
            f"linear layer `{site}` does not exist: use one of {', '.join(LINEAR_SITES)}"
        )
    is_inside = site in BLOCK_SITES
    has_rank = x.ndim == 3 if is_inside else x.ndim >= 2
    if not has_rank or kernel.ndim != 2 or x.shape[-1] != kernel.shape[0]:
        raise CodesignError(
            f"`{site}` takes x [B, T, inputs] (outside the layers [B, ..., inputs]) and a kernel [inputs, outputs], got "
            f"{list(x.shape)} and {list(kernel.shape)}: reshape them"
        )
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    out_dtype = _floating(x.dtype)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    exists, relaxation = _exists(layer, x), layer.relaxation
    counts = _observed(layer, site, x, exists[..., None])
    if relaxation is not None:
        if f"{site}.weight_bits" not in layer.knobs:
            raise CodesignError(
                f"the policy has no knobs for `{site}` here: use `layer(i)` for {', '.join(BLOCK_SITES)} and `ends()` for "
                "the sites that the calibration run used"
            )
        x = quantize_activation(x, _range(layer, site), layer.knobs, site, relaxation)
    if is_inside:
        context = _context(layer, x.shape[0], x.shape[1], dtype)
        x, added = layer.hooks.on_activation(context, x, Plan(), site)
        counts += added
    units = None
    if relaxation is not None:
        scale = weight_scale(kernel, layer.knobs, site)
        if relaxation.straight_through:
            units = tensor_scale(_range(layer, site), layer.knobs, site), scale
        kernel, density = layer.hooks.on_weight(layer.knobs, kernel, site, relaxation)
        kernel = quantize_weight(kernel, layer.knobs, site, relaxation)
        if layer.hooks.skips_zeros and is_inside:
            density = weight_density(kernel, density, scale, layer.knobs, site)
            counts += Counts(densities={f"{site}.weight": jnp.reshape(density, (1,))})
    y = dense_product(x, kernel, units)
    if bias is not None:
        y = y + jnp.reshape(jnp.asarray(bias).astype(dtype), (1,) * (y.ndim - 1) + (-1,))
    widths = _widths(layer)
    product = gemm(
        jnp.sum(jnp.reshape(exists, (exists.shape[0], -1)), axis=-1),
        kernel.shape[0],
        kernel.shape[1],
        widths[f"{site}.activation_bits"],
        widths[f"{site}.weight_bits"],
    )
    return y.astype(out_dtype), LayerCounts(counts, {site: product})


def at_site(x: jax.Array, layer: LayerPolicy, site: str) -> tuple[jax.Array, LayerCounts]:
    """Runs a mechanism's hook at a site between the calls; most mechanisms have none, and `x` comes back as it is.

    Args:
      x: `[B, T, ...]`: what enters the non-linearity (`gelu`), or a branch before it is added (`attention_branch`,
        `ffn_branch`).
      layer: The layer's policy.
      site: One of `BETWEEN_SITES`.

    Returns:
      The tensor, shape and dtype of `x`, and counts.

    Raises:
      CodesignError: If the site is unknown or its range is missing.
    """
    if site not in BETWEEN_SITES:
        raise UnknownNameError(
            f"no hook runs at `{site}` here: use one of {', '.join(BETWEEN_SITES)}"
        )
    x = jnp.asarray(x)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    real, context = x.astype(dtype), _context(layer, x.shape[0], x.shape[1], dtype)
    counts = _observed(layer, site, real, context.valid[..., None])
    hooks = layer.hooks
    if site == "gelu":
        hook, is_idle = hooks.on_activation, hooks.on_activation is keep_activation
    else:
        hook, is_idle = hooks.on_output, hooks.on_output is reuse_rows
    if is_idle:
        return x, LayerCounts(counts)
    range_ = _range(layer, site)
    if site != "gelu":
        scale = gates.detach(range_) / code_limit(RESIDUAL_BITS)
        context = context.replace(scales=context.scales | {"residual": scale})  # type: ignore[attr-defined]
    y, added = hook(context, real, Plan(), site)
    return y.astype(_floating(x.dtype)), LayerCounts(counts + added)


def _floating(dtype: Any) -> Any:
    """Returns the dtype of a result: that of its input, but float32 for integers."""
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32


def _check_shapes(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> None:
    """Raises `CodesignError` unless it is self-attention of as many heads everywhere, with one mask for all heads."""
    if query.ndim != 4 or not query.shape == key.shape == value.shape:
        raise CodesignError(
            "`query`, `key` and `value` must all be [B, T, H, d] (self-attention; repeat shared key heads), got "
            f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    batch, tokens = query.shape[:2]
    if mask is not None and mask.dtype != jnp.bool_:
        raise CodesignError(
            f"`mask` must be boolean, True for pairs that exist, got {mask.dtype}: an additive mask is `mask >= 0`"
        )
    if mask is not None and not (
        mask.ndim == 4
        and mask.shape[0] in (1, batch)
        and mask.shape[1] == 1
        and mask.shape[2] in (1, tokens)
        and mask.shape[3] == tokens
    ):
        raise CodesignError(
            f"`mask` must be [{batch} or 1, 1, {tokens} or 1, {tokens}], one for all heads, got {list(mask.shape)}"
        )


def _check_hooks(layer: LayerPolicy) -> None:
    """Raises `CodesignError` if the mechanism decides before Q, K and V exist, or passes on from layer to layer."""
    hooks = layer.hooks
    if (
        hooks.plan is not plan_all
        or hooks.start is not no_carry
        or hooks.carry is not keep_carry
        or hooks.generates_keys
    ):
        raise CodesignError(
            f"mechanism `{layer.mechanism.name}` decides before query, key and value exist or from layer to layer: run it "
            "in `codesign.models`, which calls the hooks `plan`, `start` and `carry`"
        )


def _check_heads(layer: LayerPolicy, num_heads: int) -> None:
    """Raises `CodesignError` unless what the policy has by head is for as many heads."""
    for name in layer.hooks.head_knobs or ():
        found = layer.knobs[name].shape[0]
        if layer.relaxation is not None and found != num_heads:
            raise CodesignError(
                f"the policy's `{name}` is for {found} heads, and `query` has {num_heads}: give `policy_for` the model's "
                "number of heads"
            )


def _range(layer: LayerPolicy, name: str) -> jax.Array:
    """Returns the calibrated range of a tensor."""
    if name not in layer.ranges:
        raise CodesignError(
            f"the calibration has no range of `{name}`: calibrate with the same calls, `AppliedPolicy(calibrating=True)`"
        )
    return layer.ranges[name]


def _observed(layer: LayerPolicy, name: str, x: jax.Array, exists: jax.Array) -> Counts:
    """Returns the absolute maximum of `x` where `exists` (broadcast) is 1, if calibrating; the stored one if quantised."""
    if not layer.calibrating:
        return Counts()
    if layer.relaxation is not None:
        return Counts(observed={name: _range(layer, name)})
    return Counts(observed={name: jnp.max(jnp.abs(gates.detach(x)) * exists)})


def _exists(layer: LayerPolicy, x: jax.Array) -> jax.Array:
    """Returns 1 for rows of `x` `[B, ..., inputs]` that exist, `[B, ...]`: tokens as `valid` says, other rows all."""
    rows = x.shape[:-1]
    if layer.valid is not None and layer.valid.shape == rows:
        return layer.valid.astype(x.dtype)
    return jnp.ones(rows, x.dtype)


def _widths(layer: LayerPolicy) -> dict[str, jax.Array]:
    """Returns the widths that counts use, in bit; in floating point those of dense."""
    if layer.relaxation is not None:
        return counted_widths(layer.knobs, layer.relaxation)
    kinds = ("activation_bits", "weight_bits")
    names = [*ATTENTION_BITS, *(f"{site}.{kind}" for site in LINEAR_SITES for kind in kinds)]
    return {name: jnp.asarray(bits_range(name)[1]) for name in names}


def _context(
    layer: LayerPolicy,
    batch: int,
    tokens: int,
    dtype: Any,
    *,
    mask: jax.Array | None = None,
    is_causal: bool = False,
) -> Context:
    """Returns what the hooks of one layer look at."""
    valid = jnp.ones((batch, tokens), dtype) if layer.valid is None else layer.valid.astype(dtype)
    if valid.shape != (batch, tokens):
        raise CodesignError(
            f"`valid` must be [B, T] = [{batch}, {tokens}] like the tensors, got {list(valid.shape)}"
        )
    # Not a constant to the compiler, which would spend its time on folding masks.
    valid = jax.lax.optimization_barrier(valid)  # type: ignore[no-untyped-call]
    pairs = jnp.broadcast_to(valid[:, None, None, :], (batch, 1, tokens, tokens))
    if mask is not None:
        pairs = pairs * jnp.asarray(mask, dtype)
    if is_causal:
        pairs = jnp.tril(pairs)
    one = jnp.ones(())
    named = (*WIDTHS, *BLOCK_SITES, "gelu")
    return Context(
        knobs=layer.knobs,
        widths=_widths(layer),
        ranges=layer.ranges,
        relaxation=layer.relaxation or Relaxation(temperature=one, smoothness=one),
        valid=valid,
        pairs=pairs,
        scales={
            name: tensor_scale(layer.ranges[name], layer.knobs, name)
            for name in named
            if name in layer.ranges
        },
        calibrating=layer.calibrating,
        is_uniform=mask is None and not is_causal,
    )
