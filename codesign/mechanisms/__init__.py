"""Mechanisms by name: one file each; `codesign.vocabulary.MECHANISM_OPERATIONS` is the list of them."""

from importlib import import_module

from codesign.errors import UnknownNameError
from codesign.mechanisms.dense import dense_beside
from codesign.mechanisms.protocol import Hooks, Mechanism
from codesign.vocabulary import MECHANISM_OPERATIONS

MECHANISMS: dict[str, Mechanism] = {
    name: getattr(import_module(f"{__name__}.{name}"), name) for name in MECHANISM_OPERATIONS
}
"""The object `x` of the file `x.py` for each listed name `x`."""

__all__ = ["MECHANISMS", "Hooks", "Mechanism", "dense_beside", "mechanism_by_name"]


def mechanism_by_name(name: str) -> Mechanism:
    """Returns a mechanism of the registry.

    Raises:
      UnknownNameError: If there is none of that name.
    """
    if name not in MECHANISMS:
        raise UnknownNameError(
            f"mechanism `{name}` does not exist: choose one of {', '.join(sorted(MECHANISMS))}"
        )
    return MECHANISMS[name]
