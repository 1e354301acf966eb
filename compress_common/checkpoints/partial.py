# SPDX-License-Identifier: Apache-2.0
"""The folder of a checkpoint while it is written. The target is complete or absent."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compress_common.errors import CompressError

_LOCK, _STATE = ".lock", "state.json"


class Partial:
    """``.<target>.partial`` beside the target, which gets the target's name when it is complete.

    An interrupted run leaves the folder, and the next one with the same identity goes on there. A
    run that fails leaves it only where it holds finished shards.

    Attributes:
        target: Folder of the checkpoint.
        folder: Where it is written.

    Args:
        target: Folder that must not exist yet.

    Raises:
        CompressError: It exists, or the folder above it cannot be looked at.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.parent / f".{target.name}.partial"
        with self._explained():
            self._check_absent()

    @property
    def written(self) -> int:
        """Bytes of the finished shards."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Make and lock the folder. At the end it becomes the target.

        Raises:
            CompressError: Another process writes it, it cannot be written, or the target is there.
        """
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / _LOCK, timeout=0), self._kept_if_useful():
                self._check_absent()  # another process may have finished it
                yield
                (self.folder / _STATE).unlink(missing_ok=True)
                self.folder.rename(self.target)  # while it is locked: nobody else may begin in it
            (self.target / _LOCK).unlink(missing_ok=True)

    def start_or_resume(self, identity: dict[str, Any]) -> None:
        """Keep what an earlier run of the same identity finished. Remove all else.

        Args:
            identity: All that the contents depend on. JSON-able.
        """
        state, now = self.folder / _STATE, json.dumps(identity)
        same = state.is_file() and state.read_text(encoding="utf-8") == now
        for path in self.folder.iterdir():
            if path.name in (_LOCK, _STATE) or (same and path.suffix == ".safetensors"):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not same:
            state.write_text(now, encoding="utf-8")

    def _check_absent(self) -> None:
        if self.target.exists():
            raise CompressError(f"{self.target} exists; give another folder or remove it")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise CompressError where the lock is taken or the disk refuses."""
        try:
            yield
        except Timeout as error:
            raise CompressError(f"another process is writing {self.target} right now") from error
        except OSError as error:
            raise CompressError(
                f"cannot write {self.folder}: {error.strerror or error}; free space or give a "
                "writable --out, then run the same command again to go on"
            ) from error

    @contextmanager
    def _kept_if_useful(self) -> Iterator[None]:
        """Remove the folder after a failure, unless it holds finished shards."""
        try:
            yield
        except Exception:  # not an interruption, after which the same command goes on
            if not any(self.folder.glob("*.safetensors")):
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
