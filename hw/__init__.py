"""Accelerators: specification, differentiable cost, simulators, integer emulator."""

if not __name__.startswith("codesign."):
    raise ImportError(
        f"this folder is the package `codesign.hw`, imported as {__name__!r}: write "
        "`from codesign.hw... import ...` and run `python -m codesign.hw...`."
    )
