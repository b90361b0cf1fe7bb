"""Writes, reads and replays a hardware configuration: JSON, integer weights, golden vectors.

The format is described in `docs/export.md`. Imports no JAX.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import shutil
import uuid
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from codesign.errors import CodesignError, ExportError, RunDirectoryError
from codesign.hw import emulator
from codesign.hw.hardware_config import SCHEMA_VERSION, Array, HardwareConfig, check_policy
from codesign.references import (
    BOOLEANS,
    LAYER_TENSORS,
    TENSORS,
    layer_shapes,
    reference_by_name,
    tensor_shapes,
)
from codesign.references.integers import exp_table
from codesign.structure import ModelStructure, PatchInput

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "weights.npz"
GOLDEN_FILE = "golden.npz"

_DTYPES = ("int8", "int16", "int32", "int64")
# Sizes to which a file may be read before anything in it is known to be right.
_MAX_CONFIG_BYTES = 64 * 1024 * 1024
_MAX_HEADER_BYTES = 512
# Sizes that stand for any number, in shapes.
_ANY_BATCH, _ANY_LENGTH = -1, -2

_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """A checked export in memory; integers have the types they are stored in, `valid` and `BOOLEANS` are bool."""

    config: HardwareConfig
    layers: dict[str, Array]
    ends: dict[str, Array]
    # Golden vectors: `pixels`, or `tokens` and `valid`; and every tensor computed from them.
    inputs: dict[str, Array]
    tensors: dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """The first element on which two runs of the integer path disagree."""

    tensor: str
    # None for a tensor outside the layers.
    layer: int | None
    # Without the layer axis.
    index: tuple[int, ...]
    expected: int
    got: int

    def __str__(self) -> str:
        """Returns one line for the user."""
        place = "" if self.layer is None else f" of layer {self.layer}"
        return (
            f"tensor `{self.tensor}`{place} at {list(self.index)}: "
            f"expected {self.expected}, got {self.got}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """Outcome of running the emulator on golden inputs."""

    num_examples: int
    # Integers compared, over all tensors.
    num_values: int
    # Elements of the mechanism's decision tensors among them.
    num_decisions: int
    difference: Difference | None

    @property
    def is_exact(self) -> bool:
        """Whether every integer agreed."""
        return self.difference is None


_FIXED_TABLES: dict[str, Callable[[], Array]] = {
    "exp_table": exp_table,
    "reciprocal_table": emulator.reciprocal_table,
}


def _table_digests(layers: Mapping[str, Array], ends: Mapping[str, Array]) -> dict[str, str]:
    """Returns the SHA-256 of every look-up table, fixed ones included."""
    tables = {name: table_fn() for name, table_fn in _FIXED_TABLES.items()}
    tables |= {name: layers[name] for name in layers if name.endswith("_table")}
    tables |= {name: ends[name] for name in ends if name.endswith("_table")}
    return {
        name: hashlib.sha256(np.ascontiguousarray(table, "<i8").tobytes()).hexdigest()
        for name, table in tables.items()
    }


def _grouped(groups: Mapping[str, Mapping[str, _Value]]) -> dict[str, _Value]:
    """Returns one mapping of `<group>/<name>`; the group `""` has no prefix."""
    return {
        f"{group}/{name}" if group else name: value
        for group, members in groups.items()
        for name, value in members.items()
    }


def _ungrouped(arrays: Mapping[str, Array], group: str) -> dict[str, Array]:
    """Returns the members of one group of `_grouped`."""
    prefix = f"{group}/" if group else ""
    return {
        name.removeprefix(prefix): values
        for name, values in arrays.items()
        if name.startswith(prefix) and (group or "/" not in name)
    }


def _narrowest(values: Array) -> Array:
    """Returns `values` in the smallest signed integer type that holds them; bools unchanged."""
    if values.dtype == np.bool_:
        return values
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    for name in _DTYPES:
        if np.iinfo(name).min <= low and high <= np.iinfo(name).max:
            return values.astype(np.dtype(name).newbyteorder("<"))
    raise ExportError(f"values from {low} to {high} do not fit 64-bit integers")


def _write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Writes an npz file whose bytes depend on the arrays alone: no dates, no compression."""
    with zipfile.ZipFile(path, "x") as archive:
        for name, values in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                narrow = _narrowest(np.ascontiguousarray(values).reshape(np.shape(values)))
                np.lib.format.write_array(file, narrow, version=(1, 0), allow_pickle=False)


def _input_shapes(structure: ModelStructure) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of golden inputs for any number of examples and tokens."""
    if isinstance(structure.input, PatchInput):
        size, channels = structure.input.image_size, structure.input.channels
        return {"pixels": (_ANY_BATCH, size, size, channels)}
    return {name: (_ANY_BATCH, _ANY_LENGTH) for name in ("tokens", "valid")}


def _checked_golden(
    structure: ModelStructure, inputs: Mapping[str, Any], tensors: Mapping[str, Any]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns golden inputs in full and golden tensors, checked against the structure."""
    given = emulator.checked_inputs(structure, inputs)
    batch_size, num_tokens = (
        given["tokens"].shape
        if "tokens" in given
        else (
            len(given["pixels"]),
            structure.max_tokens,
        )
    )
    if not batch_size:
        raise ExportError("golden inputs are empty: at least one example is needed")
    arrays = {name: np.asarray(values) for name, values in tensors.items()}
    shapes = tensor_shapes(structure, batch_size, num_tokens)
    for name in sorted({*arrays, *shapes}):
        if name not in arrays or name not in shapes:
            raise ExportError(
                f"golden array `{name}` {'is missing' if name in shapes else 'is unknown'}"
            )
        is_bool = name in BOOLEANS
        if arrays[name].shape != shapes[name] or arrays[name].dtype.kind not in (
            "b" if is_bool else "iu"
        ):
            raise ExportError(
                f"golden array `{name}` must hold {'bools' if is_bool else 'integers'} of shape "
                f"{shapes[name]}, got {arrays[name].dtype} of shape {arrays[name].shape}"
            )
    return given, {name: arrays[name] for name in shapes}


def write_export(
    directory: str | Path,
    config: HardwareConfig,
    layers: Mapping[str, Array],
    ends: Mapping[str, Array],
    inputs: Mapping[str, Any],
    tensors: Mapping[str, Any],
) -> HardwareConfig:
    """Writes `config.json`, `weights.npz` and `golden.npz`, all or nothing.

    The same arguments always give the same bytes.

    Args:
      directory: Where to write; must not exist, its parent must.
      config: Configuration; `tables` and `files` are filled in here.
      layers: Integer arrays of the blocks, layer axis first.
      ends: Integer arrays of input, embedding and head.
      inputs: Golden inputs as `emulator.emulate` takes them, at least one example.
      tensors: Every tensor of the integer path computed from them.

    Returns:
      The configuration as written.

    Raises:
      RunDirectoryError: If `directory` exists or cannot be written.
      ExportError: If arrays and configuration do not fit each other.
      DataError: If the inputs do not fit the structure.
    """
    target = Path(directory)
    if target.exists() or target.is_symlink():
        raise RunDirectoryError(f"`{target}` exists already: choose another directory")
    if not target.parent.is_dir():
        raise RunDirectoryError(f"`{target.parent}` is not a directory: create it first")
    emulator.check_deployment(config.structure, layers, ends)
    check_policy(config, layers, ends)
    given, computed = _checked_golden(config.structure, inputs, tensors)
    tables = {name: table_fn() for name, table_fn in _FIXED_TABLES.items()}
    contents = {
        WEIGHTS_FILE: _grouped({"layers": layers, "ends": ends, "tables": tables}),
        GOLDEN_FILE: _grouped({"inputs": given, "": computed}),
    }
    draft = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    try:
        draft.mkdir()
        for file, arrays in contents.items():
            _write_arrays(draft / file, arrays)
        digests = {file: _file_digest(draft / file) for file in contents}
        written = config.model_copy(
            update={"tables": _table_digests(layers, ends), "files": digests}
        )
        text = written.model_dump_json(indent=2) + "\n"
        (draft / CONFIG_FILE).write_text(text, encoding="utf-8")
        draft.rename(target)
    except OSError as error:
        raise RunDirectoryError(f"`{target}` cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return written


def _file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_config(directory: Path) -> HardwareConfig:
    """Returns the configuration of an export, checked against the schema."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ExportError(f"`{path}` does not exist: name the directory of an export")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ExportError(f"`{path}` is larger than {_MAX_CONFIG_BYTES} bytes")
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ExportError(f"`{path}` is not JSON: {error}") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise ExportError(
            f"`{path}`: `schema_version` must be {SCHEMA_VERSION}, got {version!r}: "
            "read it with the version of codesign that wrote it, or export again"
        )
    try:
        config = HardwareConfig.model_validate_json(text)
    except ValidationError as error:
        raise ExportError(f"`{path}`: {_first_fault(error)}") from error
    if config.files.keys() != {WEIGHTS_FILE, GOLDEN_FILE}:
        raise ExportError(f"`{path}`: `files` must name {WEIGHTS_FILE} and {GOLDEN_FILE}")
    return config


def _first_fault(error: ValidationError) -> str:
    """Returns place and message of the first fault, but not of trying another `kind` than the one stated."""
    faults = error.errors(include_url=False)
    others = {fault["loc"][:-1] for fault in faults if fault["loc"][-1:] == ("kind",)}
    fault = next((fault for fault in faults if fault["loc"][:-1] not in others), faults[0])
    return f"`{'.'.join(map(str, fault['loc']))}`: {fault['msg']}"


def _header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[tuple[int, ...], int]:
    """Returns the shape in an array's header and the bytes that header and values take."""
    with archive.open(entry) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("not a version 1.0 array")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(
            file, max_header_size=_MAX_HEADER_BYTES
        )
        if is_fortran or (dtype.name not in _DTYPES and dtype != np.bool_):
            raise ValueError(f"stored as {dtype}")
        return shape, file.tell() + math.prod(shape) * dtype.itemsize


def _read_arrays(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Returns the arrays of an npz file, whose headers are checked before anything is loaded.

    Args:
      path: The file.
      shapes: Expected shapes by name; a negative size stands for any number, the same one throughout.

    Raises:
      ExportError: If the file is damaged, or an array is missing, unknown or mis-shaped.
    """
    if not path.is_file():
        raise ExportError(f"`{path}` does not exist: export again")
    name = ""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            if len(entries) != len(archive.infolist()):
                raise ExportError(f"`{path}` holds two arrays of one name")
            for name in sorted({*entries, *shapes}):
                if name not in entries or name not in shapes:
                    state = "is missing" if name in shapes else "is unknown"
                    raise ExportError(f"`{path}`: array `{name}` {state}")
            sizes: dict[int, int] = {}  # the number that each negative size stands for
            for name, entry in entries.items():
                shape, num_bytes = _header(archive, entry)
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != num_bytes:
                    raise ExportError(
                        f"`{path}`: array `{name}` is not stored in {num_bytes} bytes"
                    )
                if len(shape) == len(shapes[name]):
                    pairs = zip(shapes[name], shape, strict=True)
                    sizes = {wanted: size for wanted, size in pairs if wanted < 0} | sizes
                expected = tuple(sizes.get(size, size) for size in shapes[name])
                if shape != expected:
                    raise ExportError(
                        f"`{path}`: array `{name}` must have shape {expected}, got {shape}"
                    )
            arrays = {}
            for name, entry in entries.items():
                with archive.open(entry) as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
            return arrays
    except (zipfile.BadZipFile, EOFError, ValueError, OSError) as error:
        if isinstance(error, ExportError):
            raise
        place = f"array `{name}`" if name else "it"
        raise ExportError(f"`{path}` is damaged: {place}: {error}; export again") from error


def read_export(directory: str | Path) -> Export:
    """Returns an export after checking all of it.

    Args:
      directory: Directory that `write_export` made.

    Raises:
      ExportError: If a file is missing, damaged, changed, of another schema version, or does not
        fit the others.
    """
    root = Path(directory)
    config = _read_config(root)
    structure = config.structure
    fixed = {name: table_fn() for name, table_fn in _FIXED_TABLES.items()}
    try:
        weight_shapes = {
            "layers": layer_shapes(structure),
            "ends": structure.end_shapes(),
            "tables": {name: table.shape for name, table in fixed.items()},
        }
        num_tokens = (
            structure.max_tokens if isinstance(structure.input, PatchInput) else _ANY_LENGTH
        )
        golden_shapes = {
            "inputs": _input_shapes(structure),
            "": tensor_shapes(structure, _ANY_BATCH, num_tokens),
        }
    except CodesignError as error:
        raise ExportError(f"`{root / CONFIG_FILE}`: {error}") from error
    stored = _read_arrays(root / WEIGHTS_FILE, _grouped(weight_shapes))
    golden = _read_arrays(root / GOLDEN_FILE, _grouped(golden_shapes))
    for file, digest in config.files.items():
        if _file_digest(root / file) != digest:
            raise ExportError(
                f"`{root / file}` has changed since it was exported: its SHA-256 is not the one in "
                f"{CONFIG_FILE}; export again"
            )
    layers, ends, tables = (_ungrouped(stored, group) for group in weight_shapes)
    inputs, tensors = (_ungrouped(golden, group) for group in golden_shapes)
    try:
        emulator.check_deployment(structure, layers, ends)
        check_policy(config, layers, ends)
        inputs, tensors = _checked_golden(structure, inputs, tensors)
        for name, table in fixed.items():
            if not np.array_equal(tables[name], table):
                raise ExportError(f"array `tables/{name}` is not the table of the integer path")
        if config.tables != _table_digests(layers, ends):
            raise ExportError("`tables` in the configuration disagree with the arrays")
    except CodesignError as error:
        raise ExportError(f"`{root}`: {error}") from error
    return Export(config=config, layers=layers, ends=ends, inputs=inputs, tensors=tensors)


def _slices(
    expected: Mapping[str, Any], got: Mapping[str, Any], order: Collection[str]
) -> Iterator[tuple[str, int | None, Array, Array]]:
    """Yields pairs of arrays to compare in order of computation: layer by layer, then tensors."""
    present = [name for name in order if name in expected]
    for is_layered, group in itertools.groupby(present, LAYER_TENSORS.__contains__):
        pairs = []
        for name in group:
            wanted = np.asarray(expected[name])
            if not wanted.size:
                continue
            if name not in got or np.shape(got[name]) != wanted.shape:
                raise ExportError(
                    f"tensor `{name}` cannot be compared: expected shape {wanted.shape}, "
                    f"got {np.shape(got[name]) if name in got else 'none'}"
                )
            pairs.append((name, wanted, np.asarray(got[name])))
        if not is_layered:
            yield from ((name, None, wanted, other) for name, wanted, other in pairs)
            continue
        for layer in range(min((len(wanted) for _, wanted, _ in pairs), default=0)):
            yield from ((name, layer, wanted[layer], other[layer]) for name, wanted, other in pairs)


def first_difference(
    expected: Mapping[str, Any],
    got: Mapping[str, Any],
    order: Collection[str] = TENSORS,
) -> Difference | None:
    """Returns where two runs of the integer path first disagree, in order of computation.

    Args:
      expected: Tensors by name, of any array type; those absent here are not compared.
      got: Tensors by name; must hold all of `expected` that `order` names.
      order: Names in order of computation within a layer.

    Returns:
      The first difference, or None if all integers agree.

    Raises:
      ExportError: If a tensor is missing or of another shape.
    """
    for name, layer, wanted, other in _slices(expected, got, order):
        is_different = wanted != other
        if is_different.any():
            index = np.unravel_index(int(is_different.argmax()), is_different.shape)
            return Difference(
                tensor=name,
                layer=layer,
                index=tuple(int(i) for i in index),
                expected=int(wanted[index]),
                got=int(other[index]),
            )
    return None


def replay(directory: str | Path) -> ReplayReport:
    """Returns the outcome of running the emulator on the golden inputs of an export.

    Args:
      directory: Directory that `write_export` made.

    Raises:
      ExportError: If the export cannot be read.
    """
    export = read_export(directory)
    structure = export.config.structure
    computed = emulator.emulate(structure, export.layers, export.ends, export.inputs)
    decisions = reference_by_name(structure.mechanism).decision_tensors
    return ReplayReport(
        num_examples=len(next(iter(export.inputs.values()))),
        num_values=sum(values.size for values in export.tensors.values()),
        num_decisions=sum(export.tensors[name].size for name in decisions),
        difference=first_difference(export.tensors, computed),
    )
