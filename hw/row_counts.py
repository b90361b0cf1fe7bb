"""What masks bring to a machine that moves query rows: keys by row, operations, vectors by stream; NumPy only.

Axes: L layers, B examples, H heads, T queries.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from codesign import units
from codesign.hw.simulation import Trace
from codesign.hw.spec import AcceleratorSpec
from codesign.references.bitserial import CODE_BITS
from codesign.references.sanger import LOW_BITS, PIECE, PROBABILITY_SHIFT
from codesign.references.spatten import LOW_BITS as LOW_BITS_ON_DEMAND

Widths = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Facts read off the masks.

    `keys[r]` is the number of keys of each query row that enter round r, the last entry what attention runs on,
    `[R + 1, L, B, H, T]`; `vectors` the key vectors fetched for them, `[R + 1, L, B, H]`; `pieces` are the keys that
    attention runs on by piece of a row, `[L, B, H, T, n]`; `valid` `[B, T]`.
    """

    keys: np.ndarray
    vectors: np.ndarray
    pieces: np.ndarray
    valid: np.ndarray

    @property
    def queries(self) -> np.ndarray:
        """Rows of each head, `[L, B, H]`."""
        return np.broadcast_to(self.valid.sum(axis=1)[None, :, None], self.vectors.shape[1:])


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A batch on a machine: its decisions, deployed widths, and whether tokens see only those before them."""

    trace: Trace
    spec: AcceleratorSpec
    bits: Widths
    is_causal: bool

    def masks(self, num_rounds: int, key_bits: np.ndarray | None = None) -> Masks:
        """Returns the facts of `num_rounds` rounds and of the last mask.

        Args:
          num_rounds: Rounds that filter; 0: the last mask is all there is.
          key_bits: Bits of a key's element in its buffer, `[L]`; None: those of exact attention.
        """
        trace, spec = self.trace, self.spec
        assert spec.pipeline.query_block is not None
        valid = np.asarray(trace.valid, bool)
        head_bytes = valid.sum(axis=1) * trace.head_dim / units.BITS_PER_BYTE
        block = int(spec.pipeline.query_block.value)
        key_bits = self.bits["qk_bits"] if key_bits is None else key_bits
        keys, vectors, pieces = [], [], []
        for layer in range(trace.packed.shape[0]):
            keep = trace.keep(layer)
            exists = valid[:, None, :, None] & valid[:, None, None, :]
            if self.is_causal:
                exists = exists & np.tril(np.ones(exists.shape[2:], bool))
            rounds = [keep[:, :, index] for index in range(num_rounds)] or [keep[:, :, -1]]
            first = [np.broadcast_to(exists, rounds[0].shape)] if num_rounds else []
            entering = [*first, *(mask & exists for mask in rounds)]
            stored = (("key", key_bits), ("value", self.bits["v_bits"]))
            fits = np.all(
                [
                    head_bytes * bits[layer] <= spec.memories[name].capacity.base
                    for name, bits in stored
                ],
                axis=0,
            )
            keys.append([mask.sum(axis=-1) for mask in entering])
            cuts = np.arange(0, exists.shape[-1], PIECE)
            pieces.append(np.add.reduceat(entering[-1], cuts, axis=-1, dtype=np.int64))
            vectors.append(
                [
                    np.where(fits[:, None], _fetched(mask, mask.shape[2]), _fetched(mask, block))
                    for mask in entering
                ]
            )
        return Masks(
            keys=np.moveaxis(np.asarray(keys, np.int64), 1, 0),
            vectors=np.moveaxis(np.asarray(vectors, np.int64), 1, 0),
            pieces=np.asarray(pieces),
            valid=valid,
        )


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """What a batch brings to a machine.

    Attributes:
      keys: Keys of each row by set of rows (`filter0`, ..., `all`, `attention`), `[L, B, H, T]`, of `packed` by its
        pieces, `[L, B, H, T, n]`.
      operations: Counts by `stage.kind`, `[L, B, H]`.
      widths: Bits of both operands by operation, `[L]`.
      vectors: Vectors moved by stream, `[L, B, H]`, and the bits of their elements, `[L]`.
      linear_rows: Rows of linear layers by site, `[L, B]`, where they are not all tokens.
    """

    keys: dict[str, np.ndarray]
    operations: dict[str, np.ndarray]
    widths: dict[str, tuple[np.ndarray, np.ndarray]]
    vectors: dict[str, tuple[np.ndarray, np.ndarray]]
    linear_rows: dict[str, np.ndarray] = field(default_factory=dict)

    def __or__(self, other: "RowCounts") -> "RowCounts":
        """Adds counts, those of `other` where both have one."""
        return RowCounts(
            keys=self.keys | other.keys,
            operations=self.operations | other.operations,
            widths=self.widths | other.widths,
            vectors=self.vectors | other.vectors,
            linear_rows=self.linear_rows | other.linear_rows,
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
      trace: The masks, whose rounds are those of the mechanism that it names; of any other nothing was filtered.
      spec: The machine.
      bits: Deployed widths.
      is_causal: Whether a token attends to itself and to those before it only.
    """
    facts = Facts(trace=trace, spec=spec, bits=bits, is_causal=is_causal)
    if trace.mechanism in _FINDERS:
        return _FINDERS[trace.mechanism](facts)
    if spec.mechanism == "bitserial":
        return _whole_planes(facts)
    masks = facts.masks(0)
    counts = _attention(masks, trace, bits)
    rows = dict.fromkeys(("all", "scored", "qk", "used"), masks.keys[-1])
    return counts | RowCounts(keys=rows, operations={}, widths={}, vectors={})


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
        keys={"attention": masks.keys[-1], "packed": masks.pieces},
        operations=operations,
        widths=widths,
        vectors=vectors,
    )


def _rounds(facts: Facts) -> RowCounts:
    """Returns rounds that see ever more bits of the keys, then attention on what they leave (Energon)."""
    trace, spec, bits = facts.trace, facts.spec, facts.bits
    planes = list(np.diff(bits["key_bits"], axis=1, prepend=0).T)
    masks = facts.masks(len(planes))
    alive, queries = masks.keys.sum(axis=-1), masks.queries
    rest = bits["qk_bits"]
    if not spec.switches.separate_storage.value:
        rest = rest - bits["key_bits"][:, -1]
    own = _plane_counts(masks, trace, planes, bits["query_bits"], ("mac", "statistic", "compare"))
    one = np.ones_like(bits["qk_bits"])
    # Of the example's own keys, whatever it is padded to.
    longest = [max(int(number - 1).bit_length(), 1) for number in masks.valid.sum(axis=1)]
    own.operations["threshold.evaluate"] = queries * len(planes)
    own.operations["index.bits"] = alive[1:].sum(axis=0) * np.asarray(longest)[None, :, None]
    own.widths.update({"threshold.evaluate": (one, one), "index.bits": (one, one)})
    own.vectors["key_rest"] = (masks.vectors[-1], rest)
    return _attention(masks, trace, bits) | own


def _plane_counts(
    masks: Masks,
    trace: Trace,
    planes: list[np.ndarray],
    query_bits: np.ndarray,
    kinds: tuple[str, ...],
) -> RowCounts:
    """Returns what planes of `planes` bits `[L]` each take of the keys that enter them."""
    alive = masks.keys.sum(axis=-1)
    keys, operations, widths, vectors = {}, {}, {}, {}
    for index, plane in enumerate(planes):
        is_there = plane > 0
        keys[f"filter{index}"] = masks.keys[index] * is_there[:, None, None, None]
        vectors[f"key{index}"] = (masks.vectors[index], plane)
        for kind in kinds:
            factor = trace.head_dim if kind == "mac" else 1
            operations[f"filter{index}.{kind}"] = alive[index] * is_there[:, None, None] * factor
            widths[f"filter{index}.{kind}"] = (query_bits, np.maximum(plane, 1))
    return RowCounts(keys=keys, operations=operations, widths=widths, vectors=vectors)


def _serial(facts: Facts) -> RowCounts:
    """Returns planes of one bit that drop keys, then softmax and values of what is left (BitStopper)."""
    number = np.minimum(facts.bits["plane_bits"], facts.bits["qk_bits"])
    return _one_bit_planes(facts, facts.masks(CODE_BITS, number), number)


def _whole_planes(facts: Facts) -> RowCounts:
    """Returns the same where no plane drops a key."""
    number = np.minimum(facts.bits["qk_bits"], CODE_BITS)
    once = facts.masks(0, number)
    every = Masks(
        keys=np.repeat(once.keys[-1:], CODE_BITS + 1, axis=0),
        vectors=np.repeat(once.vectors[-1:], CODE_BITS + 1, axis=0),
        pieces=once.pieces,
        valid=once.valid,
    )
    return _one_bit_planes(facts, every, number)


def _one_bit_planes(facts: Facts, masks: Masks, number: np.ndarray) -> RowCounts:
    """Returns `number` `[L]` planes of one bit, and attention without scores of its own."""
    trace, bits = facts.trace, facts.bits
    planes = [(index < number).astype(np.int64) for index in range(CODE_BITS)]
    query_bits = np.minimum(bits["qk_bits"], CODE_BITS)
    own = _plane_counts(masks, trace, planes, query_bits, ("mac", "compare"))
    own.operations["threshold.evaluate"] = masks.queries * number[:, None, None]
    own.widths["threshold.evaluate"] = (np.full_like(number, CODE_BITS), np.ones_like(number))
    attention = _attention(masks, trace, bits)
    del attention.operations["qk.mac"], attention.vectors["key_rest"]
    return attention | own


def _top(facts: Facts) -> RowCounts:
    """Returns scores of all pairs, a bisection over them, and values of what it keeps (exact top-k)."""
    masks, trace, bits = facts.masks(1), facts.trace, facts.bits
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


def _mask(facts: Facts) -> RowCounts:
    """Returns 4-bit scores of all pairs, their probabilities, and attention on the mask (Sanger)."""
    masks, low = facts.masks(1), np.full_like(facts.bits["qk_bits"], LOW_BITS)
    pairs = masks.keys[0].sum(axis=-1)
    own = RowCounts(
        keys={"filter0": masks.keys[0]},
        operations={
            "filter0.mac": pairs * facts.trace.head_dim,
            "filter0.exp": pairs,
            "threshold.compare": pairs,
        },
        widths={
            "filter0.mac": (low, low),
            "filter0.exp": (low, low),
            "threshold.compare": (np.full_like(low, PROBABILITY_SHIFT), np.ones_like(low)),
        },
        vectors={"key0": (masks.vectors[0], low)},
    )
    return _attention(masks, facts.trace, facts.bits) | own


def _candidates(facts: Facts) -> RowCounts:
    """Returns a search for candidates, exact scores of these, and values of what a threshold leaves (A3)."""
    masks, trace, bits = facts.masks(2), facts.trace, facts.bits
    assert trace.compares is not None
    is_on = trace.compares[:, None, :]
    steps = (1 << bits["search_bits"])[:, None, None] * is_on
    scored = masks.keys[1].sum(axis=-1)
    levels = int(trace.head_dim - 1).bit_length()
    qk, one = bits["qk_bits"], np.ones_like(bits["qk_bits"])
    own = RowCounts(
        keys={
            "all": masks.keys[0],
            "searched": steps[..., None] * masks.valid[None, :, None, :],
            "scored": masks.keys[1],
        },
        operations={
            "predict.multiply": 2 * steps * masks.queries,
            "predict.compare": 2 * steps * masks.queries * levels,
            "threshold.compare": scored * is_on,
            "qk.mac": scored * trace.head_dim,
        },
        widths={
            "predict.multiply": (qk, qk),
            "predict.compare": (2 * qk, one),
            "threshold.compare": (2 * qk, one),
        },
        vectors={
            "key_rest": (masks.vectors[0], qk),
            "value": (masks.vectors[0], bits["v_bits"]),
        },
    )
    return _attention(masks, trace, bits) | own


def _cascade(facts: Facts) -> RowCounts:
    """Returns tokens and heads that are left, scores by high bits, rows that read all, and used values (SpAtten)."""
    masks, trace, bits = facts.masks(3), facts.trace, facts.bits
    kept, low, used = masks.keys[1], masks.keys[2], masks.keys[3]
    # A row that is computed keeps a key; a token lives if one of its rows does.
    rows = kept > 0
    queries = rows.sum(axis=-1)
    again = (low > 0).sum(axis=-1)
    alive = rows.any(axis=2).sum(axis=-1)
    number = rows.shape[2]
    compared = (alive + number)[:, :, None] / number
    if facts.is_causal:
        # Each query chooses among the keys that the layer before left it, which it chose for all heads.
        union = np.stack([np.any(trace.keep(n)[:, :, 0], axis=1) for n in range(len(rows))])
        exists = (
            masks.valid[:, :, None]
            & masks.valid[:, None, :]
            & np.tril(np.ones(union.shape[2:], bool))
        )
        before = np.concatenate([exists[None], union[:-1]]).sum(axis=(2, 3))
        is_single = masks.valid.sum(axis=1) == 1
        each = before + alive * number
        compared = np.where(is_single[None], alive + number, each)[:, :, None] / number
    head_dim, qk, value = trace.head_dim, bits["qk_bits"], bits["v_bits"]
    one = np.ones_like(qk)
    totals = {
        name: keys.sum(axis=-1) for name, keys in (("kept", kept), ("low", low), ("used", used))
    }
    operations = {
        "filter0.mac": totals["kept"] * head_dim,
        "threshold.compare": queries,
        "qk.mac": totals["low"] * head_dim,
        "softmax.exp": totals["kept"] + totals["low"],
        "softmax.reciprocal": queries + again,
        "select.compare": totals["kept"] + compared,
        "pv.mac": totals["used"] * head_dim,
        "output.multiply": queries * head_dim,
    }
    widths = {key: (qk, qk) for key in operations}
    widths |= {"pv.mac": (qk, value), "output.multiply": (qk, value)}
    widths |= {"filter0.mac": (qk - LOW_BITS_ON_DEMAND, qk - LOW_BITS_ON_DEMAND)}
    widths |= {"threshold.compare": (16 * one, one), "select.compare": (qk, one)}
    attended = queries.sum(axis=2) / number
    wanted = np.stack(
        [np.any(trace.keep(n)[:, :, 0], axis=2).sum(axis=(1, 2)) for n in range(len(rows))]
    )
    return RowCounts(
        keys={
            "all": masks.keys[0],
            "filter0": kept,
            "qk": low,
            "attention": kept,
            "used": used,
        },
        operations=operations,
        widths=widths,
        vectors={
            "query": (queries, qk),
            "output": (queries, bits["out.activation_bits"]),
            "key0": (masks.vectors[1], qk - LOW_BITS_ON_DEMAND),
            "key1": (masks.vectors[2], LOW_BITS_ON_DEMAND * one),
            "value": (masks.vectors[3], value),
        },
        linear_rows={
            "qkv": (attended + 2 * wanted / number) / 3,
            "out": attended,
            "up": alive,
            "down": alive,
        },
    )


_FINDERS: dict[str, Callable[[Facts], RowCounts]] = {
    "energon": _rounds,
    "topk": _top,
    "bitserial": _serial,
    "sanger": _mask,
    "a3": _candidates,
    "spatten": _cascade,
}
"""What each mechanism brings to its machine."""


def _fetched(mask: np.ndarray, block: int) -> np.ndarray:
    """Returns the key vectors that blocks of `block` queries fetch, `[B, H]`, of a mask `[B,H,T,S]`."""
    starts = np.arange(0, mask.shape[2], block)
    wanted = np.logical_or.reduceat(mask, starts, axis=2)
    fetched: np.ndarray = wanted.sum(axis=(2, 3))
    return fetched
