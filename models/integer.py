"""The integer arithmetic of the deployed path, in JAX with 64-bit types; its contract is docs/integer_path.md.

Codes are int32. What lies between them (products, sums, scores) are whole numbers below 2^53 in float64, which holds them
exactly and is faster than int64. There is no exp, no tanh and no division: exponentials, non-linearities and reciprocals
are tables, requantisation is a multiply and a shift, and a normalisation takes one square root and one division, both
correctly rounded.
"""

import jax
import jax.numpy as jnp

from codesign.mechanisms.protocol import OPERANDS, Hooks, Operands, part_columns
from codesign.quantize import exact_einsum
from codesign.structure import ACTIVATION_LIMIT, ModelStructure
from codesign.tables import look_up, quotient, table_exponentials
from codesign.vocabulary import BLOCK_SITES

RESIDUAL_LIMIT = 32767
"""Largest code of the 16-bit residual stream."""
NORM_FRACTION_BITS = 14
"""Fraction bits of a normalised value before its gain."""
GAIN_SHIFT = 30
"""Fraction bits of gain (with those of the value) and bias in a normalisation."""
BIAS_FRACTION_BITS = 8
"""Fraction bits of an accumulator below the scale of its products, for the bias."""
RECIPROCAL_BITS = 12
"""Bits that index the reciprocal table: 4096 entries."""
LINEAR_CODE_BITS = 8
"""Most bits of the codes in a dense layer."""
ATTENTION_CODE_BITS = 16
"""Most bits of the codes in exact attention."""
NORMS = {
    "qkv": ("attention_gain", "attention_bias"),
    "up": ("ffn_gain", "ffn_bias"),
    "pool": ("pool_gain", "pool_offset"),
    "head": ("head_gain", "head_offset"),
}
"""Gain and bias of the normalisation before (pre-norm) or after (post-norm) the branch of a site."""


def wide(whole: jax.Array) -> jax.Array:
    """Returns whole numbers below 2^53 in the type that holds them, float64."""
    return whole.astype(jnp.float64)


def limit(bits: jax.Array) -> jax.Array:
    """Returns the largest code of a width, 2^(bits-1) - 1, int32."""
    return jnp.left_shift(1, bits.astype(jnp.int32) - 1) - 1


def saturate(value: jax.Array, largest: jax.Array | int) -> jax.Array:
    """Returns whole numbers limited to [-largest, largest], as codes, int32."""
    most = jnp.asarray(largest).astype(value.dtype)
    return jnp.clip(value, -most, most).astype(jnp.int32)


def requantize(value: jax.Array, mantissa: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns rint(value * mantissa / 2^shift), ties to even, float64; exact while the product stays below 2^53."""
    scale = jnp.ldexp(jnp.ones_like(shift, dtype=jnp.float64), -shift.astype(jnp.int32))
    return jnp.round(wide(value) * wide(mantissa) * scale)


def normalize(
    r: jax.Array, gain: jax.Array, bias: jax.Array, largest: jax.Array | int, epsilon: jax.Array
) -> jax.Array:
    """Returns the normalisation of codes `[B, T, D]` as codes in [-largest, largest]."""
    width, r = r.shape[-1], wide(r)
    total = jnp.sum(r, axis=-1, keepdims=True)
    squares = jnp.sum(r * r, axis=-1, keepdims=True)
    variance = width * squares - total * total + wide(epsilon)
    unit = quotient(width * r - total, jnp.sqrt(variance))
    fixed = jnp.round(unit * 2.0**NORM_FRACTION_BITS)
    scaled = fixed * wide(gain)[None, None, :] + wide(bias)[None, None, :]
    return saturate(jnp.round(scaled * 2.0**-GAIN_SHIFT), largest)


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
        product = exact_einsum("btk,kn->btn", x, self.weight_codes(site), LINEAR_CODE_BITS)
        code = self._requantized(product, site)
        return saturate(code, ACTIVATION_LIMIT) if site in ("up", "pool") else code

    def _requantized(self, accumulator: jax.Array, site: str, part: str | None = None) -> jax.Array:
        """Returns the accumulator (of a part of the columns) with its bias in the scale of what consumes it."""
        names = (f"{site}_bias", f"{site}_mantissa", f"{site}_shift")
        bias, mantissa, shift = (
            self.arrays[name] if part is None else part_columns(self.arrays[name], part)
            for name in names
        )
        return requantize(
            wide(accumulator) * 2.0**BIAS_FRACTION_BITS + wide(bias)[None, None, :],
            mantissa[None, None, :],
            shift[None, None, :],
        )

    def heads(self, projected: jax.Array) -> Operands:
        """See `Arithmetic.heads`."""
        query, key, value = (
            self._operand(part_columns(projected, part), part) for part in OPERANDS
        )
        one = jnp.ones((), jnp.float64)
        return Operands(query=query, key=key, value=value, logit_scale=one, value_scale=one)

    def estimate(self, accumulator: jax.Array, part: str) -> jax.Array:
        """See `Numbers.estimate`."""
        return self._operand(self._requantized(accumulator, "qkv", part), part)

    def _operand(self, code: jax.Array, part: str) -> jax.Array:
        """Returns whole numbers `[B, T, H*d]` as the codes of an operand's heads, `[B, H, T, d]`."""
        split = jnp.reshape(code, (*code.shape[:2], self.structure.num_heads, -1))
        bits = self.arrays["v_bits" if part == "value" else "qk_bits"]
        return saturate(jnp.swapaxes(split, 1, 2), limit(bits))

    def scores(self, operands: Operands) -> jax.Array:
        """See `Arithmetic.scores`."""
        return wide(
            exact_einsum("bhtd,bhsd->bhts", operands.query, operands.key, ATTENTION_CODE_BITS)
        )

    def probabilities(self, scores: jax.Array, operands: Operands, weights: jax.Array) -> jax.Array:
        """See `Arithmetic.probabilities`: a table of powers of two and one reciprocal per row."""
        del operands
        kept = weights > 0.5
        top = jnp.max(jnp.where(kept, scores, -jnp.inf), axis=-1, keepdims=True)
        distance = jnp.where(kept, top - scores, 0.0)
        powers = table_exponentials(
            distance,
            self.arrays["exp_mantissa"],
            self.arrays["exp_shift"],
            self.tables["exp_table"],
        )
        masses = wide(jnp.where(kept, powers, 0))
        total = jnp.sum(masses, axis=-1, keepdims=True).astype(jnp.int64)
        total = jnp.maximum(total, 2**RECIPROCAL_BITS)
        log_total = 63 - jax.lax.clz(total)
        entry = jnp.right_shift(total, log_total - RECIPROCAL_BITS) - 2**RECIPROCAL_BITS
        one = wide(limit(self.arrays["qk_bits"]))
        reciprocal = wide(look_up(self.tables["reciprocal_table"], entry)) * one
        codes = jnp.minimum(requantize(masses, reciprocal, 16 + log_total), one)
        return codes.astype(jnp.int32)

    def attend(self, probabilities: jax.Array, operands: Operands) -> jax.Array:
        """See `Arithmetic.attend`."""
        sums = exact_einsum(
            "bhts,bhds->bthd",
            probabilities,
            jnp.swapaxes(operands.value, 2, 3),
            ATTENTION_CODE_BITS,
        )
        code = saturate(
            requantize(sums, self.arrays["context_mantissa"], self.arrays["context_shift"]),
            limit(self.arrays["out_activation_bits"]),
        )
        return jnp.reshape(code, (*code.shape[:2], -1))

    def activate(self, x: jax.Array) -> jax.Array:
        """See `Arithmetic.activate`: a table."""
        return look_up(self.arrays["activation_table"], x + ACTIVATION_LIMIT)

    def pooled(self, r: jax.Array) -> jax.Array:
        """Returns the first token of the residual stream through the pooler, as what enters `head`, `[B, 1, D]`."""
        x = self.linear(self.read(r[:, :1], "pool"), "pool")
        return look_up(self.arrays["pool_table"], x + ACTIVATION_LIMIT)

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
