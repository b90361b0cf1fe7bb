"""What the masks of one layer bring to a machine that makes keys on demand: counts by row and key tile; NumPy only.

Axes: H heads, n tokens that exist (queries and keys alike), J tiles of neighbouring keys that hold one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from codesign import units

SORTER_INPUTS, SORTER_OUTPUTS = 12, 4
"""New scores and winners of a cycle of a sorting network (arXiv 2407.10416)."""
WEIGHT_CODE_BITS = 4
"""Sign and leading-zero count of an 8-bit weight, bit (arXiv 2407.10416)."""
SOFA_QUERY_BITS, LAPA_QUERY_BITS = 5, 4
"""The same of a query of 16 and of 8 bits."""
SORTED_BITS, FILTERED_BITS = 16, 8
"""Scores in SOFA's sorter (arXiv 2407.10416) and operands of LAPA's filter, bit."""

MADE = ("generate.mac",)
"""Operations that make keys and values: a linear layer by nature, outside the scope `attention`."""
MADE_STREAMS = ("generate_tokens", "generate_weights")


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Deployed widths of one layer, bit; `tile` and `planes` are those of SOFA's segments and of LAPA's rounds."""

    qk: int
    v: int
    token: int
    weight: int
    output: int
    tile: int | None
    planes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TileCounts:
    """One layer of one example.

    Attributes:
      pairs: Operations on pairs, by row and tile, `[H, n, J]`.
      operations: Counts of all operations, heads summed.
      widths: Bits of both operands by operation.
      vectors: Elements moved by stream, and their bits.
      exists: Whether a row may attend to a key of a tile, bool `[n, J]`.
      tile_of_token: The tile of each token, `[n]`.
      first_wanting: The first row that wants a token as a key, n if none does, `[H, n]`.
      width: Width of a token, elements.
      head_dim: Width of a head, elements.
    """

    pairs: dict[str, np.ndarray]
    operations: dict[str, float]
    widths: dict[str, tuple[int, int]]
    vectors: dict[str, tuple[float, int]]
    exists: np.ndarray
    tile_of_token: np.ndarray
    first_wanting: np.ndarray
    width: int
    head_dim: int

    @property
    def stream_bytes(self) -> dict[str, float]:
        """Bytes moved by stream."""
        return {
            key: elements * bits / units.BITS_PER_BYTE
            for key, (elements, bits) in self.vectors.items()
        }

    @property
    def is_predicted(self) -> bool:
        """Whether keys are predicted before they are made."""
        return "predict.shift_add" in self.operations


def layer_widths(bits: Mapping[str, np.ndarray], layer: int) -> Widths:
    """Returns the widths of a layer; without those of a mechanism nothing is predicted."""
    return Widths(
        qk=int(bits["qk_bits"][layer]),
        v=int(bits["v_bits"][layer]),
        token=int(bits["qkv.activation_bits"][layer]),
        weight=int(bits["qkv.weight_bits"][layer]),
        output=int(bits["out.activation_bits"][layer]),
        tile=int(bits["tile_bits"][layer]) if "tile_bits" in bits else None,
        planes=tuple(int(one) for one in bits["key_bits"][layer]) if "key_bits" in bits else (),
    )


def count_tiles(
    keep: np.ndarray,
    valid: np.ndarray,
    widths: Widths,
    *,
    width: int,
    head_dim: int,
    tile_keys: int,
    query_block: int,
    is_causal: bool,
) -> TileCounts:
    """Counts what one layer of one example takes.

    Args:
      keep: Masks after each round, bool `[H, R, T, S]`.
      valid: Tokens that exist, bool `[T]`.
      widths: The layer's widths.
      width: Width of a token, elements.
      head_dim: Width of a head, elements.
      tile_keys: Keys of a tile; segments of a sorter are not cut, so that a tile holds at least one.
      query_block: Tokens that share a load of weights.
      is_causal: Whether a token attends to itself and to those before it only.
    """
    tokens = np.flatnonzero(valid)
    number, heads = len(tokens), keep.shape[0]
    exists = np.ones((number, number), bool)
    if is_causal:
        exists = np.tril(exists)
    rounds = keep[:, :, tokens][..., tokens] & exists
    segment_keys = 1 if widths.tile is None else 2**widths.tile
    tile_keys = -(-tile_keys // segment_keys) * segment_keys
    tile_of_token = np.unique(tokens // tile_keys, return_inverse=True)[1]

    def by_run(mask: np.ndarray, run: np.ndarray) -> np.ndarray:
        """Sums the keys of each run of equal numbers `[n]`."""
        starts = np.flatnonzero(np.diff(run, prepend=-1))
        total: np.ndarray = np.add.reduceat(mask, starts, axis=-1, dtype=np.int64)
        return total

    def by_tile(mask: np.ndarray) -> np.ndarray:
        return np.broadcast_to(by_run(mask, tile_of_token), (heads, number, tile_of_token[-1] + 1))

    final = rounds[:, -1]
    is_wanted = final.any(axis=1)
    first_wanting = np.where(is_wanted, final.argmax(axis=1), number)
    kept = by_tile(final)
    pairs = {"qk.mac": kept * head_dim, "pv.mac": kept * head_dim, "softmax.exp": kept}
    operand = {"qk.mac": (widths.qk, widths.qk), "pv.mac": (widths.qk, widths.v)}
    operand["softmax.exp"] = (widths.qk, widths.qk)
    blocks = -(-number // query_block) * heads
    rows = float(number * heads)
    # Operations that go with no pair.
    other = {
        "generate.mac": 2.0 * is_wanted.sum() * width * head_dim,
        "output.divide": rows * head_dim,
    }
    operand |= {
        "generate.mac": (widths.token, widths.weight),
        "output.divide": (widths.qk, widths.v),
    }
    vectors = {
        "generate_tokens": (float(is_wanted.any(axis=0).sum() * width), widths.token),
        "generate_weights": (2.0 * blocks * head_dim * width, widths.weight),
        "query": (rows * head_dim, widths.qk),
        "output": (rows * head_dim, widths.output),
    }
    if widths.tile is not None or widths.planes:
        query_bits = LAPA_QUERY_BITS if widths.tile is None else SOFA_QUERY_BITS
        other |= {"predict.shift_add": rows * width * head_dim, "encode.encode": rows * head_dim}
        operand |= {"predict.shift_add": (widths.token, WEIGHT_CODE_BITS)}
        operand |= {"encode.encode": (widths.qk, query_bits)}
        vectors |= {
            "tokens": (float(number * width), widths.token),
            "weight_codes": (float(blocks * head_dim * width), WEIGHT_CODE_BITS),
        }
    if widths.tile is not None:
        segment = np.unique(tokens // segment_keys, return_inverse=True)[1]
        sizes, winners = by_run(exists, segment), by_run(rounds[:, 0], segment)
        cycles = -(-sizes // SORTER_INPUTS) * -(-winners // SORTER_OUTPUTS)
        tile_of_segment = tile_of_token[np.flatnonzero(np.diff(segment, prepend=-1))]
        joins = np.broadcast_to(by_run(sizes > 0, tile_of_segment), kept.shape)
        pairs |= {
            "filter0.shift_add": by_tile(exists) * head_dim,
            "select.compare": by_run(cycles, tile_of_segment),
            "threshold.compare": by_tile(rounds[:, 0]),
            "softmax.exp": kept + joins,
            "softmax.add": kept + joins * (head_dim + 1),
            "softmax.compare": joins,
            "softmax.multiply": joins * (head_dim + 1),
        }
        operand |= {
            f"softmax.{kind}": operand["softmax.exp"] for kind in ("add", "compare", "multiply")
        }
        operand |= {
            key: (SORTED_BITS, SORTED_BITS) for key in ("select.compare", "threshold.compare")
        }
        operand["filter0.shift_add"] = (widths.qk, SOFA_QUERY_BITS)
    for index, plane in enumerate(np.diff(widths.planes, prepend=1)):  # The sign is in no plane.
        alive = by_tile(rounds[:, index - 1] if index else exists)
        name = f"filter{index}"
        pairs |= {f"{name}.shift_add": alive * head_dim}
        pairs |= {f"{name}.statistic": alive, f"{name}.compare": alive}
        operand[f"{name}.shift_add"] = (int(plane), LAPA_QUERY_BITS)
        operand |= {f"{name}.{kind}": (FILTERED_BITS,) * 2 for kind in ("statistic", "compare")}
    return TileCounts(
        pairs=pairs,
        operations={key: float(value.sum()) for key, value in pairs.items()} | other,
        widths=operand,
        vectors=vectors,
        exists=by_run(exists, tile_of_token) > 0,
        tile_of_token=tile_of_token,
        first_wanting=first_wanting,
        width=width,
        head_dim=head_dim,
    )
