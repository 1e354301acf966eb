# SPDX-License-Identifier: Apache-2.0
"""Models that are on this machine already. Nothing here downloads.

``transformers`` takes seconds to import. It is imported where something is read with it.
"""

from pathlib import Path
from typing import Any

from compress_common.errors import CompressError
from compress_common.structure.wrapper import language_config

# What ``transformers`` raises for a config.json that does not suit its model type, beside an error
# of huggingface_hub.
_UNREADABLE = (AttributeError, KeyError, OSError, TypeError, ValueError)


def local_folder(
    model: str, revision: str | None = None, download_dir: str | None = None
) -> Path | None:
    """Return the folder of a model; None if it is not on this machine."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            model, revision=revision, cache_dir=download_dir, local_files_only=True
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return Path(found)


def text_config(folder: Path) -> Any:
    """Return the language model's config; CompressError when ``transformers`` cannot read it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return language_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except (*_UNREADABLE, StrictDataclassError) as error:
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        raise CompressError(f"transformers cannot read {folder}: {reason}") from error


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder; CompressError when ``transformers`` cannot load it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        reason = str(error).strip().splitlines()[0]
        raise CompressError(
            f"transformers cannot load the tokenizer of {folder}: {reason}"
        ) from error
    # Without its files transformers makes one that knows special tokens alone.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise CompressError(
            f"{folder} has no tokenizer that knows any text; fetch tokenizer.json of the model too"
        )
    return tokenizer


def load_processor(folder: Path) -> Any:
    """Return the processor of images and text; CompressError when a folder has none."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # damaged files raise many types, a missing package ImportError
        reason = str(error).strip().splitlines()[0]
        raise CompressError(
            f"transformers cannot load the processor of {folder}: {reason}"
        ) from error
    # Without its files transformers returns the tokenizer.
    if getattr(processor, "image_processor", None) is None:
        raise CompressError(
            f"{folder} has no processor of images; fetch preprocessor_config.json and "
            "processor_config.json of the model too"
        )
    return processor
