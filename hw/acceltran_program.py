"""What AccelTran's cycle-level simulator runs: transfers and tile operations of an encoder, in order; no JAX.

An encoder is the load of its embedding, then for each layer a block of heads, whose streams run side by side, and a
block of one stream for the rest. A stream has two lists, taken one by one: tile operations and transfers.

References:
  Tuli, Jha, "AccelTran", arXiv 2302.14705; simulator of the repository jha-lab/acceltran.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from codesign.errors import CodesignError, UnknownNameError
from codesign.hw.acceltran_estimator import Layer, Machine

Kind = Literal["product", "convolution", "softmax", "norm", "nonlinearity"]
Storage = Literal["weight", "activation"]
EMBEDDING = "embedding"


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tile operations of one operation.

    Attributes:
      kind: What one of them is.
      count: How many there are.
      service: Cycles of one.
      needs: Data that must be in a buffer before any of them starts.
    """

    kind: Kind
    count: int
    service: int
    needs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Data on their way into a buffer, from main memory or from the units.

    Attributes:
      data: Their name.
      storage: The buffer.
      elements: How many.
      producer: Index of the stream's operation that a store waits for; None: a load.
    """

    data: str
    storage: Storage
    elements: int
    producer: int | None


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Tile operations and transfers in program order."""

    operations: tuple[Tiles, ...]
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True, kw_only=True)
class Program:
    """An encoder.

    Attributes:
      embedding: The first load.
      blocks: Streams of the heads of a layer and the one stream of its rest, in turn.
    """

    embedding: Transfer
    blocks: tuple[tuple[Stream, ...], ...]


def lower(
    layers: Sequence[Layer], machine: Machine, *, num_tokens: int, activation_sparsity: float
) -> Program:
    """Returns the program of a batch.

    Args:
      layers: The encoder.
      machine: Sizes of tiles, lanes and batch.
      num_tokens: Tokens of an example, >= 1.
      activation_sparsity: Zeros among activations, in [0, 1), which shorten services.

    Raises:
      UnknownNameError: If an operator does not exist.
      CodesignError: If a layer has fewer than two heads, or a convolution no products in a tile.
    """
    rows = machine.constants.vocabulary.value + num_tokens
    blocks = []
    for index, layer in enumerate(layers):
        if len(layer.heads) < 2:
            raise CodesignError(
                f"layer {index + 1} has {len(layer.heads)} head: AccelTran's simulator takes at least two "
                "(of a lone one it drops most operations); split it or use the closed form"
            )
        after = layers[index + 1].width if index + 1 < len(layers) else layer.width
        writers = [
            _Writer(machine, num_tokens, activation_sparsity, f"{index}.{head}")
            for head in range(len(layer.heads))
        ]
        for writer, name in zip(writers, layer.heads, strict=True):
            writer.head(name, layer.width)
        blocks.append(tuple(writer.stream() for writer in writers))
        rest = _Writer(machine, num_tokens, activation_sparsity, f"{index}")
        rest.feed_forward(layer, after)
        blocks.append((rest.stream(),))
    embedding = Transfer(
        data=EMBEDDING,
        storage="weight",
        elements=int(rows) * layers[0].width,
        producer=None,
    )
    return Program(embedding=embedding, blocks=tuple(blocks))


class _Writer:
    """Writes one stream, operation by operation."""

    def __init__(
        self, machine: Machine, num_tokens: int, activation_sparsity: float, prefix: str
    ) -> None:
        self.machine = machine
        self.tokens = num_tokens
        self.density = 1.0 - activation_sparsity
        self.prefix = prefix
        self.operations: list[Tiles] = []
        self.transfers: list[Transfer] = []

    def stream(self) -> Stream:
        """Returns what was written."""
        return Stream(operations=tuple(self.operations), transfers=tuple(self.transfers))

    def head(self, name: str, width: int) -> None:
        """Writes a head; its inputs lie in the activation buffer."""
        kind, _, number = name.rpartition("_")
        size = int(number) if number.isdigit() else 0
        batch, tokens = self.machine.batch, self.tokens
        match kind:
            case "sa_sdp" | "sa_wma" if size >= 1:
                self._attention(width, size, is_weighted=kind == "sa_wma")
            case "l_dft" | "l_dct" if size >= 1:
                weights = self._load("transform", batch * tokens * tokens)
                self._product(tokens, tokens, width, (weights,))
                self._store("out", batch * tokens * width)
            case "c_5" | "c_9" | "c_13" if size >= 1:
                taps = int(kind.removeprefix("c_"))
                weights = self._load("taps", batch * taps * width)
                self._convolution(taps, width, (weights,))
                self._store("out", batch * tokens * width)
            case _:
                raise UnknownNameError(
                    f"unknown operator `{name}`: use sa_sdp_<d>, sa_wma_<d>, l_dft_<d>, l_dct_<d> or "
                    "c_<k>_<d> with k of 5, 9, 13"
                )

    def feed_forward(self, layer: Layer, next_width: int) -> None:
        """Writes what follows the heads: norms, dense layers, and the step to another width."""
        self._norm(layer.width)
        inner = layer.width
        for index, outer in enumerate((*layer.hidden, layer.width)):
            self._dense(f"dense{index}", inner, outer)
            inner = outer
        self._norm(layer.width)
        if next_width != layer.width:
            self._dense("step", layer.width, next_width)

    def _attention(self, width: int, size: int, *, is_weighted: bool) -> None:
        batch, tokens = self.machine.batch, self.tokens
        names = ("query", "key", "value")
        loaded = [self._load(f"{name}.weight", batch * width * size) for name in names]
        first = len(self.operations)
        for data in loaded:
            self._product(tokens, width, size, (data,))
        stored = [
            self._store(name, batch * tokens * size, producer=first + index)
            for index, name in enumerate(names)
        ]
        query, key, value = stored
        if is_weighted:
            weight = self._load("weighted.weight", batch * size * size)
            self._product(size, size, tokens, (weight, key, query, value))
            # The keys already lie in the buffer under this name, so that storing them again takes no time.
            self._store("key", batch * tokens * size, producer=first + 1)
        self._product(tokens, size, tokens, (query, key, value))
        scores = self._store("scores", batch * tokens * tokens)
        self._add("softmax", self.machine.tiles(tokens, tokens), (scores, value))
        probabilities = self._store("probabilities", batch * tokens * tokens)
        self._product(tokens, tokens, size, (value, probabilities))
        heads = self._store("head", batch * tokens * size)
        weight = self._load("out.weight", batch * size * width)
        self._product(tokens, size, width, (weight, heads))
        self._store("out", batch * tokens * width)

    def _dense(self, name: str, inner: int, outer: int) -> None:
        """A dense layer; its non-linearity is tiled by the layer's input, as there."""
        batch, tokens = self.machine.batch, self.tokens
        weight = self._load(f"{name}.weight", batch * inner * outer)
        self._product(tokens, inner, outer, (weight,))
        stored = self._store(name, batch * tokens * outer)
        self._add("nonlinearity", self.machine.tiles(tokens, inner), (stored,))

    def _norm(self, width: int) -> None:
        self._add("norm", self.machine.tiles(self.tokens, width), ())

    def _product(self, rows: int, inner: int, cols: int, needs: tuple[str, ...]) -> None:
        machine = self.machine
        self._add("product", machine.tiles(rows, cols) * math.ceil(inner / machine.tile_x), needs)

    def _convolution(self, taps: int, width: int, needs: tuple[str, ...]) -> None:
        machine = self.machine
        if taps >= machine.tile_y:
            raise CodesignError(
                f"a convolution of {taps} taps has no products in a tile of {machine.tile_y}: AccelTran's "
                "simulator never ends with it; enlarge the tile or use the closed form"
            )
        macs = machine.tile_b * machine.tile_x * (machine.tile_y - taps)
        self._add("convolution", machine.tiles(self.tokens, width), needs, macs=macs)

    def _add(self, kind: Kind, count: int, needs: tuple[str, ...], *, macs: int = 0) -> None:
        machine = self.machine
        match kind:
            case "product" | "convolution":
                macs = macs or machine.tile_b * machine.tile_x * machine.tile_y**2
                service = macs / machine.multipliers * self.density
            case "softmax":
                service = machine.tile_x * machine.tile_y * self.density
            case "norm":
                service = machine.tile_b * (machine.tile_x + machine.tile_y) * self.density
            case "nonlinearity":
                service = 1.0
        self.operations.append(
            Tiles(kind=kind, count=count, service=math.ceil(service), needs=needs)
        )

    def _load(self, name: str, elements: int) -> str:
        return self._transfer(name, "weight", elements, None)

    def _store(self, name: str, elements: int, *, producer: int | None = None) -> str:
        last = len(self.operations) - 1
        return self._transfer(name, "activation", elements, last if producer is None else producer)

    def _transfer(self, name: str, storage: Storage, elements: int, producer: int | None) -> str:
        data = f"{self.prefix}.{name}"
        self.transfers.append(
            Transfer(data=data, storage=storage, elements=elements, producer=producer)
        )
        return data
