"""What Gemmini executes for a mapping: commands, DMA requests, memory lines and their reuse.

A program walks the DRAM loops of a mapping; each step ("block") is one hardware loop (`LOOP_CONV_WS`, `LOOP_WS`)
that loads its inputs and weights, multiplies, and stores its outputs once their sum is complete. Facts of the
hardware and of the program that ran the mappings, all checked in their sources:

- Nothing stays in the scratchpad from one block to the next: inputs and weights are loaded again in every block.
- A load moves up to 64 bytes of each of up to 16 rows; every row is a request of its own. Rows of inputs are pixels, rows
  of weights one input channel of one kernel position, both contiguous in channels.
- For every 16 x 16 weights the array takes, output row by output row, up to 16 pixels of that row: a
  preload and a compute command (a "pair"). A pair that brings new weights occupies the array for 16 cycles, any other
  for its pixels, at least 4 (the accumulator must have written the sum before).
- Convolutions are padded by half a kernel, and inputs have `stride` times the outputs: kernels of 2 give one output
  more per row and column than the mapping has, in blocks of their own. Padding is not loaded.
- A layer with Q = R = S = 1 runs as a matrix product of P rows.

References:
  Genc et al., "Gemmini", DAC 2021, and repositories ucb-bar/gemmini (LoopConv, ExecuteController: minimum of 4 rows),
  ucb-bar/gemmini-rocc-tests (tiled_conv, tiled_matmul with loop permutations; gemmini-data-collection), BSD-3-Clause.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from flax import struct
from numpy.typing import NDArray

from codesign.errors import DataError, UnknownNameError
from codesign.hw.gemmini_mapping import DIMENSIONS, LEVELS, Integers, LoopNests

Floats = NDArray[np.float64]
Padding = Literal["half_kernel", "none"]

R, S, P, Q, C, K, N = range(len(DIMENSIONS))
TENSORS = ("weights", "inputs", "outputs")
_READS = {"weights": (R, S, C, K), "inputs": (P, Q, C, N), "outputs": (P, Q, K, N)}
"""Dimensions along which a tensor's lines change; inputs move by a pixel along R and S, which is the same lines."""
_INNER_FIRST = (C, R, S, K, P, Q, N)
"""Order of the loops that a mapping does not name, from the innermost; they stand outside those it names."""
_ENDS = 3
"""Kinds of blocks along an axis: first, in between, last."""


@dataclass(frozen=True, kw_only=True)
class GemminiSizes:
    """Sizes that commands and requests depend on.

    Attributes:
      side: Rows and columns of the array.
      min_rows: Cycles that a pair occupies the array for at least.
      line_bytes: Bytes of a request, and of a line of the last-level cache.
      beat_bytes: Bytes that the bus moves in a cycle.
    """

    side: int = 16
    min_rows: int = 4  # ExecuteController, comment at `total_rows`
    line_bytes: int = 64  # dma_maxbytes; lines of the inclusive cache
    beat_bytes: int = 16  # dma_buswidth 128 bits


@struct.dataclass
class GemminiCounts:
    """Counts of N layers, by kind of block (B = 9: first, inner, last by columns and by rows) where they depend on it.

    Attributes:
      blocks: Blocks of each kind, `[N, B]`.
      weight_tiles: Weights of 16 x 16 that a block multiplies with, `[N, 1]`.
      pairs: Preload and compute commands for one such weight tile, `[N, B]`.
      rows: Cycles for which these occupy the array, `[N, B]`.
      reads: Read requests of a block, weights and inputs, `[N, B, 2]`; each is one line.
      read_beats: Cycles in which the bus moves them, `[N, B, 2]`.
      writes: Lines that a block's outputs lie in, `[N, B]`.
      write_beats: Cycles in which the bus moves them, `[N, B]`.
      blocks_per_output: Blocks that add to one output, `[N, 1]`.
      reuse_steps: Steps of each DRAM loop in which the lines of a tensor are those of the step before, 1 if
        none, `[N, 3, D]`, loops from the innermost.
      reuse_bytes: Bytes of all lines touched before they are used again, `[N, 3, D]`.
      total_bytes: Bytes of all lines of a layer, `[N, 1]`.
    """

    blocks: Floats
    weight_tiles: Floats
    pairs: Floats
    rows: Floats
    reads: Floats
    read_beats: Floats
    writes: Floats
    write_beats: Floats
    blocks_per_output: Floats
    reuse_steps: Floats
    reuse_bytes: Floats
    total_bytes: Floats


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """Columns or rows of a layer: `outputs`, `inputs` of them `[N]`, and blocks by kind `[N, 3]`."""

    outputs: Integers
    inputs: Integers
    number: Integers
    width: Integers
    loaded: Floats


def _ceil(count: Integers, size: int | Integers) -> Integers:
    """Returns `count / size`, rounded up."""
    return -(-count // size)


def count_commands(
    nests: LoopNests,
    stride: Integers,
    *,
    sizes: GemminiSizes | None = None,
    padding: Padding = "half_kernel",
) -> GemminiCounts:
    """Returns what mappings make the machine do.

    Args:
      nests: The mappings.
      stride: Stride of each layer along columns and rows, `[N]`, >= 1.
      sizes: Sizes of the machine; None: those of a 16 x 16 array of 8-bit elements.
      padding: `half_kernel` as the program that was measured does it; `none`: inputs reach as far as the outputs need.

    Raises:
      DataError: If a stride is missing or not positive.
      UnknownNameError: If the padding is unknown.
    """
    sizes = sizes or GemminiSizes()
    if padding not in get_args(Padding):
        raise UnknownNameError(
            f"unknown padding `{padding}`: use one of {', '.join(get_args(Padding))}"
        )
    if stride.shape != nests.sizes.shape[:1] or np.any(stride < 1):
        raise DataError(
            f"`stride` must be one whole number >= 1 for each of the {len(nests.sizes)} mappings: "
            "give the strides of the layers"
        )
    layer, tile = nests.sizes, nests.tiles
    is_product = np.all(layer[:, (Q, R, S)] == 1, axis=1)
    stride = np.where(is_product, 1, stride)
    columns, rows = (
        _axis(layer, tile, stride, output, kernel, padding) for output, kernel in ((P, R), (Q, S))
    )
    bounds = layer.copy()
    bounds[:, P], bounds[:, Q] = columns.outputs, rows.outputs
    steps = _ceil(bounds, tile)

    def per_kind(of_columns: Floats | Integers, of_rows: Floats | Integers) -> Floats:
        """Combines the kinds along both axes, `[N, 9]`."""
        both = of_columns[:, :, None] * of_rows[:, None, :]
        return both.reshape(len(layer), -1).astype(np.float64)

    ones = np.ones((len(layer), _ENDS), np.int64)
    batch = tile[:, N, None]
    kernel_rows = np.prod(tile[:, (R, S, C)], axis=1)[:, None]
    others = np.prod(steps[:, (R, S, C, K, N)], axis=1)[:, None]
    full, part = columns.width // sizes.side, columns.width % sizes.side
    rest = np.where(part > 0, np.maximum(part, sizes.min_rows), 0)
    # The pair that brings new weights is the first one.
    waits = np.where(full > 0, 0, sizes.side - rest)
    pixels_in = per_kind(columns.loaded, rows.loaded) * batch
    pixels_out = per_kind(columns.width, rows.width) * batch

    def channels(width: Integers, unit: int) -> Integers:
        return _ceil(width, unit)[:, None]

    def reads(unit: int) -> Floats:
        weights = np.broadcast_to(kernel_rows * channels(tile[:, K], unit), pixels_in.shape)
        return np.stack([weights * 1.0, pixels_in * channels(tile[:, C], unit)], axis=-1)

    reuse_steps, reuse_bytes, total_bytes = _reuse(
        nests, tile, bounds, steps, stride, (columns, rows), sizes
    )
    return GemminiCounts(
        blocks=per_kind(columns.number, rows.number) * others,
        weight_tiles=1.0
        * channels(tile[:, K], sizes.side)
        * np.prod(tile[:, (R, S)], axis=1)[:, None]
        * channels(tile[:, C], sizes.side),
        pairs=per_kind(_ceil(columns.width, sizes.side), rows.width) * batch,
        rows=per_kind(full * sizes.side + rest, rows.width) * batch + per_kind(waits, ones),
        reads=reads(sizes.line_bytes),
        read_beats=reads(sizes.beat_bytes),
        writes=pixels_out * channels(tile[:, K], sizes.line_bytes),
        write_beats=pixels_out * channels(tile[:, K], sizes.beat_bytes),
        blocks_per_output=1.0 * np.prod(steps[:, (R, S, C)], axis=1)[:, None],
        reuse_steps=reuse_steps,
        reuse_bytes=reuse_bytes,
        total_bytes=total_bytes,
    )


def _axis(
    layer: Integers, tile: Integers, stride: Integers, output: int, kernel: int, padding: Padding
) -> _Axis:
    """Returns one axis: `output` is P or Q, `kernel` the dimension R or S that goes with it."""
    taps, width = layer[:, kernel], tile[:, output]
    if padding == "half_kernel":
        border, inputs = taps // 2, layer[:, output] * stride
    else:
        border, inputs = np.zeros_like(taps), (layer[:, output] - 1) * stride + taps
    outputs = (inputs + 2 * border - taps) // stride + 1
    blocks = _ceil(outputs, width)
    number = np.stack([np.ones_like(blocks), np.maximum(blocks - 2, 0), np.minimum(blocks - 1, 1)])
    start = np.stack([np.zeros_like(width), width, (blocks - 1) * width])
    # A kind that no block has still gets a width of at least one.
    covered = np.clip(outputs - start, 1, width)
    loaded = np.zeros(number.shape)
    steps = _ceil(taps, tile[:, kernel])
    for step in range(int(steps.max())):
        begin = start * stride + step * tile[:, kernel] - border
        end = begin + covered * stride + tile[:, kernel] - 1
        inside = np.clip(end, 0, inputs) - np.clip(begin, 0, inputs)
        loaded += np.where(step < steps, inside, 0) / steps
    return _Axis(outputs=outputs, inputs=inputs, number=number.T, width=covered.T, loaded=loaded.T)


def _reuse(
    nests: LoopNests,
    tile: Integers,
    bounds: Integers,
    steps: Integers,
    stride: Integers,
    axes: tuple[_Axis, _Axis],
    sizes: GemminiSizes,
) -> tuple[Floats, Floats, Floats]:
    """Returns `reuse_steps`, `reuse_bytes` and `total_bytes` of `GemminiCounts`."""

    def lines_bytes(covered: Integers) -> Integers:
        """Returns the bytes of the lines that hold all tensors of a part of the layer, `[N]`."""
        covered = np.minimum(covered, bounds)
        taps = (covered[:, R], covered[:, S])
        columns, rows = (
            np.minimum(covered[:, output] * stride + kernel - 1, axis.inputs)
            for output, kernel, axis in zip((P, Q), taps, axes, strict=True)
        )

        def line(channels: Integers) -> Integers:
            return _ceil(channels, sizes.line_bytes) * sizes.line_bytes

        weights = taps[0] * taps[1] * covered[:, C] * line(covered[:, K])
        inputs = columns * rows * line(covered[:, C])
        outputs = covered[:, P] * covered[:, Q] * line(covered[:, K])
        total: Integers = weights + (inputs + outputs) * covered[:, N]
        return total

    place = nests.place[:, LEVELS.index("dram")]
    outside = np.argsort(_INNER_FIRST) + 1  # of the loops named, whose places are negated: <= 0
    order = np.argsort(np.where(place >= 0, -place, outside), axis=1, kind="stable")
    shape = (len(tile), len(TENSORS), len(DIMENSIONS))
    reuse_steps, reuse_bytes = np.ones(shape), np.ones(shape)
    covered = tile.copy()
    row = np.arange(len(tile))
    for loop in range(len(DIMENSIONS)):
        dimension = order[:, loop]
        number = steps[row, dimension]
        # Tiles of few channels share their lines with the next ones.
        together = np.clip(sizes.line_bytes // tile[row, dimension], 1, number)
        inner = covered.copy()
        inner[row, dimension] *= together
        covered[row, dimension] *= number
        apart, near = lines_bytes(covered), lines_bytes(inner)
        for index, tensor in enumerate(TENSORS):
            same = ~np.isin(dimension, _READS[tensor])
            if tensor == "outputs":
                same &= ~np.isin(dimension, (R, S, C))  # written once, when complete
            shares = dimension == (C if tensor == "inputs" else K)
            reuse_steps[:, index, loop] = np.where(same, number, np.where(shares, together, 1))
            reuse_bytes[:, index, loop] = np.where(same, apart, near)
    return reuse_steps, reuse_bytes, lines_bytes(bounds)[:, None].astype(np.float64)
