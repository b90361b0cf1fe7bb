"""No mechanism: exact attention over every pair. The reference every saving is measured against."""

import dataclasses

from codesign.mechanisms.protocol import Mechanism

dense = Mechanism(name="dense", summary="exact attention over all pairs; the reference")


def dense_beside(mechanism: Mechanism) -> Mechanism:
    """Returns `dense` as the machine of a mechanism runs it: on the same units, the mechanism switched off."""
    return dataclasses.replace(dense, soft=mechanism.bypass, hard=mechanism.bypass)
