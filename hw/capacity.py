"""Whether memories hold the least that a model brings: what is smaller is refused before anything runs."""

from codesign import units
from codesign.errors import PresetError
from codesign.hw.spec import AcceleratorSpec

WIDEST_BITS = 16
"""Bits of an element of queries, keys, values and tokens, at most."""


def check_capacities(spec: AcceleratorSpec, *, head_dim: int, width: int) -> None:
    """Does nothing if every memory holds a tile of what it is there for.

    A tile is a vector of a head in the memories of queries, keys and values, a token in those of tokens and activations.

    Args:
      spec: The machine.
      head_dim: Width of a head, elements.
      width: Width of a token, elements.

    Raises:
      PresetError: If one does not; names the first.
    """
    tiles = dict.fromkeys(("key", "value", "query"), ("a vector of a head", head_dim))
    tiles["token"] = ("a token", width)
    if spec.storage is not None and spec.storage.activations is not None:
        tiles[spec.storage.activations] = ("a token", width)
    for name, (tile, elements) in tiles.items():
        if name not in spec.memories:
            continue
        capacity = spec.memories[name].capacity.base
        needed = elements * WIDEST_BITS / units.BITS_PER_BYTE
        if capacity < needed:
            raise PresetError(
                f"{spec.name}: `memories.{name}.capacity`: {capacity:g} B hold no tile, {tile} of {elements} elements of "
                f"{WIDEST_BITS} bit: make it at least {needed:g} B"
            )
