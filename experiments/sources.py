"""Where the files of a known data set are: a folder given, a folder named by the environment, or the hub."""

import dataclasses
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from codesign.errors import DataError

DATA_VARIABLE = "CODESIGN_DATA"
"""Environment variable: the folder that holds one folder per task."""
MAX_DEFLATE_RATIO = 1032
"""No deflate stream expands by more (zlib technical details, "Maximum Compression Factor")."""


@dataclasses.dataclass(frozen=True)
class HubSource:
    """A data set on the Hugging Face hub.

    Attributes:
      repository: Its name.
      splits: The splits to read, in this order.
      revision: Branch or tag.
    """

    repository: str
    splits: tuple[str, ...]
    revision: str = "main"


HUB = {
    # Training phrases as well as sentences (67,349); the test part's labels are withheld.
    "sst2": HubSource("stanfordnlp/sst2", ("train", "validation")),
    "mnist": HubSource("ylecun/mnist", ("train", "test")),
    # One row of text per split, consecutive parts of one file; the converted branch needs no script of the repository.
    "tinyshakespeare": HubSource(
        "karpathy/tiny_shakespeare", ("train", "validation", "test"), "refs/convert/parquet"
    ),
}


def folder_of(task: str, given: Path | None) -> Path | None:
    """Returns the folder with a task's files: `given`, else `$CODESIGN_DATA/<task>` if it exists; None: use the hub.

    Raises:
      DataError: If the folder given does not exist.
    """
    if given is not None:
        if not given.is_dir():
            what = "is a file" if given.exists() else "does not exist"
            raise DataError(f"data `{given}` of task `{task}` {what}: give the task's folder")
        return given
    root = os.environ.get(DATA_VARIABLE)
    folder = Path(root) / task if root else None
    return folder if folder is not None and folder.is_dir() else None


def required(path: Path, task: str) -> Path:
    """Returns the path of a file that a task cannot do without.

    Raises:
      DataError: If there is no such file.
    """
    if not path.is_file():
        raise DataError(
            f"`{path.name}` of task `{task}` is not in `{path.parent}`: "
            "give the folder that holds the task's files with `--data`"
        )
    return path


def hub_splits(task: str) -> list[Any]:
    """Returns the splits that `HUB` names for a task, downloaded or from the hub's own cache.

    Raises:
      DataError: If the task is not on the hub, the extra `[hub]` is missing, or the download fails.
    """
    ways = (
        f"give its folder with `--data`, or set {DATA_VARIABLE} to the folder that holds `{task}/`"
    )
    if task not in HUB:
        raise DataError(f"the data of task `{task}` is not here and not on the hub: {ways}")
    source = HUB[task]
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"the data of task `{task}` is not here: {ways}, or `pip install 'codesign[hub]'` "
            f"to download `{source.repository}`"
        ) from error
    try:
        return [
            datasets.load_dataset(source.repository, revision=source.revision, split=split)
            for split in source.splits
        ]
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"`{source.repository}` could not be read from the hub ({type(error).__name__}: {error}): "
            f"try again, or {ways}"
        ) from error


def read_arrays(path: Path, *names: str) -> list[NDArray[Any]]:
    """Returns numeric arrays of an `.npz` file; what they will take is checked against the file's size first.

    Raises:
      DataError: If the file is damaged, lacks an array, holds objects, or states a size that it cannot hold.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            for name in names:
                if f"{name}.npy" not in members:
                    present = ", ".join(sorted(Path(member).stem for member in members)) or "none"
                    raise DataError(
                        f"`{path}` holds no array `{name}` (it has {present}): rename or add it"
                    )
                with archive.open(members[f"{name}.npy"]) as stream:
                    stated = _stated_bytes(stream, name, path)
                info = members[f"{name}.npy"]
                if stated > min(info.file_size, MAX_DEFLATE_RATIO * info.compress_size):
                    raise DataError(
                        f"array `{name}` of `{path}` states {stated} bytes, more than the file holds: "
                        "get the file again"
                    )
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"`{path}` is not a readable npz file ({error}): get it again") from error


def _stated_bytes(stream: Any, name: str, path: Path) -> int:
    """Returns the size of the array that a `.npy` header describes."""
    file: BinaryIO = stream
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read(file)
    if dtype.kind not in "biuf":
        raise DataError(
            f"array `{name}` of `{path}` holds {dtype}, not numbers: save it as integers"
        )
    return math.prod(shape) * dtype.itemsize
