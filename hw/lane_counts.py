"""What the tensors of one layer bring to lanes that multiply tiles and skip zeros: operations and their tiles; NumPy only.

Every product is cut into tiles of t x t x t pairs, everything else into tiles of t x t elements. Axes: H heads, n tokens
that exist, N tiles. Widths of tensors need not be multiples of t; a last tile is then smaller.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from codesign import units
from codesign.vocabulary import BLOCK_SITES, LINEAR_MAC

PARTS = ("query", "key", "value")
"""What the columns of `qkv` make, in order."""


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """What is stored of a tensor: its elements, and their masks."""

    data: float = 0.0
    masks: float = 0.0

    @property
    def total(self) -> float:
        """Both together."""
        return self.data + self.masks


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A matrix product, or elements of one kind, of one head or all, for one example.

    Attributes:
      name: What it makes, and the head.
      key: What a unit serves, `stage.kind`.
      effectual: Products without a zero, or elements, of each tile, `[N]`.
      started: All of them, zeros included, `[N]`.
      bits: Widths of both operands, bit.
      needs: Earlier operations of the layer, by place, without which it cannot start; those of a layer that needs
        nothing wait for the layer before.
      loads: Weights that it needs, of a whole batch.
      writes: What it puts into the memory of the activations.
    """

    name: str
    key: str
    effectual: np.ndarray
    started: np.ndarray
    bits: tuple[int, int]
    needs: tuple[int, ...] = ()
    loads: Bytes = Bytes()
    writes: Bytes = Bytes()


@dataclass(frozen=True, kw_only=True)
class LayerTensors:
    """Which elements of one layer of one example are not zero, bool, of tokens that exist.

    Attributes:
      entering: What enters each linear layer, `[n, K]`, by site.
      heads: `query`, `key`, `value` `[H, n, d]`, `scores`, `probabilities` `[H, n, n]`.
      weights: Kernels `[K, N]` by site.
      exists: Pairs that exist, `[n, n]`.
    """

    entering: Mapping[str, np.ndarray]
    heads: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]
    exists: np.ndarray


def layer_operations(
    tensors: LayerTensors,
    bits: Mapping[str, int],
    *,
    tile: int,
    has_masks: bool,
    stores_scores: bool,
) -> list[Operation]:
    """Returns the operations of a layer in the order in which they are issued: heads side by side, step by step.

    Args:
      tensors: Which elements are not zero.
      bits: The layer's widths by knob or site, bit.
      tile: Side of a tile, elements.
      has_masks: Whether only elements that are not zero are stored, and a mask bit of each.
      stores_scores: Whether scores and probabilities are written.
    """
    number = len(tensors.exists)
    num_heads, _, head_dim = tensors.heads["query"].shape
    qk, v = bits["qk_bits"], bits["v_bits"]
    result: list[Operation] = []

    def held(mask: np.ndarray, width: int, number: int | None = None) -> Bytes:
        return stored(mask, width, has_masks=has_masks, number=number)

    def product(
        name: str,
        site: str,
        rows: slice,
        columns: slice,
        needs: Sequence[int],
        writes: Bytes = Bytes(),  # noqa: B008 (frozen)
    ) -> int:
        """Adds a product with a part of the weights of a linear layer."""
        pair = bits[f"{site}.activation_bits"], bits[f"{site}.weight_bits"]
        entering, weight = tensors.entering[site][:, rows], tensors.weights[site][rows, columns]
        result.append(
            Operation(
                name=name,
                key=LINEAR_MAC,
                effectual=product_tiles(entering, weight, tile),
                started=product_tiles(np.ones_like(entering), np.ones_like(weight), tile),
                bits=pair,
                needs=tuple(needs),
                loads=held(weight, pair[1]),
                writes=writes,
            )
        )
        return len(result) - 1

    def elements(
        name: str, key: str, mask: np.ndarray, width: int, needs: Sequence[int], writes: Bytes
    ) -> int:
        """Adds elements of one kind, those where `mask` is true."""
        counts = element_tiles(mask, tile)
        result.append(
            Operation(
                name=name,
                key=key,
                effectual=counts,
                started=counts,
                bits=(width, width),
                needs=tuple(needs),
                writes=writes,
            )
        )
        return len(result) - 1

    def norm(site: str, needs: Sequence[int]) -> int:
        mask, width = tensors.entering[site], bits[f"{site}.activation_bits"]
        return elements(
            f"norm {site}", "norm.element", np.ones_like(mask), width, needs, held(mask, width)
        )

    heads = range(num_heads)
    every = slice(None)
    entered = norm("qkv", ())
    made: dict[str, list[int]] = {part: [] for part in PARTS}
    for head in heads:
        for place, part in enumerate(PARTS):
            begin = (place * num_heads + head) * head_dim
            writes = held(tensors.heads[part][head], v if part == "value" else qk)
            columns = slice(begin, begin + head_dim)
            made[part].append(product(f"{part} {head}", "qkv", every, columns, [entered], writes))
    pairs = int(tensors.exists.sum())
    scored, weighted, attended = [], [], []
    for head in heads:
        query, key = tensors.heads["query"][head], tensors.heads["key"][head]
        started = pair_tiles(np.ones_like(query), np.ones_like(key), tensors.exists, tile)
        there = started > 0
        writes = held(tensors.heads["scores"][head] & tensors.exists, qk, pairs)
        result.append(
            Operation(
                name=f"scores {head}",
                key="qk.mac",
                effectual=pair_tiles(query, key, tensors.exists, tile)[there],
                started=started[there],
                bits=(qk, qk),
                needs=(made["query"][head], made["key"][head]),
                writes=writes if stores_scores else Bytes(),
            )
        )
        scored.append(len(result) - 1)
    for head in heads:
        writes = held(tensors.heads["probabilities"][head] & tensors.exists, qk, pairs)
        weighted.append(
            elements(
                f"softmax {head}",
                "softmax.exp",
                tensors.exists,
                qk,
                [scored[head]],
                writes if stores_scores else Bytes(),
            )
        )
    for head in heads:
        columns = slice(head * head_dim, (head + 1) * head_dim)
        value = tensors.heads["value"][head]
        probabilities = tensors.heads["probabilities"][head] & tensors.exists
        started = product_tiles(tensors.exists, np.ones_like(value), tile)
        there = started > 0
        result.append(
            Operation(
                name=f"attention {head}",
                key="pv.mac",
                effectual=product_tiles(probabilities, value, tile)[there],
                started=started[there],
                bits=(qk, v),
                needs=(weighted[head], made["value"][head]),
                writes=held(tensors.entering["out"][:, columns], bits["out.activation_bits"]),
            )
        )
        attended.append(len(result) - 1)
    projected = [
        product(
            f"out {head}",
            "out",
            slice(head * head_dim, (head + 1) * head_dim),
            every,
            [attended[head]],
        )
        for head in heads
    ]
    entered = norm("up", projected)
    widened = product("up", "up", every, every, [entered])
    hidden = tensors.entering["down"]
    width = bits["down.activation_bits"]
    active = elements(
        "activation",
        "activation.element",
        np.ones_like(hidden),
        width,
        [widened],
        held(hidden, width),
    )
    product("down", "down", every, every, [active])
    assert number == len(hidden)
    return result


def attention_alone(operations: Sequence[Operation]) -> list[Operation]:
    """Returns the operations of attention, for which queries, keys and values are only written: nothing makes them."""
    places: dict[int, int] = {}
    result: list[Operation] = []
    for index, one in enumerate(operations):
        part = one.name.partition(" ")[0]
        if one.key in ("qk.mac", "softmax.exp", "pv.mac") or part in PARTS:
            places[index] = len(result)
            nothing = np.zeros(0)
            is_made = part in PARTS
            result.append(
                Operation(
                    name=one.name,
                    key=one.key,
                    effectual=nothing if is_made else one.effectual,
                    started=nothing if is_made else one.started,
                    bits=one.bits,
                    needs=tuple(places[need] for need in one.needs if need in places),
                    writes=one.writes,
                )
            )
    return result


def end_operation(
    site: str,
    rows: int,
    inner: int,
    outer: int,
    bits: tuple[int, int],
    *,
    tile: int,
    has_masks: bool,
) -> Operation:
    """Returns a linear layer outside the blocks, of which no zeros are known; its input is written."""
    entering, weight = np.ones((rows, inner), bool), np.ones((inner, outer), bool)
    tiles = product_tiles(entering, weight, tile)
    return Operation(
        name=site,
        key=LINEAR_MAC,
        effectual=tiles,
        started=tiles,
        bits=bits,
        loads=stored(weight, bits[1], has_masks=has_masks),
        writes=stored(entering, bits[0], has_masks=has_masks),
    )


def dense_tensors(
    number: int,
    num_heads: int,
    head_dim: int,
    shapes: Mapping[str, tuple[int, int]],
    exists: np.ndarray,
) -> LayerTensors:
    """Returns a layer without zeros, `n` tokens; `shapes` are `(inner, outer)` of the linear layers of a block."""
    by_head = np.ones((num_heads, number, head_dim), bool)
    by_pair = np.broadcast_to(exists, (num_heads, number, number))
    return LayerTensors(
        entering={site: np.ones((number, shapes[site][0]), bool) for site in BLOCK_SITES},
        heads=dict.fromkeys(PARTS, by_head) | dict.fromkeys(("scores", "probabilities"), by_pair),
        weights={site: np.ones(shapes[site], bool) for site in BLOCK_SITES},
        exists=exists,
    )


def stored(mask: np.ndarray, bits: int, *, has_masks: bool, number: int | None = None) -> Bytes:
    """Returns the bytes of a tensor of which `number` elements exist (None: all), those of `mask` not zero."""
    number = mask.size if number is None else number
    kept = int(np.count_nonzero(mask)) if has_masks else number
    return Bytes(
        data=kept * bits / units.BITS_PER_BYTE,
        masks=number / units.BITS_PER_BYTE if has_masks else 0.0,
    )


def element_tiles(mask: np.ndarray, tile: int) -> np.ndarray:
    """Returns how many elements of `[n, m]` each tile has, `[N]`, of tiles that have any."""
    counts = _sums(_sums(mask, tile, 0), tile, 1).ravel()
    return counts[counts > 0]


def product_tiles(one: np.ndarray, other: np.ndarray, tile: int) -> np.ndarray:
    """Returns in how many products of `[n, k]` with `[k, m]` neither element is zero, by tile, `[N]`.

    A tile's pairs at one inner index are its column's elements times its row's: no pair is looked at.
    """
    left = _cut(_sums(one, tile, 0).T, tile)  # [K, t, I]
    right = _cut(_sums(other, tile, 1), tile)  # [K, t, J]
    found: np.ndarray = np.einsum("kti,ktj->ijk", left, right, optimize=True).ravel()
    return found


def pair_tiles(query: np.ndarray, key: np.ndarray, exists: np.ndarray, tile: int) -> np.ndarray:
    """Returns the same of queries `[n, d]` and keys `[n, d]`, of pairs that exist alone, `[N]`."""
    left, right = _cut(query.T, tile), _cut(key.T, tile)  # [K, t, n]
    pairs = np.einsum("kti,ktj->kij", left, right, optimize=True) * exists
    return np.moveaxis(_sums(_sums(pairs, tile, 1), tile, 2), 0, -1).ravel()


def _sums(values: np.ndarray, tile: int, axis: int) -> np.ndarray:
    """Returns sums over stretches of `tile` along an axis, float64."""
    starts = np.arange(0, values.shape[axis], tile)
    total: np.ndarray = np.add.reduceat(values, starts, axis=axis, dtype=np.float64)
    return total


def _cut(values: np.ndarray, tile: int) -> np.ndarray:
    """Returns `[k, m]` as `[K, tile, m]`, float64, filled up with zeros."""
    missing = -len(values) % tile
    padded = np.pad(values.astype(np.float64), ((0, missing), (0, 0)))
    return padded.reshape(-1, tile, values.shape[1])
