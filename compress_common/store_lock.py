# SPDX-License-Identifier: Apache-2.0
"""The lock file of an entry. Its holder writes into it how far the build is, or why it failed."""

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self
from uuid import uuid4

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM only shows loggers below its own

Report = Callable[[str, int, int], None]  # the step, how much of it is done, and its total
_POLL: Final = 0.2  # seconds between looks at a lock that another process holds
_LOG: Final = 30.0  # seconds between log lines of a process that waits
_WRITE: Final = 0.5  # least seconds between two writes of progress
_LONGEST: Final = 4000  # characters of a reason


class BuildLock:
    """An exclusive lock between processes that is released when its holder ends, however it does.

    Args:
        path: Of the lock file, whose folder exists.
        trusted: Whose lock files are used: user ids.
    """

    def __init__(self, path: Path, trusted: tuple[int, ...]) -> None:
        self.path = path
        self.trusted = trusted
        self.failure: str | None = None  # of the process that was waited for
        self._file = -1
        self._attempt = ""
        self._written = 0.0

    @contextmanager
    def held(self, waiting: Report | None = None) -> Iterator[Self]:
        """Hold the lock for as long as the context lasts, after a wait if need be.

        Args:
            waiting: Told what the process that is waited for reports.

        Raises:
            OSError: The file cannot be opened, or belongs to another user.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        while True:
            self._file = os.open(self.path, flags, 0o600)
            try:
                # A network share may give every new file to another user, such as nobody.
                if (owner := os.fstat(self._file).st_uid) not in self.trusted:
                    raise PermissionError(f"files in {self.path.parent} belong to uid {owner}")
                self._acquire(waiting)
                if not self._is_current():
                    continue
                yield self
                return
            finally:
                os.close(self._file)  # also unlocks

    def start(self) -> None:
        """Begin an attempt: what an earlier one wrote is gone."""
        self._attempt, self._written = uuid4().hex, 0.0
        self._write({})

    def report(self, step: str, done: int, total: int) -> None:
        """Tell processes that wait how far this one is."""
        if time.monotonic() - self._written >= _WRITE:
            self._written = time.monotonic()
            self._write({"progress": [step, done, total]})

    def fail(self, reason: str) -> None:
        """Tell processes that wait why this one failed."""
        self._write({"failed": reason[:_LONGEST]})

    def clear(self) -> None:
        """Leave an empty file."""
        os.ftruncate(self._file, 0)

    def _acquire(self, waiting: Report | None) -> None:
        """Wait for the lock. ``failure`` is set if the holder failed meanwhile."""
        seen: set[str] = set()  # attempts that were under way while this process waited
        logged = -_LOG
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                state = self._read()
                if "failed" not in state:
                    seen.add(state.get("attempt", ""))
                progress = state.get("progress")
                if time.monotonic() - logged >= _LOG:
                    logged = time.monotonic()
                    so_far = " ({}, {} of {})".format(*progress) if progress else ""
                    what = self.path.with_suffix("")
                    logger.info("waiting for another process that builds %s%s", what, so_far)
                if waiting and progress:
                    waiting(f"another process: {progress[0]}", progress[1], progress[2])
                time.sleep(_POLL)
                continue
            state = self._read()
            self.failure = state.get("failed") if state.get("attempt") in seen else None
            return

    def _is_current(self) -> bool:
        """Whether the open file still is the lock file: another process may have removed it."""
        try:
            return os.path.samestat(os.fstat(self._file), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _write(self, content: dict[str, Any]) -> None:
        text = json.dumps(content | {"attempt": self._attempt}).encode()
        try:
            os.ftruncate(self._file, len(text))
            os.pwrite(self._file, text, 0)
        except OSError as error:  # no space left: nobody is told, and nothing else is lost
            logger.debug("%s cannot be written: %s", self.path, error)

    def _read(self) -> dict[str, Any]:
        """Return what the last holder wrote. Half-written text counts as none."""
        try:
            state = json.loads(os.pread(self._file, 1 << 16, 0))
        except ValueError:
            return {}
        return state if isinstance(state, dict) else {}
