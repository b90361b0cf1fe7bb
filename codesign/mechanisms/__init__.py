"""Mechanisms by name: one file each, one line here."""

from codesign.errors import UnknownNameError
from codesign.mechanisms.a3 import a3
from codesign.mechanisms.acceltran import acceltran
from codesign.mechanisms.bitserial import bitserial
from codesign.mechanisms.dense import dense, dense_beside
from codesign.mechanisms.energon import energon
from codesign.mechanisms.esact import esact
from codesign.mechanisms.fact import fact
from codesign.mechanisms.lapa import lapa
from codesign.mechanisms.protocol import Hooks, Mechanism
from codesign.mechanisms.sanger import sanger
from codesign.mechanisms.sofa import sofa
from codesign.mechanisms.spatten import spatten
from codesign.mechanisms.topk import topk

MECHANISMS = {
    mechanism.name: mechanism
    for mechanism in (
        dense,
        energon,
        acceltran,
        sofa,
        lapa,
        esact,
        topk,
        bitserial,
        sanger,
        a3,
        spatten,
        fact,
    )
}

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
