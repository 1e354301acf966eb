# SPDX-License-Identifier: Apache-2.0
"""Refuse work that does not fit the disk before it begins."""

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from compress_common.errors import joined


@dataclass(frozen=True)
class Need:
    """Space that some files will take.

    Attributes:
        folder: Where they go. It may not exist yet.
        size: Bytes.
        what: What they are, such as ``the checkpoint``.
        change: What the user sets to choose another folder, such as ``--out``.
    """

    folder: Path
    size: float
    what: str
    change: str


def check_space(needs: Iterable[Need]) -> None:
    """Raise CompressError when a file system has less free space than is needed on it.

    Nothing is refused where the free space cannot be known: the folder cannot be looked at, or the
    file system says that it has no size.

    Args:
        needs: Those on one file system are added up.
    """
    disks: dict[int, list[Need]] = {}
    for need in needs:
        if need.size > 0:
            with suppress(OSError):
                disks.setdefault(os.stat(existing(need.folder)).st_dev, []).append(need)
    problems = []
    for here in disks.values():
        free = _free(here[0].folder)
        total = sum(need.size for need in here)
        if free is not None and total > free:
            parts = " and ".join(
                f"{_shown(need.size)} for {need.what} in {need.folder} ({need.change})"
                for need in here
            )
            problems.append(
                f"not enough disk space: {_shown(free)} free, about {parts} needed; free space or "
                f"change {' or '.join(dict.fromkeys(need.change for need in here))} to a folder on "
                "a disk with more"
            )
    if problems:
        raise joined(problems)


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists.

    Raises:
        OSError: This cannot be told, because a folder above it cannot be entered.
    """
    folder = folder.absolute()
    while folder != folder.parent:
        try:
            os.stat(folder)
            break
        except (FileNotFoundError, NotADirectoryError):
            folder = folder.parent
    return folder


def _free(folder: Path) -> int | None:
    """Return the free bytes where a folder is or would be. None: they are not known."""
    try:
        usage = shutil.disk_usage(existing(folder))
    except OSError:
        return None
    return usage.free if usage.total else None  # some FUSE file systems report zeros only


def _shown(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
