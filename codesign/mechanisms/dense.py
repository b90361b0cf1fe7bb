"""No mechanism: exact attention over every pair. The reference every saving is measured against."""

from codesign.mechanisms.protocol import Mechanism

dense = Mechanism(name="dense", summary="exact attention over all pairs; the reference")
