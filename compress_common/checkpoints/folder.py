# SPDX-License-Identifier: Apache-2.0
"""A model folder by its file names and its config. Imports nothing large.

Commands refuse here what is no checkpoint, before they import torch.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from compress_common.errors import CompressError

CONFIG: Final = "config.json"
INDEX: Final = "model.safetensors.index.json"
# Mistral's own copy of the weights, which its repositories publish beside the Hugging Face files.
MISTRAL_FILES: Final = "consolidated"


def check_model(model: str) -> None:
    """Refuse a folder that is no checkpoint in safetensors. A hub id passes.

    Args:
        model: A folder or a hub id.

    Raises:
        CompressError: There is no such folder, or it lacks config.json or weights.
    """
    if (folder := given_folder(model)) is not None:
        read_config(folder)
        weight_files(folder)


def given_folder(model: str) -> Path | None:
    """Return the folder that a user named; None: it is a hub id.

    Args:
        model: A folder or a hub id.

    Raises:
        CompressError: It is a path, and no folder is there.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise CompressError(f"model folder {model} does not exist; give a folder or a hub id")
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json.

    Raises:
        CompressError: It is missing, or no JSON object.
    """
    file = folder / CONFIG
    content = _read_json(file, f"{folder} has no {CONFIG}: not a model folder")
    if not isinstance(content, dict):
        raise CompressError(f"{file} is not a JSON object; fetch the checkpoint again")
    return content


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files, as ``transformers`` and vLLM's ``hf`` format choose them.

    Raises:
        CompressError: Some are missing, or they are pickled.
    """
    index = folder / INDEX
    if index.is_file():
        content = _read_json(index, f"{folder} has no {INDEX}")
        try:
            names = set(content["weight_map"].values())
        except (KeyError, TypeError, AttributeError) as error:
            raise CompressError(
                f"{index} has no 'weight_map'; fetch the checkpoint again"
            ) from error
        if missing := sorted(n for n in names if not (folder / n).is_file()):
            raise CompressError(
                f"{folder} lacks {len(missing)} of {len(names)} weight files, "
                f"{missing[0]} for one; fetch the checkpoint again"
            )
        return sorted(folder / name for name in names)
    if files := hugging_face_files(folder.glob("*.safetensors")):
        return files
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
    hint = "; pickled weights are not read: convert them to safetensors" if pickled else ""
    raise CompressError(f"{folder} has no *.safetensors files{hint}")


def hugging_face_files(files: Iterable[Path]) -> list[Path]:
    """Drop Mistral's copy of the weights where the Hugging Face files lie beside it."""
    files = sorted(files)
    kept = [file for file in files if not file.name.startswith(MISTRAL_FILES)]
    return kept or files


def _read_json(file: Path, missing: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CompressError(missing) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CompressError(f"{file} is not JSON: {error}") from error
