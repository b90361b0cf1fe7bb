"""Reading of safetensors: every size in a header is checked against the file before memory is taken; no pickle.

The format: 8 bytes with the header's length, little-endian, a JSON header `{name: {dtype, shape, data_offsets}}`, then the
values, without gaps. A sharded checkpoint has an index `{"weight_map": {name: file}}` beside its files.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from codesign.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""Longest header that the safetensors library accepts."""
NUM_NAMED = 3
"""Tensors that an error names at most."""

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
"""Bytes of one value of each type that a file may hold."""
WEIGHT_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
"""Types that are read; all become float32 without loss. JAX makes bfloat16 known to NumPy, and so to the library."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor as a checked header describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_tensors(
    path: Path, wanted: Mapping[str, tuple[int, ...]], *, ignorable: Sequence[str] | None = None
) -> dict[str, NDArray[np.float32]]:
    """Returns the wanted tensors of a checkpoint.

    Args:
      path: A `.safetensors` file, the `.safetensors.index.json` of a sharded one, or a folder with either.
      wanted: Name and shape of every tensor to read.
      ignorable: Beginnings of names of tensors that may be there and are not read; None: any may.

    Raises:
      CheckpointError: If a file is missing, pickled, damaged or foreign; if a tensor is missing, not wanted, of another
        shape or type, or not finite. Names the tensors.
    """
    entries = _entries(path)
    missing = [f"`{name}`" for name in wanted if name not in entries]
    extra = [
        f"`{name}`"
        for name in entries
        if ignorable is not None and name not in wanted and not name.startswith(tuple(ignorable))
    ]
    misshaped = [
        f"`{name}` {list(entries[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in entries and entries[name].shape != tuple(shape)
    ]
    mistyped = [
        f"`{name}` {entries[name].dtype}"
        for name in wanted
        if name in entries and entries[name].dtype not in WEIGHT_TYPES
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:NUM_NAMED])}{', ...' if len(names) > NUM_NAMED else ''}"
        for kind, names in (
            ("missing", missing),
            ("not part of the model", extra),
            ("of another shape", misshaped),
            (f"not of type {'/'.join(WEIGHT_TYPES)}", mistyped),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"tensors of `{path}` do not fit the model ({'; '.join(problems)}): "
            "give a checkpoint of this architecture and size"
        )
    result: dict[str, NDArray[np.float32]] = {}
    for file in sorted({entries[name].file for name in wanted}):
        names = [name for name in wanted if entries[name].file == file]
        result |= _loaded(file, names)
    return {name: result[name] for name in wanted}


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors of a checkpoint, its headers checked and no value read.

    Raises:
      CheckpointError: If a file is missing, pickled, damaged or foreign.
    """
    return {name: entry.shape for name, entry in _entries(path).items()}


def _entries(path: Path) -> dict[str, Entry]:
    """Returns what a checkpoint holds, by name."""
    file = _checkpoint_file(path)
    return _sharded(file) if file.suffix == ".json" else _header(file)


def _checkpoint_file(path: Path) -> Path:
    """Returns the file that a path leads to: a `.safetensors` file or the index of several."""
    if path.is_dir():
        known = [path / name for name in (WEIGHTS_FILE, INDEX_FILE) if (path / name).is_file()]
        if known:
            return known[0]
        pickled = sorted(file for file in path.iterdir() if file.suffix.lower() in PICKLED)
        if not pickled:
            raise CheckpointError(
                f"folder `{path}` holds neither `{WEIGHTS_FILE}` nor `{INDEX_FILE}`: give a checkpoint's folder"
            )
        path = pickled[0]
    if path.suffix.lower() in PICKLED:
        raise CheckpointError(
            f"`{path}` may hold a pickle, which can run code when it is read, and is never loaded: "
            "convert the checkpoint to safetensors"
        )
    if not path.is_file():
        raise CheckpointError(f"checkpoint `{path}` does not exist: give a file or a folder")
    return path


def _sharded(index: Path) -> dict[str, Entry]:
    """Returns the tensors that an index names, each from the file that it names."""
    try:
        content = json.loads(index.read_bytes())
        files = content["weight_map"]
        shards = {str(name): str(file) for name, file in files.items()}
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"`{index}` is not an index of safetensors files ({error}): get it again"
        ) from error
    for file in shards.values():
        # A plain name: an index cannot lead out of its folder.
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"`{index}` names the file `{file}`, which is not a safetensors file beside it: get it again"
            )
    headers = {
        file: _header(_checkpoint_file(index.parent / file))
        for file in sorted(set(shards.values()))
    }
    for name, file in shards.items():
        if name not in headers[file]:
            raise CheckpointError(
                f"`{index.parent / file}` holds no tensor `{name}`, which `{index.name}` places there: get both again"
            )
    return {name: headers[file][name] for name, file in shards.items()}


def _header(file: Path) -> dict[str, Entry]:
    """Returns the tensors of one file, every size checked against the file's.

    Raises:
      CheckpointError: If any does not fit.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
                raise _damaged(file, f"a header of {length} bytes does not fit its {size} bytes")
            text = stream.read(length)
        content = json.loads(text, object_pairs_hook=_without_twins)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _damaged(file, f"its header is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise _damaged(file, "its header is not an object")
    content.pop("__metadata__", None)
    found = {name: _entry(file, name, stated) for name, stated in content.items()}
    end = 0
    for name, (_, begin, own_end) in sorted(found.items(), key=lambda item: item[1][1:]):
        if begin != end:
            raise _damaged(file, f"tensor `{name}` begins at byte {begin}, not {end}")
        end = own_end
    if end != size - LENGTH_BYTES - length:
        raise _damaged(
            file, f"its tensors take {end} bytes, it has {size - LENGTH_BYTES - length} for them"
        )
    return {name: entry for name, (entry, _, _) in found.items()}


def _entry(file: Path, name: str, stated: Any) -> tuple[Entry, int, int]:
    """Returns a tensor and its bytes' begin and end after checking that type, shape and offsets agree."""
    match stated:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            numbers = [*shape, begin, end]
        case _:
            raise _damaged(file, f"tensor `{name}` lacks a type, a shape or offsets")
    if any(type(number) is not int or not 0 <= number < 1 << 63 for number in numbers):
        raise _damaged(file, f"shape or offsets of tensor `{name}` are not sizes")
    if dtype not in ITEM_BYTES:
        raise _damaged(file, f"tensor `{name}` has the unknown type `{dtype}`")
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _damaged(
            file, f"tensor `{name}` has a shape that its {end - begin} bytes do not hold"
        )
    return Entry(file=file, dtype=dtype, shape=tuple(shape)), begin, end


def _without_twins(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object of the header; a name that comes twice is an error."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"`{name}` comes twice")
        result[name] = value
    return result


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"`{file}` is not a whole safetensors file ({what}): get it again or convert the checkpoint"
    )


def _loaded(file: Path, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Returns tensors of one checked file as float32."""
    result: dict[str, NDArray[np.float32]] = {}
    try:
        with safe_open(file, framework="numpy") as tensors:
            for name in names:
                result[name] = np.asarray(tensors.get_tensor(name), np.float32)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, str(error)) from error
    for name, values in result.items():
        if not np.all(np.isfinite(values)):
            raise CheckpointError(
                f"tensor `{name}` of `{file}` holds values that are not finite: get the checkpoint again"
            )
    return result
