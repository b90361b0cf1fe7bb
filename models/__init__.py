"""Transformer models in Flax NNX: layers, attention, the block and its front ends."""

if not __name__.startswith("codesign."):
    raise ImportError(
        f"this folder is the package `codesign.models`, imported as {__name__!r}: write "
        "`from codesign.models... import ...` and run `python -m codesign.models...`."
    )
