"""Experiments: configurations, data, training, curves, exports and the command line."""

if not __name__.startswith("codesign."):
    raise ImportError(
        f"this folder is the package `codesign.experiments`, imported as {__name__!r}: write "
        "`from codesign.experiments... import ...` and run `python -m codesign.experiments...`."
    )
