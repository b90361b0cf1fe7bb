"""What the masks of one layer bring to a machine that moves windows of rows: counts by head and window; NumPy only.

Axes: H heads, n tokens that exist (queries and keys alike), W windows of neighbouring rows that hold one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from codesign import units

HYBRID_BITS, LEADING_ONE_BITS, SCORE_BITS = 5, 4, 20
"""Sign, place and mantissa bit of a hybrid logarithm; sign and place of a leading one; a predicted score, bit."""
RESIDUAL_BITS = 16
"""Bits of what the residual stream adds."""

LINEAR = ("generate.mac", "generate.bytes", "ffn.bytes")
"""Operations of `LINEAR_STAGES`: linear layers by nature, outside the scope `attention`."""
LINEAR_STREAMS = ("ffn_output", "generate_weights")
PREDICTED_KEYS = "predicted keys"
"""The half of `predict.shift_add` that makes keys."""


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What was decided on one layer of one example.

    Attributes:
      keep: Keys that each row keeps, bool `[H, T, S]`.
      source: The row whose attention each row takes, `[H, T]`; None where nothing is predicted.
      ffn_source: The token whose feed-forward branch each takes, `[T]`; None where nothing is predicted.
      compares: Whether a head compares rows, bool `[H]`; None where no rows are compared.
      one_hot: Rows that copy a value, bool `[H, T]`; None where none does.
      ffn_full: Tokens whose feed-forward branch has all its bits, bool `[T]`; None where all have.
    """

    keep: np.ndarray
    source: np.ndarray | None
    ffn_source: np.ndarray | None
    compares: np.ndarray | None
    one_hot: np.ndarray | None = None
    ffn_full: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class WindowCounts:
    """One layer of one example.

    Attributes:
      by_window: Operations by head and window, `[H, W]`; and predicted keys under their name.
      operations: Counts of all operations, heads summed.
      widths: Bits of both operands by operation.
      stream_bytes: Bytes moved by stream.
      tokens: Tokens of each window, `[W]`.
      query_rows: Rows that get queries, `[H, W]`.
      ffn_tokens: Tokens of each window whose feed-forward branch is computed with all its bits, `[W]`.
      narrow_tokens: Tokens of each window whose branch is computed with four bits, `[W]`.
      is_causal: Whether a window's scores need its own keys and those before it only.
    """

    by_window: dict[str, np.ndarray]
    operations: dict[str, float]
    widths: dict[str, tuple[int, int]]
    stream_bytes: dict[str, float]
    tokens: np.ndarray
    query_rows: np.ndarray
    ffn_tokens: np.ndarray
    narrow_tokens: np.ndarray
    is_causal: bool


def count_windows(
    decided: Decisions,
    valid: np.ndarray,
    bits: Mapping[str, int],
    *,
    width: int,
    head_dim: int,
    window: int,
    is_causal: bool,
    has_port: bool,
) -> WindowCounts:
    """Counts what one layer of one example takes.

    Args:
      decided: Its decisions.
      valid: Tokens that exist, bool `[T]`.
      bits: The layer's widths by knob or site, bit.
      width: Width of a token, elements.
      head_dim: Width of a head, elements.
      window: Rows of a window; its first row is a multiple of it.
      is_causal: Whether a token attends to itself and to those before it only.
      has_port: Whether keys and values are written to a memory and read from it by window.
    """
    tokens = np.flatnonzero(valid)
    number, heads = len(tokens), decided.keep.shape[0]
    exists = np.ones((number, number), bool)
    if is_causal:
        exists = np.tril(exists)
    keep = decided.keep[:, tokens][..., tokens] & exists
    starts = np.flatnonzero(np.diff(tokens // window, prepend=-1))
    compares_rows, is_eager = decided.source is not None, decided.one_hot is not None
    critical = np.ones((heads, number), bool)
    computed, full = np.ones(number, bool), np.ones(number, bool)
    if decided.source is not None:
        critical = decided.source[:, tokens] == tokens
    if decided.one_hot is not None:
        critical = ~decided.one_hot[:, tokens]
    if decided.ffn_source is not None:
        computed = decided.ffn_source[tokens] == tokens
    if decided.ffn_full is not None:
        full = decided.ffn_full[tokens]

    def by_window(rows: np.ndarray) -> np.ndarray:
        """Sums rows `[..., n]` of each window."""
        total: np.ndarray = np.add.reduceat(rows, starts, axis=-1, dtype=np.int64)
        return np.broadcast_to(total, (heads, len(starts)))

    taken = keep & critical[..., None]
    # A row that copies a value wants it; one that copies a row wants nothing.
    wanted = np.logical_or.reduceat(keep if is_eager else taken, starts, axis=1)  # [H, W, n]
    seen = np.logical_or.accumulate(wanted, axis=1)
    fresh = wanted.sum(axis=2)
    fresh[:, 1:] = np.diff(seen.sum(axis=2), axis=1)
    kept = by_window(taken.sum(axis=2))
    rows = by_window(critical)
    sizes = by_window(np.ones((1, number), np.int64))
    pair_bits = bits["qk_bits"] + bits["v_bits"]
    pair_bytes = head_dim * pair_bits / units.BITS_PER_BYTE
    counts: dict[str, np.ndarray] = {
        "generate.mac": 2 * fresh * width * head_dim,
        "qk.mac": kept * head_dim,
        "softmax.exp": kept,
        "pv.mac": kept * head_dim,
        "output.divide": rows * head_dim,
    }
    qk, v = bits["qk_bits"], bits["v_bits"]
    token, weight = bits["qkv.activation_bits"], bits["qkv.weight_bits"]
    byte = units.BITS_PER_BYTE
    widths = {
        "generate.mac": (token, weight),
        "qk.mac": (qk, qk),
        "softmax.exp": (qk, qk),
        "pv.mac": (qk, v),
        "output.divide": (qk, v),
    }
    token_bytes = number * width * token / byte
    head_weights = heads * head_dim * width / byte
    streams = {
        "tokens": token_bytes,
        "ffn_output": token_bytes,
        "generate_weights": 2 * head_weights * weight,
    }
    if has_port:
        counts |= {
            "generate.bytes": fresh * pair_bytes,
            "fetch.bytes": wanted.sum(axis=2) * pair_bytes,
        }
    pairs = by_window(exists.sum(axis=1)[None])
    code_bits = HYBRID_BITS if compares_rows else LEADING_ONE_BITS
    if compares_rows or is_eager:
        counts |= {
            "encode.encode": sizes * (width / heads + 2 * head_dim),
            "predict.shift_add": 2 * sizes * width * head_dim,
            "filter0.shift_add": pairs * head_dim,
            "select.compare": pairs,
        }
        widths |= {
            "encode.encode": (token, code_bits),
            "predict.shift_add": (code_bits, code_bits),
            "filter0.shift_add": (code_bits, code_bits),
            "select.compare": (SCORE_BITS, SCORE_BITS),
        }
        streams["weight_codes"] = 2 * head_weights * code_bits
    if is_eager:
        counts["threshold.compare"] = sizes * (1 + 1 / heads)
        widths["threshold.compare"] = (SCORE_BITS, SCORE_BITS)
    if compares_rows:
        assert decided.compares is not None
        lengths = keep.sum(axis=2)
        compared = np.zeros((heads, number), np.int64)
        for row in range(number):
            earlier = np.arange(starts[starts <= row][-1], row)
            others = critical[:, earlier] * (lengths[:, earlier] + lengths[:, row, None])
            compared[:, row] = others.sum(axis=1) * decided.compares
        copied = by_window(~critical)
        out_bytes = bits["out.activation_bits"] / byte
        branches = by_window(~computed[None]) * (width * RESIDUAL_BITS / byte / heads)
        counts |= {
            "similarity.add": by_window(compared),
            "copy.bytes": copied * (head_dim * out_bytes),
            "ffn.bytes": branches,
        }
        widths |= {
            "similarity.add": (SCORE_BITS, SCORE_BITS),
        }
    widths |= {key: (byte, byte) for key in counts if key.endswith(".bytes")}
    operations = {key: float(value.sum()) for key, value in counts.items()}
    if compares_rows or is_eager:
        counts[PREDICTED_KEYS] = sizes * width * head_dim
    return WindowCounts(
        by_window=counts,
        operations=operations,
        widths=widths,
        stream_bytes=streams,
        tokens=sizes[0],
        query_rows=rows,
        ffn_tokens=by_window((computed & full)[None])[0],
        narrow_tokens=by_window((computed & ~full)[None])[0],
        is_causal=is_causal,
    )
