# SPDX-License-Identifier: Apache-2.0
"""A content-addressed store of what is slow to build: plans, compiled kernels, the demo model."""

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

from compress_common.cache import cache_dir, temp_dir
from compress_common.errors import CompressError, LimitError
from compress_common.store_entry import Entry, trusted
from compress_common.store_lock import BuildLock, Report

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM only shows loggers below its own


def digest(*parts: bytes | memoryview | str) -> str:
    """Return a key: the hex SHA-256 of the parts. Different parts give different keys."""
    total = sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        total.update(
            memoryview(content).nbytes.to_bytes(8, "big")
        )  # or ("ab", "c") would equal ("a", "bc")
        total.update(content)
    return total.hexdigest()


class Store:
    """Entries are folders at ``root/kind/key``, complete and checked by digest whenever found.

    Folders are private to the user (0700). Files are as readable as the umask says. An entry is
    used only when it and the folders above it up to the root belong to this user or to root, are
    not writable by everyone, and every file has the SHA-256 of the manifest.

    Args:
        root: Folder of the store; None: ``cache_dir()``. Need not exist. May be read-only.
    """

    def __init__(self, root: Path | None = None) -> None:
        root = cache_dir() if root is None else root
        # A user may link the root to another disk. Other links are not followed.
        if os.path.islink(root) and root.lstat().st_uid in trusted():
            root = root.resolve()
        self.root = root
        self._building: list[BuildLock] = []

    def find(self, kind: str, key: str) -> Path | None:
        """Return the folder of an intact entry, or None. Writes nothing and takes no lock.

        Args:
            kind: What the entry is, such as ``plan``: lower-case letters, digits, hyphens.
            key: Hex SHA-256 of everything that the content depends on; see ``digest``.
        """
        for entry in self._entries(kind, key):
            if entry.problem() is None:
                return entry.folder
        return None

    def place(self, kind: str) -> Path:
        """Return the folder below which ``make`` would build an entry. Writes nothing.

        Args:
            kind: As in ``find``.
        """
        for root in (self.root, temp_dir()):
            if Entry(root, kind, "").writable():
                return root
        return temp_dir().parent  # a folder of this process is created there

    def make(
        self,
        kind: str,
        key: str,
        build: Callable[[Path], None],
        waiting: Report | None = None,
    ) -> Path:
        """Return the folder of the entry, building it first when it is absent or damaged.

        Processes that ask at once wait for the first. If its build fails, they fail with its
        reason. If it is killed, or meets a limit of its own, the next one builds. Where the root
        cannot be written, the entry is built in a private temporary folder, and a log line says so.

        Args:
            kind: As in ``find``.
            key: As in ``find``.
            build: Writes files into the empty folder that it is given. Nothing stays if it raises.
            waiting: Told what the process that builds gives to ``report``.

        Raises:
            CompressError: No folder can be written, or the process that was waited for failed.
        """
        if found := self.find(kind, key):
            return found
        problems: list[str] = []
        for entry in self._places(kind, key):
            with ExitStack() as stack:
                try:
                    lock = stack.enter_context(entry.locked(waiting))
                except OSError as error:
                    text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
                    problems.append(text)
                    continue
                if (problem := entry.problem()) is None:  # another process has built it
                    return entry.folder
                if lock.failure is not None:
                    raise CompressError(lock.failure)
                if problems:
                    text = "the cache cannot be used (%s); the %s is built in %s; set %s"
                    advice = "VLLM_COMPRESS_CACHE to a folder that only this user can write"
                    logger.warning(text, "; ".join(problems), kind, entry.folder, advice)
                if entry.exists():
                    text = "the stored %s cannot be used (%s); building it again"
                    logger.warning(text, kind, problem)
                self._build(entry, build, lock)
                return entry.folder
        raise CompressError(
            f"no folder for the {kind}: {'; '.join(problems)}; set VLLM_COMPRESS_CACHE to a folder "
            "that only this user can write"
        )

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Give an error of the disk within the block its remedy.

        Args:
            what: What is written, as "the plan".

        Raises:
            CompressError: Of an OSError.
        """
        try:
            yield
        except OSError as error:
            raise CompressError(
                f"cannot write {what} to {self.root}: {error.strerror or error}; set "
                "VLLM_COMPRESS_CACHE to a writable folder with free space"
            ) from error

    def report(self, step: str, done: int, total: int) -> None:
        """Tell the processes that wait for a build of this store how far it is. A ``Report``."""
        for lock in self._building:
            lock.report(step, done, total)

    def _build(self, entry: Entry, build: Callable[[Path], None], lock: BuildLock) -> None:
        """Build an entry, and leave the reason of a failure for the processes that wait."""
        self._building.append(lock)
        lock.start()
        try:
            entry.build(build)
        except LimitError:  # of this process: the next one builds, within limits of its own
            lock.clear()
            raise
        except Exception as error:  # not an interruption, after which another process builds
            lock.fail(str(error) or type(error).__name__)
            raise
        else:
            lock.clear()
        finally:
            self._building.pop()

    def remove(self, kind: str, key: str) -> None:
        """Remove an entry wherever this user may. One that cannot be removed stays.

        Args:
            kind: As in ``find``.
            key: As in ``find``.
        """
        for entry in self._entries(kind, key):
            if entry.exists():
                with suppress(OSError):
                    entry.remove()

    def _entries(self, kind: str, key: str) -> list[Entry]:
        """Where an entry may be, best place first."""
        if not re.fullmatch(r"[a-z][a-z0-9-]*", kind) or not re.fullmatch(r"[0-9a-f]{64}", key):
            raise ValueError(f"not a kind and a hex SHA-256: {kind!r}, {key!r}")
        roots = dict.fromkeys((self.root, temp_dir()))
        return [Entry(root, kind, key) for root in roots]

    def _places(self, kind: str, key: str) -> Iterator[Entry]:
        """Where an entry may be built, best place first."""
        yield from self._entries(kind, key)
        try:  # another user has taken the name in the temporary folder
            yield Entry(Path(_session_folder().name), kind, key)
        except OSError:
            return


@cache
def _session_folder() -> tempfile.TemporaryDirectory:
    """A private folder that is removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="vllm-compress-")
