"""Where a model's files are: a local folder, or a snapshot from the Hugging Face hub.

Only data is ever fetched or read: safetensors, JSON, templates and tokenizer models. Pickles (``*.bin``, ``*.pt``) and
code (``*.py``) can run what a stranger wrote, so they are left where they are.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from weft_backend.errors import StartupError

INDEX_NAME = "model.safetensors.index.json"
_DATA_PATTERNS = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
# Folders hold other formats (onnx/, original/); consolidated files hold the same weights once more (Mistral).
_IGNORED_PATTERNS = ["*/*", "consolidated*"]


class CheckpointError(StartupError):
    """A checkpoint's files are missing, damaged, or not what its config.json says; the text names file and tensor."""


def resolve_checkpoint(
    model: str, *, revision: str | None = None, download_dir: str | None = None, weights: bool = True
) -> Path:
    """The folder of ``model``: a path, or a hub id whose snapshot is downloaded unless it is cached.

    ``download_dir`` is the cache to use instead of the hub library's own. Without ``weights`` a hub model's
    safetensors are not downloaded. Raises CheckpointError.
    """
    path = Path(model).expanduser()
    if not path.exists():
        path = _download(model, revision, download_dir, weights)
    elif revision is not None:
        raise CheckpointError(f"--revision {revision}: {model} is a local folder, which has no revisions")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json; a model is a folder in Hugging Face format, or a hub id")
    return path


def _download(model: str, revision: str | None, download_dir: str | None, weights: bool) -> Path:
    patterns = [*_DATA_PATTERNS, "*.safetensors"] if weights else _DATA_PATTERNS
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=patterns,
                ignore_patterns=_IGNORED_PATTERNS,
            )
        )
    except HFValidationError as error:
        raise CheckpointError(f"{model}: no such folder, and not a hub id either") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"{model}: no such folder, and the hub cannot be reached to download it") from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{model}: no such folder, and the hub does not give it: {reason}") from error


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of the checkpoint in the folder ``path``. Raises CheckpointError if one is missing."""
    if (path / INDEX_NAME).is_file():
        names = _indexed_files(path / INDEX_NAME)
    else:
        names = sorted(file.name for file in path.glob("*.safetensors") if not file.name.startswith("consolidated"))
    if not names:
        raise CheckpointError(f"{path} has no *.safetensors file; other formats are not read, for they can hold code")
    for name in names:
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing, but {INDEX_NAME} lists it")
    return [path / name for name in names]


def _indexed_files(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weight files") from error
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError(f"{index} lists a file outside of its folder")
    return names


def model_hash(path: Path) -> str:
    """SHA-256, in hex, over config.json and the names and sizes of the weight files, if there are any."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        digest.update(f"\0{file.name}\0{file.stat().st_size}".encode())
    return digest.hexdigest()
