"""Dense attention: every pair that exists, every value."""

from codesign.references.protocol import Reference

dense = Reference(name="dense")
