"""The two arithmetics a block is written over: the protocol, and the float one (plain or fake-quantised)."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from codesign import gates
from codesign.backward import dense_product, split_heads, weighted_values
from codesign.fake_quantize import (
    RESIDUAL_BITS,
    TABLE_BITS,
    WIDTHS,
    attention_probabilities,
    operand_codes,
    quantize_activation,
    quantize_weight,
    tensor_scale,
    weight_density,
    weight_scale,
)
from codesign.gates import Relaxation
from codesign.mechanisms.protocol import OPERANDS, Hooks, Operands, part_columns
from codesign.quantize import code_limit, quantize
from codesign.structure import ModelStructure
from codesign.vocabulary import BLOCK_SITES

TABLE_INPUTS = {"up": "gelu", "pool": "pooled"}
"""Sites whose output enters a table, and the name of its calibrated range."""


def gelu(x: jax.Array) -> jax.Array:
    """Returns x times the normal distribution's integral up to x, by `erf` (`jax.nn.gelu` takes the slower `erfc`)."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


NON_LINEARITIES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}
"""Non-linearities of feed-forward networks and poolers by name."""


class Arithmetic(Protocol):
    """What a block needs of numbers; `x` is what a dense product consumes, `r` the residual stream."""

    def read(self, r: jax.Array, site: str) -> jax.Array:
        """Returns the residual stream `[B, T, D]` as the activation that enters `site`, normalised if pre-norm."""

    def linear(self, x: jax.Array, site: str) -> jax.Array:
        """Returns the dense product of `site`, bias included, `[B, T, outputs]`, in the scale of what consumes it."""

    def heads(self, projected: jax.Array) -> Operands:
        """Splits the output of `qkv` into the codes of every head."""

    def scores(self, operands: Operands) -> jax.Array:
        """Returns query times key in units of their codes, `[B, H, T, S]`."""

    def probabilities(self, scores: jax.Array, operands: Operands, weights: jax.Array) -> jax.Array:
        """Returns attention probabilities over the kept keys, `[B, H, T, S]`."""

    def attend(self, probabilities: jax.Array, operands: Operands) -> jax.Array:
        """Returns probabilities times values as the activation that enters `out`, `[B, T, H*d]`."""

    def activate(self, x: jax.Array) -> jax.Array:
        """Returns the non-linearity of the output of `up` as the activation that enters `down`."""

    def codes(self, x: jax.Array, site: str) -> jax.Array:
        """See `codesign.mechanisms.protocol.Numbers`, as the next two."""

    def weight_codes(self, site: str) -> jax.Array:
        """Returns the weight of `site` as codes."""

    def estimate(self, accumulator: jax.Array, part: str) -> jax.Array:
        """Returns the codes that an estimated accumulator of a part of `qkv` becomes."""

    def add(self, r: jax.Array, branch: jax.Array, site: str) -> jax.Array:
        """Adds the output of `site` to the residual stream, and normalises the sum if post-norm."""

    def weight_densities(self) -> dict[str, jax.Array]:
        """Returns the fraction of non-zero weights by `<site>.weight`, scalars; empty unless zeros are skipped."""


def normalised(r: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Returns the layer normalisation of `[B, T, D]` over D."""
    centred = r - jnp.mean(r, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(variance + epsilon)
    return unit * scale[None, None, :] + bias[None, None, :]


class FloatArithmetic:
    """Floating point: plain where `relaxation` is None, else fake-quantised as the policy says.

    If `observing`, it records the absolute maximum, over tokens that exist, of every tensor that calibration needs.
    """

    def __init__(
        self,
        params: dict[str, Any],
        knobs: dict[str, jax.Array],
        ranges: dict[str, jax.Array],
        valid: jax.Array,
        relaxation: Relaxation | None,
        *,
        structure: ModelStructure,
        norm_epsilon: float,
        residual_range: jax.Array | None = None,
        hooks: Hooks | None = None,
        observing: bool = False,
    ):
        self.params = params
        self.knobs = knobs
        self.ranges = ranges
        self.valid = valid
        self.relaxation = relaxation
        self.structure = structure
        self.norm_epsilon = norm_epsilon
        self.residual_range = residual_range
        self.hooks = hooks or Hooks()
        self.observing = observing
        self.observed: dict[str, jax.Array] = {}
        self.densities: dict[str, jax.Array] = {}

    def read(self, r: jax.Array, site: str) -> jax.Array:
        """See `Arithmetic.read`."""
        self.observe("residual", r)
        if self.structure.norm == "pre":
            r = self.normalise(r, {"qkv": "attention_norm", "up": "ffn_norm"}.get(site, "norm"))
        return self.enter(r, site)

    def normalise(self, r: jax.Array, name: str) -> jax.Array:
        """Returns the layer normalisation `name` of `[B, T, D]`."""
        layer = self.params[name]
        return normalised(r, layer["scale"], layer["bias"], self.norm_epsilon)

    def enter(self, x: jax.Array, site: str) -> jax.Array:
        """Returns `x` quantised as the activation of `site`, its range the calibrated one times exp(clip)."""
        self.observe(site, x)
        if self.relaxation is None:
            return x
        return quantize_activation(x, self.ranges[site], self.knobs, site, self.relaxation)

    def weight(self, site: str) -> jax.Array:
        """Returns the weight as the mechanism prunes it, then quantised."""
        kernel: jax.Array = self.params[site]["kernel"]
        if self.relaxation is None:
            return kernel
        kernel, density = self.hooks.on_weight(self.knobs, kernel, site, self.relaxation)
        quantised = quantize_weight(kernel, self.knobs, site, self.relaxation)
        if self.hooks.skips_zeros and site in BLOCK_SITES:
            self.densities[f"{site}.weight"] = weight_density(
                quantised, density, self._weight_scale(site), self.knobs, site
            )
        return quantised

    def weight_densities(self) -> dict[str, jax.Array]:
        """See `Arithmetic.weight_densities`; of the weights used so far."""
        return self.densities

    def linear(self, x: jax.Array, site: str) -> jax.Array:
        """See `Arithmetic.linear`."""
        product = dense_product(x, self.weight(site), self._units(site))
        bias = self.params[site]["bias"]
        product = product + jnp.reshape(bias, (1,) * (product.ndim - 1) + (-1,))
        if site in TABLE_INPUTS:
            name = TABLE_INPUTS[site]
            self.observe(name, product)
            if self.relaxation is not None:
                product = quantize(product, self.ranges[name], TABLE_BITS)
        return product

    def _units(self, site: str) -> tuple[jax.Array, jax.Array] | None:
        """Returns the value of a code of what enters `site` and of its weight; None if one is not in whole codes."""
        if self.relaxation is None or not self.relaxation.straight_through:
            return None
        if site == "head" and self.structure.pooling == "mean":
            return None
        return self.scale(site), self._weight_scale(site)

    def heads(self, projected: jax.Array) -> Operands:
        """See `Arithmetic.heads`; without quantisation the codes are the values themselves."""
        tensors = self._split(projected)
        for name, tensor in tensors.items():
            self.observe(name, tensor)
        return self._operands(tensors)

    def _split(self, projected: jax.Array) -> dict[str, jax.Array]:
        split = split_heads(projected, self.structure.num_heads)
        return dict(zip(OPERANDS, split, strict=True))

    def _operands(self, tensors: dict[str, jax.Array]) -> Operands:
        codes, scales = zip(
            *(self._code(tensor, name) for name, tensor in tensors.items()), strict=True
        )
        root = jnp.sqrt(jnp.asarray(codes[0].shape[-1], codes[0].dtype))
        return Operands(
            query=codes[0],
            key=codes[1],
            value=codes[2],
            logit_scale=scales[0] * scales[1] / root,
            value_scale=scales[2],
        )

    def _code(self, x: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
        scale = self.scale(name)
        if self.relaxation is None:
            return x, scale
        code = operand_codes(x, scale, self.knobs, name, self.relaxation)
        return code, scale

    def _rounded(self, code: jax.Array) -> jax.Array:
        """Returns codes as whole numbers where the forward value is the deployed one."""
        if self.relaxation is None or not self.relaxation.straight_through:
            return code
        return gates.straight_through(jnp.round(code), code)

    def scale(self, name: str) -> jax.Array:
        """Returns the real value of one code of a tensor, constant: an activation's site, an operand, or `gelu`."""
        if self.relaxation is None:
            return jnp.ones((), self.valid.dtype)
        return tensor_scale(self.ranges[name], self.knobs, name)

    def scales(self) -> dict[str, jax.Array]:
        """Returns the scales of a block's tensors; `out` and `down` are what enters these products."""
        return {name: self.scale(name) for name in (*BLOCK_SITES, *WIDTHS, "gelu")}

    def _weight_scale(self, site: str) -> jax.Array:
        if self.relaxation is None:
            return jnp.ones((1, 1), self.valid.dtype)
        return weight_scale(self.params[site]["kernel"], self.knobs, site)

    def codes(self, x: jax.Array, site: str) -> jax.Array:
        """See `Numbers.codes`."""
        return self._rounded(x / self.scale(site))

    def weight_codes(self, site: str) -> jax.Array:
        """See `Numbers.weight_codes`."""
        return self._rounded(self.weight(site) / self._weight_scale(site))

    def estimate(self, accumulator: jax.Array, part: str) -> jax.Array:
        """See `Numbers.estimate`; nothing is observed."""
        unit = self.scale("qkv") * self._weight_scale("qkv")
        unit = jnp.broadcast_to(unit, (1, self.params["qkv"]["kernel"].shape[1]))
        bias = part_columns(self.params["qkv"]["bias"], part)
        product = accumulator * part_columns(unit, part)[None] + bias[None, None, :]
        split = jnp.reshape(product, (*product.shape[:2], self.structure.num_heads, -1))
        return self._code(jnp.swapaxes(split, 1, 2), part)[0]

    def scores(self, operands: Operands) -> jax.Array:
        """See `Arithmetic.scores`."""
        scores: jax.Array = jnp.einsum("bhtd,bhsd->bhts", operands.query, operands.key)
        if self.observing:
            self.observe("scores", scores * self.valid[:, None, None, :])
        return scores

    def probabilities(self, scores: jax.Array, operands: Operands, weights: jax.Array) -> jax.Array:
        """See `Arithmetic.probabilities`; gates multiply the exponentials."""
        logits = scores * operands.logit_scale
        return attention_probabilities(logits, weights, self.knobs, self.relaxation)

    def attend(self, probabilities: jax.Array, operands: Operands) -> jax.Array:
        """See `Arithmetic.attend`."""
        attended = weighted_values(probabilities, operands.value, operands.value_scale)
        return self.enter(attended, "out")

    def activate(self, x: jax.Array) -> jax.Array:
        """See `Arithmetic.activate`."""
        return self.enter(NON_LINEARITIES[self.structure.activation](x), "down")

    def pooled(self, r: jax.Array) -> jax.Array:
        """Returns the first token of the residual stream through the pooler, as what enters `head`, `[B, 1, D]`."""
        x = self.linear(self.read(r[:, :1], "pool"), "pool")
        return self.enter(NON_LINEARITIES[self.structure.pooler](x), "head")

    def add(self, r: jax.Array, branch: jax.Array, site: str) -> jax.Array:
        """See `Arithmetic.add`."""
        total = r + self.on_residual_grid(branch)
        self.observe({"out": "attention_branch", "down": "ffn_branch"}[site], branch)
        self.observe("residual", total)
        if self.structure.norm == "pre":
            return total
        name = {"out": "attention_norm", "down": "ffn_norm"}[site]
        return self.on_residual_grid(self.normalise(total, name))

    def on_residual_grid(self, x: jax.Array) -> jax.Array:
        """Returns `x` in whole codes of the residual stream, whose width is not trained."""
        if self.relaxation is None:
            return x
        assert self.residual_range is not None
        scale = gates.detach(self.residual_range / code_limit(RESIDUAL_BITS))
        return gates.straight_through(jnp.round(x / scale) * scale, x)

    def observe(self, name: str, x: jax.Array) -> None:
        """Records the absolute maximum of `x` (`[B, T, ...]` or `[B, H, T, d]`) over tokens that exist."""
        if not self.observing:
            return
        # Of images, patches alone enter their embedding, and the first token alone a pooler.
        valid = self.valid[:, : x.shape[-2]]
        exists = valid[:, None, :, None] if x.ndim == 4 else valid[:, :, None]
        largest = jnp.max(jnp.abs(gates.detach(x)) * exists)
        self.observed[name] = jnp.maximum(self.observed.get(name, largest), largest)
