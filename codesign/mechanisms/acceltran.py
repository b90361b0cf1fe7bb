"""AccelTran: DynaTran, which zeroes every activation whose magnitude does not exceed a threshold of its site.

A machine that stores and multiplies no zeros skips the rest, so the counts are those of exact attention with the density of
every tensor beside them. Weights may be pruned too, once, before they are quantised and stored.

Pruned are Q, K, V, the raw scores, the probabilities, the attended heads, both branches and the input of the non-linearity.
A pruned raw score is the logit 0, not a key removed. The pooler is left alone: its 768 elements are one in 160,000 of the
10.2 million of each of BERT-Base's 12 layers at 512 tokens.

Differs from the published fixed point on purpose: a tensor has the scale of the integer path (one calibrated range, not a
power of two), its word is the policy's (`qk_bits`, `v_bits`, activation bits; 10 bits in front of the non-linearity, 16 in
a branch), and what the integer bits of the range leave of the word is fraction. A threshold is stored in codes of its site.

References:
  Tuli, Jha, "AccelTran: A Sparsity-Aware Accelerator for Dynamic Inference with Transformers", IEEE TCAD 42(11), 2023,
  arXiv 2302.14705; sites, strict comparison and weight pruning as in its public code. Gates, one threshold per layer and
  site, ranges and codes are ours.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from codesign import gates
from codesign.errors import CodesignError
from codesign.fake_quantize import WIDTHS, density_of_width
from codesign.gates import Relaxation
from codesign.mechanisms.acceltran_products import hard_on_product, soft_on_product
from codesign.mechanisms.protocol import (
    Context,
    Counts,
    Hooks,
    Mechanism,
    Plan,
    Selection,
    keep_weight,
)
from codesign.mechanisms.threshold_scale import ThresholdScale
from codesign.policy import Policy, bits_range
from codesign.quantize import code_limit, deployed_bits
from codesign.references.acceltran import PRUNED_SITES
from codesign.structure import ACTIVATION_LIMIT
from codesign.workload import Workload

MAX_INTEGER_BITS = 10
"""Most integer bits of a range, sign included (the specification's)."""
START_THRESHOLD = 0.01
"""Threshold before calibration, real units: within the published sweep of 0.005 to 0.095."""
START_WEIGHT_THRESHOLD = 0.025
"""Published threshold of BERT-Base's weights (arXiv 2302.14705), real units."""
OCTAVES = 12.0
"""Strength 0 is this many octaves below a site's range, strength 1 the range itself (ours)."""
OFF = 2.0**-40
"""Threshold that prunes nothing, in ranges: far below half a code of any site."""
WIDTH_PART, MIN_WIDTH_CODES = 0.25, 0.5
"""Part of a threshold that a gate's temperature is at most measured in; least width of a gate in codes (ours)."""
SITE_WIDTHS = WIDTHS | {"out": "out.activation_bits"}
"""The knob that gives the codes of a pruned site their width; those of the others have a fixed one."""
CODE_SITES = ("query", "key", "value", "scores")
"""Sites whose tensor consists of codes on the soft path too; elsewhere it has real values."""


def knobs(num_layers: int, num_heads: int) -> dict[str, jax.Array]:
    """Returns start values: `threshold` v `[L, 9]`, the threshold of a site being softplus(v) in its real units."""
    del num_heads
    start = float(threshold_variable(START_THRESHOLD))
    return {"threshold": jnp.full((num_layers, len(PRUNED_SITES)), start)}


def with_weight_threshold(policy: Policy, threshold: ArrayLike = START_WEIGHT_THRESHOLD) -> Policy:
    """Returns the policy with the knob that prunes weights, `weight_threshold` v `[L]`, the threshold being softplus(v).

    Args:
      policy: A policy of `acceltran`.
      threshold: Start, in the unit of the weights, > 0, scalar or `[L]`, e.g. `weight_quantile`.
    """
    start = threshold_variable(threshold).astype(np.float32)
    num_layers = policy.layers["threshold"].shape[0]
    own = {"weight_threshold": jnp.asarray(np.broadcast_to(start, (num_layers,)))}
    return Policy(layers=policy.layers | own, ends=policy.ends)


def weight_quantile(
    blocks: Mapping[str, Mapping[str, Any]], fraction: float = 0.1
) -> NDArray[np.float64]:
    """Returns the magnitude that a fraction of a layer's weights does not exceed, `[L]`, from kernels `[L, ...]`."""
    sizes = [np.abs(site["kernel"]) for site in blocks.values() if "kernel" in site]
    flat = np.concatenate([np.reshape(size, (len(size), -1)) for size in sizes], axis=-1)
    return np.asarray(np.quantile(flat, fraction, axis=-1), np.float64)


def threshold_variable(threshold: ArrayLike) -> NDArray[np.float64]:
    """Returns v with softplus(v) = threshold > 0, any shape."""
    tau = np.asarray(threshold, np.float64)
    variable: NDArray[np.float64] = tau + np.log(-np.expm1(-tau))
    return variable


def integer_bits(range_: Any) -> Any:
    """Returns the integer bits of a range X > 0, sign included: `clip(1 + ceil(log2 X), 1, 10)`, int32, exact.

    Args:
      range_: Largest magnitude, unit of its tensor, a NumPy or JAX array of any shape.
    """
    xp = jnp if isinstance(range_, jax.Array) else np
    fraction, exponent = xp.frexp(range_)
    return xp.clip(1 + exponent - (fraction == 0.5), 1, MAX_INTEGER_BITS)


def threshold_code(threshold: Any, scale: Any, range_: Any) -> Any:
    """Returns a threshold in codes of its site, rounded half to even, at most what the range's integer bits hold.

    Args:
      threshold: In real units, >= 0, a NumPy or JAX array of any shape.
      scale: Real value of one code, broadcast against `threshold`.
      range_: Calibrated range in real units, shape of `threshold`.

    Returns:
      Whole numbers in the dtype of `threshold`; one of 2^(IL - 1) and more prunes the whole range.
    """
    xp = jnp if isinstance(threshold, jax.Array) else np
    largest = xp.ldexp(xp.ones_like(range_), integer_bits(range_) - 1)
    return xp.round(xp.minimum(threshold, largest) / scale)


def prune(x: jax.Array, threshold: jax.Array | int) -> jax.Array:
    """Returns `x` with 0 where its magnitude does not exceed the threshold (codes, broadcast against `x`)."""
    return jnp.where(jnp.abs(x) > threshold, x, 0)


def site_scale(site: str, scales: Mapping[str, Any], qk_limit: Any) -> Any:
    """Returns the real value of one code at a site, given those by tensor and the largest code of a probability."""
    if site == "scores":
        return scales["query"] * scales["key"]
    if site == "probabilities":
        return 1.0 / qk_limit
    return scales["residual" if site in ("attention_branch", "ffn_branch") else site]


def site_ranges(ranges: Mapping[str, Any]) -> NDArray[np.float64]:
    """Returns the calibrated range of every site in real units, `[L, 9]`; a probability's is 1.

    Raises:
      CodesignError: If a site was not calibrated.
    """
    missing = [site for site in PRUNED_SITES if site != "probabilities" and site not in ranges]
    if missing:
        raise CodesignError(
            f"`acceltran` prunes at {', '.join(missing)} too, and the calibration has no range there: call "
            "`codesign.at_site` at gelu, attention_branch and ffn_branch, `codesign.linear` at the others"
        )
    known = {site: np.asarray(ranges[site]) for site in PRUNED_SITES if site != "probabilities"}
    one = np.ones_like(known["scores"])
    columns = [known.get(site, one) for site in PRUNED_SITES]
    return np.stack(columns, axis=-1).astype(np.float64)


def codes(
    knobs: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the thresholds as the chip stores them: int64 `[L, 9]` in codes of their site."""
    thresholds = np.logaddexp(0.0, np.asarray(knobs["threshold"], np.float64))
    qk_limit, v_limit, out_limit = (
        np.asarray(code_limit(np.rint(knobs[name])), np.float64)
        for name in ("qk_bits", "v_bits", "out.activation_bits")
    )
    unclipped = np.exp(-np.asarray(knobs["out.activation_clip"], np.float64))
    ranges = dict(tensors)
    for name, limit in (
        ("query", qk_limit),
        ("key", qk_limit),
        ("value", v_limit),
        ("out", out_limit * unclipped),
        ("gelu", ACTIVATION_LIMIT),
    ):
        ranges[name] = tensors[name] * limit
    scales = [site_scale(site, tensors, qk_limit) for site in PRUNED_SITES]
    steps = np.stack([np.broadcast_to(scale, qk_limit.shape) for scale in scales], -1)
    return {"threshold": threshold_code(thresholds, steps, site_ranges(ranges)).astype(np.int64)}


def stored_weight(knobs: Mapping[str, np.ndarray], kernel: np.ndarray, site: str) -> np.ndarray:
    """Returns a layer's kernel as it is quantised and stored: 0 where |W| <= tau_w."""
    del site
    if "weight_threshold" not in knobs:
        return kernel
    return np.where(np.abs(kernel) > np.logaddexp(0.0, knobs["weight_threshold"]), kernel, 0.0)


def from_strength(strength: np.ndarray, ranges: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the threshold variable of `X * 2^(-12 (1 - strength))`, X being the range of the site."""
    tau = site_ranges(ranges) * 2.0 ** (-OCTAVES * (1.0 - strength))
    return threshold_variable(tau)


def to_strength(threshold: np.ndarray, ranges: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns `1 + log2(tau / X) / 12`, limited to [0, 1]."""
    tau = np.logaddexp(0.0, np.asarray(threshold, np.float64))
    octaves = np.log2(tau / site_ranges(ranges))
    limited: np.ndarray = np.clip(1.0 + octaves / OCTAVES, 0.0, 1.0)
    return limited


def from_setting(
    setting: tuple[float, ...], shape: tuple[int, ...], ranges: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns the threshold variable of (tau, relative): every site has the larger of tau and `relative * X`.

    The published machine has one tau for all sites; a share of each site's range is the fairer uniform setting.
    """
    tau, relative = setting
    limits = np.broadcast_to(site_ranges(ranges), shape)
    return threshold_variable(np.maximum(tau, max(relative, OFF) * limits))


def kept_fractions(workload: Workload) -> jax.Array:
    """Returns the density of every site, mean over the batch, `[L, 9]`."""
    densities = [jnp.mean(workload.densities[site], axis=0) for site in PRUNED_SITES]
    return jnp.stack(densities, axis=-1)


def existing(context: Context, site: str) -> jax.Array:
    """Returns 1 for elements of a site that exist, with the tensor's axes (1 where all agree)."""
    if site in ("scores", "probabilities"):
        return context.pairs * context.valid[:, None, :, None]
    if site in ("query", "key", "value"):
        return context.valid[:, None, :, None]
    return context.valid[:, :, None]


def density(kept: jax.Array, exists: jax.Array) -> jax.Array:
    """Returns the mean of `kept` over the elements that exist, `[B]`; `exists` has its axes, 1 where all agree."""
    axes = tuple(range(1, kept.ndim))
    repeats = kept.size // exists.size
    elements = jnp.maximum(jnp.sum(exists, axis=axes) * repeats, 1.0)
    return jnp.sum(kept.astype(exists.dtype) * exists, axis=axes) / elements


def spread(x: jax.Array, exists: jax.Array) -> jax.Array:
    """Returns the standard deviation of |x| over the elements that exist, scalar and constant, 1 if there is none."""
    constant = gates.detach(x)
    elements = jnp.maximum(jnp.sum(exists) * (x.size // exists.size), 1.0)
    mean, square = (
        # Rows first where they agree: the mask is small then.
        jnp.sum(jnp.sum(power, axis=-1, keepdims=True) * exists) / elements
        if exists.shape[-1] == 1
        else jnp.sum(power * exists) / elements
        for power in (jnp.abs(constant), jnp.square(constant))
    )
    deviation = jnp.sqrt(jnp.maximum(square - jnp.square(mean), 0.0))
    return jnp.where(deviation > gates.MIN_SPREAD, deviation, 1.0)


def gate_width(
    x: jax.Array, tau: jax.Array | float, code: jax.Array, exists: jax.Array, temperature: jax.Array
) -> jax.Array:
    """Returns a gate's width, unit of `x`: the temperature times the spread, or times a part of the threshold if less.

    A gate as wide as the spread of |x| reaches far below a small threshold, where dropping costs nothing: the loss seems
    to depend on the threshold 2 to 8 times less than by finite differences. Below half a code, one code would count twice.
    """
    narrower = temperature * jnp.minimum(spread(x, exists), WIDTH_PART * tau)
    return jnp.maximum(narrower, MIN_WIDTH_CODES * code)


def soft_prune(
    x: jax.Array, threshold: jax.Array, width: jax.Array, exists: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns `x * g` and the mean of `g = sigmoid((|x| - threshold) / width)` over elements that exist, `[B]`."""
    gate = gates.soft_gate(jnp.abs(x), threshold, temperature=width)
    return x * gate, density(gate, exists)


@jax.custom_vjp
def straight_through_prune(
    x: jax.Array, threshold: jax.Array, cut: jax.Array, width: jax.Array, exists: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Prunes by a comparison, with the derivatives of `soft_prune` in closed form: one sigmoid per element, none forward.

    With `s = g (1 - g) / width`, the substituted derivatives are `dy/dx = g + |x| s`, `dy/dthreshold = -x s`, and those of
    the density `sign(x) s / n` and `-s / n`; true ones are 1 or 0, 0, 0, 0.

    Args:
      x: Codes or values, `[B, ...]`.
      threshold: Centre of the gate, scalar, unit of `x`.
      cut: Largest magnitude that is pruned, scalar, unit of `x`; constant.
      width: Width of the gate, scalar, unit of `x`; constant.
      exists: 1 for elements that exist, `[B, ...]` with the axes of `x`, 1 where all agree; constant.

    Returns:
      The pruned tensor, and the fraction of its existing elements that is left, `[B]`.
    """
    del threshold, width
    kept = jnp.abs(x) > cut
    return jnp.where(kept, x, 0.0), density(kept, exists)


def _prune_forward(
    x: jax.Array, threshold: jax.Array, cut: jax.Array, width: jax.Array, exists: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    outputs = straight_through_prune(x, threshold, cut, width, exists)
    return outputs, (x, threshold, width, exists)


def _slopes(
    x: jax.Array,
    threshold: jax.Array,
    width: jax.Array,
    exists: jax.Array,
    towards_value: jax.Array,
    towards_density: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the cotangents of `x` and `threshold`."""
    axes = tuple(range(1, x.ndim))
    elements = jnp.maximum(jnp.sum(exists, axis=axes) * (x.size // exists.size), 1.0)
    share = jnp.reshape(towards_density / elements, (-1,) + (1,) * (x.ndim - 1)) * exists
    gate = jax.nn.sigmoid((jnp.abs(x) - threshold) / width)
    # What a larger |x| and a smaller threshold do alike.
    shift = (towards_value * x + share) * gate * (1.0 - gate) / width
    return towards_value * gate + jnp.sign(x) * shift, -jnp.sum(shift)


def _no_slopes(x: jax.Array, threshold: jax.Array, *_: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what a gate of no width has: nothing that is defined."""
    return jnp.full_like(x, jnp.nan), jnp.full_like(threshold, jnp.nan)


def _prune_backward(
    residuals: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    # A branch of its own keeps XLA from working all of this out anew inside whatever reads the results (on a CPU a fifth of
    # MiniLM's training step).
    slopes = jax.lax.cond(residuals[2] > 0.0, _slopes, _no_slopes, *residuals, *cotangents)
    return *slopes, None, None, None


straight_through_prune.defvjp(_prune_forward, _prune_backward)


def _gated(
    x: jax.Array, context: Context, site: str, exists: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns a site's tensor pruned on the soft path, and its density `[B]`."""
    relaxation = context.relaxation
    index = PRUNED_SITES.index(site)
    real = jax.nn.softplus(context.knobs["threshold"][index])
    qk_bits = deployed_bits(gates.detach(context.widths["qk_bits"]), *bits_range("qk_bits"))
    scale = site_scale(site, context.scales, code_limit(qk_bits))
    # One code, and the threshold, in the unit of x.
    code, unit = (jnp.ones_like(scale), scale) if site in CODE_SITES else (scale, 1.0)
    threshold = real / unit
    # Few pairs lie next to a threshold: their gates stay as wide as the spread.
    tau = jnp.inf if site in ("scores", "probabilities") else gates.detach(threshold)
    width = gate_width(x, tau, code, exists, relaxation.temperature)
    if not relaxation.straight_through:
        return soft_prune(x, threshold, width, exists)
    range_ = jnp.ones_like(real) if site == "probabilities" else context.ranges[site]
    stored = threshold_code(gates.detach(real), scale, range_)
    threshold = gates.straight_through(stored * code, threshold)
    # Half a code above what is pruned: tensors need not be rounded, and rounding errors do not matter.
    y, left = straight_through_prune(x, threshold, (stored + 0.5) * code, width, exists)
    if site in SITE_WIDTHS:
        # A threshold of one code or more decides by itself what is zero.
        is_rounding = (stored == 0.0).astype(x.dtype)
        left = density_of_width(left, context.widths[SITE_WIDTHS[site]], is_rounding)
    return y, left


def soft_on_activation(
    context: Context, x: jax.Array, plan: Plan, site: str
) -> tuple[jax.Array, Counts]:
    """Prunes the input of a pruned site; elsewhere counts what quantisation left.

    The zeros that enter `down` are those of `gelu` (which the non-linearity keeps), so its density has their gradient where
    one plan connects the two, as in this project's block.
    """
    exists = existing(context, site)
    if site in PRUNED_SITES:
        x, left = _gated(x, context, site, exists)
        if site == "gelu":
            plan.notes["gelu"] = left
        return x, Counts(densities={site: left})
    stored = density(jnp.abs(gates.detach(x)) > 0.5 * context.scales[site], exists)
    if site == "down" and "gelu" in plan.notes:
        stored = gates.straight_through(stored, plan.notes["gelu"])
    left = density_of_width(stored, context.widths[f"{site}.activation_bits"])
    return x, Counts(densities={site: left})


def soft_on_probabilities(
    context: Context, probabilities: jax.Array, selection: Selection
) -> tuple[jax.Array, jax.Array, Counts]:
    """Prunes probabilities; every pair still counts as multiplied, at the density of its operands."""
    exists = existing(context, "probabilities")
    pruned, left = _gated(probabilities, context, "probabilities", exists)
    return pruned, selection.weights, Counts(densities={"probabilities": left})


def soft_on_output(
    context: Context, y: jax.Array, plan: Plan, site: str
) -> tuple[jax.Array, Counts]:
    """Prunes both branches before they are added; no plan re-uses rows or drops heads."""
    del plan
    if site not in PRUNED_SITES:
        return y, Counts()
    y, left = _gated(y, context, site, existing(context, site))
    return y, Counts(densities={site: left})


def soft_on_weight(
    knobs: Mapping[str, jax.Array], kernel: jax.Array, site: str, relaxation: Relaxation
) -> tuple[jax.Array, jax.Array]:
    """Prunes a kernel `[inputs, outputs]` if the policy has a `weight_threshold`; the second value is its density."""
    if "weight_threshold" not in knobs:
        return keep_weight(knobs, kernel, site, relaxation)
    threshold = jax.nn.softplus(knobs["weight_threshold"])
    deviation = jnp.std(gates.detach(kernel))
    width = relaxation.temperature * jnp.where(deviation > gates.MIN_SPREAD, deviation, 1.0)
    exists = jnp.ones((1, 1, 1), kernel.dtype)
    if relaxation.straight_through:
        cut = gates.detach(threshold)
        pruned, left = straight_through_prune(kernel[None], threshold, cut, width, exists)
    else:
        pruned, left = soft_prune(kernel[None], threshold, width, exists)
    return pruned[0], left[0]


def _hard(context: Context, x: jax.Array, site: str) -> tuple[jax.Array, Counts]:
    """Returns a site's codes, pruned if it is a pruned one, and the density of what is left."""
    if site in PRUNED_SITES:
        threshold = context.knobs["threshold"][PRUNED_SITES.index(site)]
        x = prune(x, threshold.astype(context.valid.dtype))
    return x, Counts(densities={site: density(x != 0, existing(context, site))})


def hard_on_activation(
    context: Context, x: jax.Array, plan: Plan, site: str
) -> tuple[jax.Array, Counts]:
    """Compares codes with the stored threshold; counts the codes that are not 0 at every site."""
    del plan
    return _hard(context, x, site)


def hard_on_probabilities(
    context: Context, probabilities: jax.Array, selection: Selection
) -> tuple[jax.Array, jax.Array, Counts]:
    """Does the same to probabilities."""
    pruned, counts = _hard(context, probabilities, "probabilities")
    return pruned, selection.weights, counts


def hard_on_output(
    context: Context, y: jax.Array, plan: Plan, site: str
) -> tuple[jax.Array, Counts]:
    """Does the same to both branches."""
    del plan
    return _hard(context, y, site) if site in PRUNED_SITES else (y, Counts())


acceltran = Mechanism(
    name="acceltran",
    summary="zeroing of activations below a threshold of their site, on every tensor (arXiv 2302.14705)",
    knobs=knobs,
    thresholds=ThresholdScale(
        names=PRUNED_SITES,
        in_order=False,
        from_strength=from_strength,
        to_strength=to_strength,
        from_setting=from_setting,
        settings=(
            *((0.0, 0.0), (0.005, 0.0), (0.02, 0.0), (0.05, 0.0)),
            *((0.0, 0.004), (0.0, 0.016), (0.0, 0.064)),
        ),
        start_kept=(0.98,) * len(PRUNED_SITES),
        kept=kept_fractions,
    ),
    codes=codes,
    prune_weight=stored_weight,
    soft=Hooks(
        on_probabilities=soft_on_probabilities,
        on_activation=soft_on_activation,
        on_output=soft_on_output,
        on_weight=soft_on_weight,
        on_product=soft_on_product,
        skips_zeros=True,
    ),
    hard=Hooks(
        on_probabilities=hard_on_probabilities,
        on_activation=hard_on_activation,
        on_output=hard_on_output,
        on_product=hard_on_product,
        skips_zeros=True,
        head_knobs=(),
    ),
)
