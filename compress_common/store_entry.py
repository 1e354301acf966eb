# SPDX-License-Identifier: Apache-2.0
"""One folder of the store: who owns it, whether it is intact, and how it is written."""

import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any, Final

from compress_common.space import existing
from compress_common.store_lock import BuildLock, Report

MANIFEST: Final = "manifest.json"
SCHEMA: Final = "vllm-compress/store"
VERSION: Final = 1

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM only shows loggers below its own


@dataclass(frozen=True)
class Entry:
    """The folder ``root/kind/key``, complete from the moment it exists.

    Args:
        root: Folder of the store.
        kind: What the entry is, such as ``plan``. A folder name.
        key: Hex SHA-256 of everything that the content depends on.
    """

    root: Path
    kind: str
    key: str

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.root / self.kind / self.key

    def exists(self) -> bool:
        """Whether something is there, intact or not."""
        return os.path.lexists(self.folder)

    def problem(self) -> str | None:
        """Say why the entry cannot be used, in a few words. None: every byte is as it was written.

        Reads only: no lock, no file opened for writing.
        """
        try:
            for folder in (self.root, self.root / self.kind, self.folder):
                if reason := refusal(folder):
                    return f"{folder} {reason}"
            manifest = json.loads((self.folder / MANIFEST).read_bytes())
            if manifest != self._manifest():
                return "its files are not those of its manifest"
        except FileNotFoundError as error:
            return f"{error.filename} does not exist"
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def writable(self) -> bool:
        """Whether ``locked`` would go through, as far as this can be told without writing."""
        above = self.root, self.root / self.kind
        try:
            if any(os.path.lexists(folder) and refusal(folder) for folder in above):
                return False
            return os.access(existing(above[-1]), os.W_OK | os.X_OK)  # also a read-only mount
        except OSError:
            return False

    @contextmanager
    def locked(self, waiting: Report | None = None) -> Iterator[BuildLock]:
        """Create the folders and keep other processes from building this entry meanwhile.

        Args:
            waiting: Told what the process that is waited for reports.

        Raises:
            OSError: The store cannot be written here, or it is not safe to.
        """
        for folder in (self.root, self.root / self.kind):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if reason := refusal(folder):
                raise PermissionError(f"{folder} {reason}")
        with BuildLock(self._lock, trusted()).held(waiting) as lock:
            yield lock

    @property
    def _lock(self) -> Path:
        return self.folder.with_name(f"{self.key}.lock")

    def remove(self) -> None:
        """Remove the entry and its lock file.

        Raises:
            OSError: The entry cannot be removed.
        """
        with self.locked():
            if self.exists():  # or another process has removed it meanwhile
                shutil.rmtree(self.folder)
            self._lock.unlink()

    def build(self, build: Callable[[Path], None]) -> None:
        """Replace the entry by what ``build`` writes into the empty folder it is given.

        Must be called while ``locked``. Nothing is left when ``build`` raises.
        """
        parent, prefix = self.folder.parent, f".{self.key}."
        for leftover in parent.glob(f"{prefix}*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            made = scratch / self.key
            made.mkdir(mode=0o700)
            build(made)
            manifest = made / MANIFEST
            manifest.write_text("", encoding="utf-8")
            # Libraries write files that only their owner can read; the umask decides here. A file
            # that everyone can write is never used, whatever the umask says.
            mode = stat.S_IMODE(manifest.stat().st_mode) & ~stat.S_IWOTH
            manifest.chmod(mode)
            for path in made.rglob("*"):
                if not path.is_symlink():
                    path.chmod(0o700 if path.is_dir() else mode)
            content = self._manifest(made)
            manifest.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
            if self.exists():
                os.rename(self.folder, scratch / "damaged")
            os.rename(made, self.folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _manifest(self, folder: Path | None = None) -> dict[str, Any]:
        """What the manifest of the files that are in the folder now has to be."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "kind": self.kind,
            "key": self.key,
            "files": _digests(folder or self.folder),
        }


def refusal(folder: Path) -> str | None:
    """Say why what is in a folder cannot be trusted; None: it can.

    It must be a folder, not a link to one, that belongs to this user or to root and that not
    everyone may write. Its group may: Kubernetes gives the group of a pod access to its volumes.

    Raises:
        OSError: The folder does not exist or cannot be looked at.
    """
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return "is no folder"
    if status.st_uid not in trusted():
        return f"belongs to uid {status.st_uid}"
    if status.st_mode & stat.S_IWOTH:
        return "can be written by everyone"
    return None


def trusted() -> tuple[int, int]:
    """Whose files are used: this user's, and root's."""
    return os.geteuid(), 0


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in the folder but the manifest, by relative path.

    Raises:
        ValueError: Something in it is neither a file nor a folder, or is not this user's.
    """
    digests = {}
    for path in sorted(folder.rglob("*")):
        name, status = path.relative_to(folder).as_posix(), path.lstat()
        if stat.S_ISDIR(status.st_mode):
            if reason := refusal(path):
                raise ValueError(f"{name} {reason}")
            continue
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{name} is no regular file")
        if status.st_uid not in trusted() or status.st_mode & stat.S_IWOTH:
            raise ValueError(f"{name} can be written by others")
        if name != MANIFEST:
            with path.open("rb") as file:
                digests[name] = file_digest(file, "sha256").hexdigest()
    return digests
