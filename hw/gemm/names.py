"""Names of loop dimensions, tensors and accesses, and which dimension addresses which tensor. Imports no JAX."""

from collections.abc import Mapping

CONVOLUTION = ("R", "S", "P", "Q", "C", "K", "N")
"""Filter rows and columns, output rows and columns, input channels, output channels, batch."""
MATMUL = ("P", "C", "K")
"""Rows, reduction and columns of `out[P, K] = in[P, C] w[C, K]`."""
STRIDED = ("P", "Q")
"""Dimensions whose iteration moves the input by a stride."""

WEIGHTS, INPUTS, OUTPUTS = TENSORS = ("weights", "inputs", "outputs")
PARTIAL = "partial"
"""Key of the width of partial sums, beside those of the tensors."""

AXES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    WEIGHTS: (("R",), ("S",), ("C",), ("K",)),
    INPUTS: (("N",), ("C",), ("P", "R"), ("Q", "S")),
    OUTPUTS: (("N",), ("P",), ("Q",), ("K",)),
}
"""The axes of a tensor, each with the dimensions that move along it: two of them make a sliding window."""

READ, WRITE, UPDATE, ACCUMULATE, DRAIN = ("read", "write", "update", "accumulate", "drain")
ACCESSES: Mapping[str, tuple[str, ...]] = {
    WEIGHTS: (READ, WRITE),
    INPUTS: (READ, WRITE),
    OUTPUTS: (UPDATE, ACCUMULATE, DRAIN),
}
"""What a memory does with a tensor. Operands are written from above and read downwards; results are updated from below,
read for addition, and drained upwards (tiles that come back are among the latter)."""


def axes(tensor: str, dims: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Returns the axes of a tensor in a layer of these dimensions, each with its dimensions."""
    present = [tuple(dim for dim in axis if dim in dims) for axis in AXES[tensor]]
    return [axis for axis in present if axis]


def addresses(tensor: str, dims: tuple[str, ...]) -> tuple[bool, ...]:
    """Returns for each dimension whether it addresses the tensor."""
    addressing = {dim for axis in axes(tensor, dims) for dim in axis}
    return tuple(dim in addressing for dim in dims)
