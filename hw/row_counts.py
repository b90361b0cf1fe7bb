"""What masks bring to a machine that moves query rows: keys by row, operations, vectors by stream; NumPy only.

Axes: L layers, B examples, H heads, T queries.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from codesign import units
from codesign.hw.simulation import Trace
from codesign.hw.spec import AcceleratorSpec

Widths = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Facts read off the masks.

    `keys[r]` is the number of keys of each query row that enter round r, the last entry what attention runs on,
    `[R + 1, L, B, H, T]`; `vectors` the key vectors fetched for them, `[R + 1, L, B, H]`; `valid` `[B, T]`.
    """

    keys: np.ndarray
    vectors: np.ndarray
    valid: np.ndarray

    @property
    def queries(self) -> np.ndarray:
        """Rows of each head, `[L, B, H]`."""
        return np.broadcast_to(self.valid.sum(axis=1)[None, :, None], self.vectors.shape[1:])


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """What a batch brings to a machine.

    Attributes:
      keys: Keys of each row by set of rows (`filter0`, ..., `all`, `attention`), `[L, B, H, T]`.
      operations: Counts by `stage.kind`, `[L, B, H]`.
      widths: Bits of both operands by operation, `[L]`.
      vectors: Vectors moved by stream, `[L, B, H]`, and the bits of their elements, `[L]`.
    """

    keys: dict[str, np.ndarray]
    operations: dict[str, np.ndarray]
    widths: dict[str, tuple[np.ndarray, np.ndarray]]
    vectors: dict[str, tuple[np.ndarray, np.ndarray]]

    def __or__(self, other: "RowCounts") -> "RowCounts":
        """Adds counts, those of `other` where both have one."""
        return RowCounts(
            keys=self.keys | other.keys,
            operations=self.operations | other.operations,
            widths=self.widths | other.widths,
            vectors=self.vectors | other.vectors,
        )

    def stream_bytes(self, head_dim: int) -> dict[str, np.ndarray]:
        """Returns bytes moved by stream, `[L, B, H]`."""
        return {
            name: vectors * head_dim * width[:, None, None] / units.BITS_PER_BYTE
            for name, (vectors, width) in self.vectors.items()
        }


def row_counts(trace: Trace, spec: AcceleratorSpec, bits: Widths, is_causal: bool) -> RowCounts:
    """Returns what a batch brings to a machine: exact attention on the last mask, and what found it.

    Args:
      trace: The masks. With `query_bits` among the widths they are rounds of planes (Energon); by mechanism `topk` the
        largest of exact scores; else nothing was filtered.
      spec: The machine.
      bits: Deployed widths.
      is_causal: Whether a token attends to itself and to those before it only.
    """
    if "query_bits" in bits:
        planes = list(np.diff(bits["key_bits"], axis=1, prepend=0).T)
        return _planes(
            _read_masks(trace, spec, bits, len(planes), is_causal), trace, spec, bits, planes
        )
    if trace.mechanism in _FINDERS:
        masks = _read_masks(trace, spec, bits, 1, is_causal)
        return _FINDERS[trace.mechanism](masks, trace, bits)
    masks = _read_masks(trace, spec, bits, 0, is_causal)
    counts = _attention(masks, trace, bits)
    return counts | RowCounts(keys={"all": masks.keys[-1]}, operations={}, widths={}, vectors={})


def _attention(masks: Masks, trace: Trace, bits: Widths) -> RowCounts:
    """Returns exact attention on the last mask."""
    final, queries, head_dim = masks.keys[-1].sum(axis=-1), masks.queries, trace.head_dim
    qk, value = bits["qk_bits"], bits["v_bits"]
    operations = {
        "qk.mac": final * head_dim,
        "softmax.exp": final,
        "softmax.reciprocal": queries,
        "pv.mac": final * head_dim,
        "output.multiply": queries * head_dim,
    }
    widths = {key: (qk, qk) for key in operations}
    widths |= {"pv.mac": (qk, value), "output.multiply": (qk, value)}
    vectors = {
        "query": (queries, qk),
        "output": (queries, bits["out.activation_bits"]),
        "key_rest": (masks.vectors[-1], qk),
        "value": (masks.vectors[-1], value),
    }
    return RowCounts(
        keys={"attention": masks.keys[-1]}, operations=operations, widths=widths, vectors=vectors
    )


def _planes(
    masks: Masks, trace: Trace, spec: AcceleratorSpec, bits: Widths, planes: list[np.ndarray]
) -> RowCounts:
    """Returns rounds that see ever more planes of the keys, then attention on what they leave (Energon)."""
    alive, queries = masks.keys.sum(axis=-1), masks.queries
    rest = bits["qk_bits"]
    if not spec.switches.separate_storage.value:
        rest = rest - bits["key_bits"][:, -1]
    keys, operations, widths = {}, {}, {}
    vectors = {"key_rest": (masks.vectors[-1], rest)}
    for index, plane in enumerate(planes):
        keys[f"filter{index}"] = masks.keys[index]
        vectors[f"key{index}"] = (masks.vectors[index], plane)
        for kind, factor in (("mac", trace.head_dim), ("statistic", 1), ("compare", 1)):
            operations[f"filter{index}.{kind}"] = alive[index] * factor
            widths[f"filter{index}.{kind}"] = (bits["query_bits"], plane)
    one = np.ones_like(bits["qk_bits"])
    # Of the example's own keys, whatever it is padded to.
    longest = [max(int(number - 1).bit_length(), 1) for number in masks.valid.sum(axis=1)]
    operations["threshold.evaluate"] = queries * len(planes)
    operations["index.bits"] = alive[1:].sum(axis=0) * np.asarray(longest)[None, :, None]
    widths |= {"threshold.evaluate": (one, one), "index.bits": (one, one)}
    own = RowCounts(keys=keys, operations=operations, widths=widths, vectors=vectors)
    return _attention(masks, trace, bits) | own


def _top(masks: Masks, trace: Trace, bits: Widths) -> RowCounts:
    """Returns scores of all pairs, a bisection over them, and values of what it keeps (exact top-k)."""
    pairs = masks.keys[0].sum(axis=-1)
    qk = bits["qk_bits"]
    passes = 2 * qk + int(trace.head_dim - 1).bit_length() + 1
    own = RowCounts(
        keys={"all": masks.keys[0]},
        operations={
            "qk.mac": pairs * trace.head_dim,
            "select.compare": pairs * passes[:, None, None],
        },
        widths={"select.compare": (passes, np.ones_like(passes))},
        vectors={
            "key0": (masks.vectors[0], qk),
            "key_rest": (masks.vectors[-1], np.zeros_like(qk)),
        },
    )
    return _attention(masks, trace, bits) | own


_FINDERS: dict[str, Callable[[Masks, Trace, Widths], RowCounts]] = {"topk": _top}
"""Counts of mechanisms with one round whose widths do not name them."""


def _read_masks(
    trace: Trace, spec: AcceleratorSpec, bits: Widths, num_rounds: int, is_causal: bool
) -> Masks:
    """Returns the facts of `num_rounds` rounds and of the last mask."""
    assert spec.pipeline.query_block is not None
    valid = np.asarray(trace.valid, bool)
    head_bytes = valid.sum(axis=1) * trace.head_dim / units.BITS_PER_BYTE
    block = int(spec.pipeline.query_block.value)
    keys, vectors = [], []
    for layer in range(trace.packed.shape[0]):
        keep = trace.keep(layer)
        exists = valid[:, None, :, None] & valid[:, None, None, :]
        if is_causal:
            exists = exists & np.tril(np.ones(exists.shape[2:], bool))
        rounds = [keep[:, :, index] for index in range(num_rounds)] or [keep[:, :, -1]]
        first = [np.broadcast_to(exists, rounds[0].shape)] if num_rounds else []
        entering = [*first, *(mask & exists for mask in rounds)]
        fits = (head_bytes * bits["qk_bits"][layer] <= spec.memories["key"].capacity.base) & (
            head_bytes * bits["v_bits"][layer] <= spec.memories["value"].capacity.base
        )
        keys.append([mask.sum(axis=-1) for mask in entering])
        vectors.append(
            [
                np.where(fits[:, None], _fetched(mask, mask.shape[2]), _fetched(mask, block))
                for mask in entering
            ]
        )
    return Masks(
        keys=np.moveaxis(np.asarray(keys, np.int64), 1, 0),
        vectors=np.moveaxis(np.asarray(vectors, np.int64), 1, 0),
        valid=valid,
    )


def _fetched(mask: np.ndarray, block: int) -> np.ndarray:
    """Returns the key vectors that blocks of `block` queries fetch, `[B, H]`, of a mask `[B,H,T,S]`."""
    starts = np.arange(0, mask.shape[2], block)
    wanted = np.logical_or.reduceat(mask, starts, axis=2)
    fetched: np.ndarray = wanted.sum(axis=(2, 3))
    return fetched
