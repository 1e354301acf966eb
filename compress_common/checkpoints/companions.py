# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint has beside its weights: the tokenizer, templates, and the licence.

A Sentence Transformers model has folders too. They say how vectors are pooled and projected, and
vLLM reads them. Without them it would pool in another way, and only log that.
"""

import json
import shutil
from pathlib import Path, PurePosixPath

from compress_common.errors import CompressError

_FILE = "modules.json"
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README*")
_COPIED_MODULES = ("*.json", "*.safetensors", "*.txt")
_PICKLED = ("*.bin", "*.pt")


def module_folders(folder: Path) -> list[str]:
    """Return the folders that a model names in modules.json, without those that it lacks.

    Args:
        folder: Of the model.

    Raises:
        CompressError: modules.json is damaged or names a folder outside, or a folder has weights
            that are pickled.
    """
    file = folder / _FILE
    if not file.is_file():
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        modules = content["modules"] if isinstance(content, dict) else content
        paths = sorted({str(module.get("path") or "") for module in modules} - {"", "."})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CompressError(f"{file} is damaged ({error}); fetch the model again") from error
    for path in paths:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise CompressError(f"{file} names the folder {path!r} outside the model; correct it")
        pickled = [name for pattern in _PICKLED for name in (folder / path).glob(pattern)]
        if pickled and not any((folder / path).glob("*.safetensors")):
            raise CompressError(
                f"{pickled[0]} is pickled, and is neither read nor copied; convert it to "
                "model.safetensors"
            )
    return [path for path in paths if (folder / path).is_dir()]


def copy_companions(source: Path, target: Path) -> None:
    """Copy what lies beside the weights, the folders of ``module_folders`` included.

    The index of the weights is not copied, nor is anything pickled.

    Args:
        source: Folder of the model.
        target: Folder of the new checkpoint.
    """
    for pattern in _COPIED:
        for file in source.glob(pattern):
            # params.json is Mistral's own config, for weight files that are not copied.
            if not file.name.endswith((".index.json", "params.json")):
                shutil.copyfile(file, target / file.name)
    for path in module_folders(source):
        (target / path).mkdir(parents=True, exist_ok=True)
        for pattern in _COPIED_MODULES:
            for file in (source / path).glob(pattern):
                shutil.copyfile(file, target / path / file.name)
