"""The integer arithmetic of the deployed path, in JAX with 64-bit types; its contract is docs/integer_path.md.

Codes are int64. Dense products run in floating point where that is exact. Between codes there is no exp, no tanh and no
division: exponentials, non-linearities and reciprocals are tables, requantisation is a multiply and a shift, and a
normalisation takes one square root and one division, both correctly rounded.
"""

import jax
import jax.numpy as jnp
import numpy as np

from codesign.mechanisms.protocol import Hooks, Operands
from codesign.policy import BLOCK_SITES
from codesign.quantize import exact_einsum
from codesign.structure import ACTIVATION_LIMIT, ModelStructure

RESIDUAL_LIMIT = 32767
"""Largest code of the 16-bit residual stream."""
NORM_FRACTION_BITS = 14
"""Fraction bits of a normalised value before its gain."""
GAIN_SHIFT = 30
"""Fraction bits of gain (with those of the value) and bias in a normalisation."""
BIAS_FRACTION_BITS = 8
"""Fraction bits of an accumulator below the scale of its products, for the bias."""
EXP_FRACTION_BITS = 12
"""Fraction bits of the exponent's table index: 4096 entries."""
RECIPROCAL_BITS = 12
"""Bits that index the reciprocal table: 4096 entries."""
LINEAR_LIMIT = 127 * 127
"""Largest product in a dense layer: 8-bit codes."""
ATTENTION_LIMIT = 32767 * 32767
"""Largest product in exact attention: 16-bit codes."""
NORMS = {
    "qkv": ("attention_gain", "attention_bias"),
    "up": ("ffn_gain", "ffn_bias"),
    "pool": ("pool_gain", "pool_offset"),
    "head": ("head_gain", "head_offset"),
}
"""Gain and bias of the normalisation before (pre-norm) or after (post-norm) the branch of a site."""


def limit(bits: jax.Array) -> jax.Array:
    """Returns the largest code of a width, 2^(bits-1) - 1, int64."""
    return jnp.left_shift(jnp.ones_like(bits), bits - 1) - 1


def saturate(value: jax.Array, largest: jax.Array | int) -> jax.Array:
    """Returns `value` limited to [-largest, largest]."""
    return jnp.clip(value, -largest, largest)


def requantize(value: jax.Array, mantissa: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns rint(value * mantissa / 2^shift), ties to even; exact while the product stays below 2^53."""
    scale = jnp.ldexp(jnp.ones_like(shift, dtype=jnp.float64), -shift.astype(jnp.int32))
    product = (value * mantissa).astype(jnp.float64)
    return jnp.round(product * scale).astype(jnp.int64)


def normalize(
    r: jax.Array, gain: jax.Array, bias: jax.Array, largest: jax.Array | int, epsilon: jax.Array
) -> jax.Array:
    """Returns the normalisation of codes `[B, T, D]` as codes in [-largest, largest]."""
    width = r.shape[-1]
    total = jnp.sum(r, axis=-1, keepdims=True)
    squares = jnp.sum(r * r, axis=-1, keepdims=True)
    variance = (width * squares - total * total + epsilon).astype(jnp.float64)
    unit = (width * r - total).astype(jnp.float64) / jnp.sqrt(variance)
    fixed = jnp.round(unit * 2.0**NORM_FRACTION_BITS).astype(jnp.int64)
    scaled = fixed * gain[None, None, :] + bias[None, None, :]
    code = jnp.round(scaled.astype(jnp.float64) * 2.0**-GAIN_SHIFT).astype(jnp.int64)
    return saturate(code, largest)


class IntegerArithmetic:
    """The arithmetic of a deployed layer (or of the ends), over its integer arrays."""

    def __init__(
        self,
        arrays: dict[str, jax.Array],
        tables: dict[str, jax.Array],
        *,
        structure: ModelStructure,
        hooks: Hooks | None = None,
    ):
        self.arrays = arrays
        self.tables = tables
        self.structure = structure
        self.hooks = hooks or Hooks()

    def read(self, r: jax.Array, site: str) -> jax.Array:
        """See `Arithmetic.read`."""
        largest = limit(self.arrays[f"{site}_activation_bits"])
        if self.structure.norm == "pre":
            return self._normalized(r, NORMS[site], largest)
        mantissa, shift = (self.arrays[f"{site}_enter_{part}"] for part in ("mantissa", "shift"))
        return saturate(requantize(r, mantissa, shift), largest)

    def _normalized(
        self, r: jax.Array, names: tuple[str, str], largest: jax.Array | int
    ) -> jax.Array:
        gain, bias = (self.arrays[name] for name in names)
        return normalize(r, gain, bias, largest, self.tables["norm_epsilon"])

    def codes(self, x: jax.Array, site: str) -> jax.Array:
        """See `Numbers.codes`: activations are codes."""
        del site
        return x

    def weight_codes(self, site: str) -> jax.Array:
        """See `Numbers.weight_codes`."""
        return self.arrays[f"{site}_weight"]

    def linear(self, x: jax.Array, site: str) -> jax.Array:
        """See `Arithmetic.linear`: an exact accumulator, requantised."""
        product = exact_einsum("btk,kn->btn", x, self.weight_codes(site), LINEAR_LIMIT)
        code = self._requantized(product.astype(jnp.int64), site)
        return saturate(code, ACTIVATION_LIMIT) if site in ("up", "pool") else code

    def _requantized(self, accumulator: jax.Array, site: str) -> jax.Array:
        """Returns the accumulator with its bias in the scale of what consumes it."""
        return requantize(
            (accumulator << BIAS_FRACTION_BITS) + self.arrays[f"{site}_bias"][None, None, :],
            self.arrays[f"{site}_mantissa"][None, None, :],
            self.arrays[f"{site}_shift"][None, None, :],
        )

    def heads(self, projected: jax.Array) -> Operands:
        """See `Arithmetic.heads`."""
        return self._operands(projected)

    def estimate(self, accumulator: jax.Array) -> Operands:
        """See `Numbers.estimate`."""
        return self._operands(self._requantized(accumulator, "qkv"))

    def _operands(self, code: jax.Array) -> Operands:
        split = jnp.reshape(code, (*code.shape[:2], 3, self.structure.num_heads, -1))
        qk_limit, v_limit = limit(self.arrays["qk_bits"]), limit(self.arrays["v_bits"])
        query, key, value = (
            saturate(jnp.swapaxes(split[:, :, index], 1, 2), largest)
            for index, largest in ((0, qk_limit), (1, qk_limit), (2, v_limit))
        )
        one = jnp.ones((), jnp.float64)
        return Operands(query=query, key=key, value=value, logit_scale=one, value_scale=one)

    def scores(self, operands: Operands) -> jax.Array:
        """See `Arithmetic.scores`."""
        scores = exact_einsum("bhtd,bhsd->bhts", operands.query, operands.key, ATTENTION_LIMIT)
        return scores.astype(jnp.int64)

    def probabilities(self, scores: jax.Array, operands: Operands, weights: jax.Array) -> jax.Array:
        """See `Arithmetic.probabilities`: a table of powers of two and one reciprocal per row."""
        del operands
        kept = weights > 0.5
        lowest = np.iinfo(np.int64).min
        top = jnp.max(jnp.where(kept, scores, lowest), axis=-1, keepdims=True)
        distance = jnp.where(kept, top - scores, 0)
        index = jnp.right_shift(distance * self.arrays["exp_mantissa"], self.arrays["exp_shift"])
        fraction = jnp.bitwise_and(index, 2**EXP_FRACTION_BITS - 1)
        exponent = jnp.minimum(jnp.right_shift(index, EXP_FRACTION_BITS), 31)
        powers = jnp.right_shift(jnp.take(self.tables["exp_table"], fraction), exponent)
        masses = jnp.where(kept, powers, 0)
        total = jnp.maximum(jnp.sum(masses, axis=-1, keepdims=True), 2**RECIPROCAL_BITS)
        log_total = 63 - jax.lax.clz(total)
        entry = jnp.right_shift(total, log_total - RECIPROCAL_BITS) - 2**RECIPROCAL_BITS
        reciprocal = jnp.take(self.tables["reciprocal_table"], entry)
        one = limit(self.arrays["qk_bits"])
        shift = jnp.broadcast_to(16 + log_total, masses.shape)
        return jnp.minimum(requantize(masses, reciprocal * one, shift), one)

    def attend(self, probabilities: jax.Array, operands: Operands) -> jax.Array:
        """See `Arithmetic.attend`."""
        sums = exact_einsum(
            "bhts,bhds->bthd",
            probabilities,
            jnp.swapaxes(operands.value, 2, 3),
            ATTENTION_LIMIT,
        ).astype(jnp.int64)
        code = saturate(
            requantize(sums, self.arrays["context_mantissa"], self.arrays["context_shift"]),
            limit(self.arrays["out_activation_bits"]),
        )
        return jnp.reshape(code, (*code.shape[:2], -1))

    def activate(self, x: jax.Array) -> jax.Array:
        """See `Arithmetic.activate`: a table."""
        return jnp.take(self.arrays["activation_table"], x + ACTIVATION_LIMIT)

    def pooled(self, r: jax.Array) -> jax.Array:
        """Returns the first token of the residual stream through the pooler, as what enters `head`, `[B, 1, D]`."""
        x = self.linear(self.read(r[:, :1], "pool"), "pool")
        return jnp.take(self.arrays["pool_table"], x + ACTIVATION_LIMIT)

    def add(self, r: jax.Array, branch: jax.Array, site: str) -> jax.Array:
        """See `Arithmetic.add`: saturating 16-bit codes."""
        total = saturate(r + branch, RESIDUAL_LIMIT)
        if self.structure.norm == "pre":
            return total
        return self._normalized(total, NORMS[{"out": "qkv", "down": "up"}[site]], RESIDUAL_LIMIT)

    def weight_densities(self) -> dict[str, jax.Array]:
        """See `Arithmetic.weight_densities`."""
        if not self.hooks.skips_zeros:
            return {}
        return {
            f"{site}.weight": jnp.mean((self.weight_codes(site) != 0).astype(jnp.float64))
            for site in BLOCK_SITES
        }
