"""One-line messages about faulty files that pydantic parses: key path, what is wrong, how to mend it. Imports no JAX."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from codesign.hw.quantities import Quantity


def near(name: str, choices: Any) -> str:
    """Returns the hint that ends a message about an unknown name."""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f"did you mean `{close[0]}`?" if close else f"use one of {', '.join(choices)}"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Returns the pydantic models inside a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _fields_at(root: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """Returns the legal keys of the table at a location of the file."""
    models: list[type[BaseModel]] = [root]
    for key in location:
        found = [model.model_fields[key] for model in models if key in model.model_fields]
        if found:
            models = [model for field in found for model in _models(field.annotation)]
    return sorted({name for model in models for name in model.model_fields})


def one_line(error: ValidationError, root: type[BaseModel]) -> str:
    """Returns the first fault of a file that should be a `root`: key path, what is wrong, how to mend it."""
    faults = error.errors(include_url=False, include_context=False)
    # A misspelt key shows up twice: name the stray key rather than the missing one.
    fault = min(faults, key=lambda entry: entry["type"] != "extra_forbidden")
    location = tuple(key for key in fault["loc"] if not str(key).startswith("function-after["))
    path = ".".join(str(key) for key in location)
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = f"unknown key: {near(str(location[-1]), _fields_at(root, location[:-1]))}"
    elif fault["type"] == "missing":
        kind = location[-1]
        message = f"`{kind}` is missing: every number is written {{ value, unit, source }}"
        if kind not in Quantity.model_fields:
            message = f"missing: add `{kind}`"
    elif fault["type"] == "model_type":
        message = "a bare number has no unit: write { value = ..., unit = ..., source = ... }"
    elif fault["type"] == "string_too_short":
        message = "is empty: say where the number comes from, or what it means"
    elif not location:
        return message
    else:
        message = f"{message[0].lower()}{message[1:]}"
    return f"`{path}`: {message}"
