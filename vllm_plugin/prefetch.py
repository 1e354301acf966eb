# SPDX-License-Identifier: Apache-2.0
"""Fetch the model of a ``serve.yaml`` into the cache: ``python3 -m vllm_plugin.prefetch FILE``.

An init container runs this, so that a server with an accelerator does not wait for a download. It
ends with status 1 and one line if the model cannot be had, or cannot be read.
"""

import os
import re
import stat
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

import yaml

from compress_common.checkpoints.checkpoint import resolve
from compress_common.errors import CompressError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")  # gpt2 has no owner


def prefetch(file: Path) -> Path | None:
    """Fetch the model that the flags of ``vllm serve`` in a file name.

    Args:
        file: YAML with the flags, without their dashes.

    Returns:
        The model's folder. None if the model is a file, a bucket or a GGUF file of a repository:
        vLLM fetches those itself.

    Raises:
        CompressError: The file names no model, or there is no such model, or this user cannot read
            it.
    """
    try:
        flags = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise CompressError(f"{file}: {str(error).splitlines()[0]}") from error
    if not isinstance(flags, dict) or not isinstance(flags.get("model"), str):
        raise CompressError(f"{file} has no `model`; add a folder or a hub id")
    flags = {name.replace("_", "-"): value for name, value in flags.items()}
    model = flags["model"]
    user = os.getuid()
    try:
        is_path = model.startswith(("/", "."))
        if Path(model).is_file() or not (
            is_path or Path(model).is_dir() or _HUB_ID.fullmatch(model)
        ):
            return None
        folder = resolve(model, flags.get("revision"), flags.get("download-dir"))
        closed = unreadable(folder, user, {os.getgid(), *os.getgroups()})
    except OSError as error:  # a folder above it is closed
        raise CompressError(f"{model}: user {user} cannot read it: {error.strerror}") from error
    if closed:
        raise CompressError(
            f"{folder}: user {user} cannot read {len(closed)} files or folders, such as "
            f"{closed[0].name}; as their owner run: chmod -R a+rX {folder}"
        )
    return folder


def unreadable(folder: Path, user: int, groups: Iterable[int]) -> list[Path]:
    """List what a user's mode bits do not let it read in a folder; nothing for root.

    Args:
        folder: Named alone if it is closed itself. The same holds for folders in it.
        user: Id of the user.
        groups: Ids of the user's groups.

    Returns:
        Files and folders, and links that lead nowhere.
    """
    groups = set(groups)
    if not user:
        return []
    if not _is_open(folder, user, groups):
        return [folder]
    closed = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            closed += unreadable(path, user, groups)
        elif not _is_open(path, user, groups):
            closed.append(path)
    return closed


def _is_open(path: Path, user: int, groups: Collection[int]) -> bool:
    """Whether a user can read a file, or list and enter a folder, by its mode bits."""
    try:
        status = path.stat()
    except OSError:
        return False
    wanted = 0o5 if stat.S_ISDIR(status.st_mode) else 0o4
    shift = 6 if status.st_uid == user else 3 if status.st_gid in groups else 0
    return status.st_mode >> shift & wanted == wanted


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python3 -m vllm_plugin.prefetch SERVE_YAML")
    try:
        print(f"prefetch: {prefetch(Path(sys.argv[1])) or 'left to vLLM'}")
    except CompressError as error:
        sys.exit(f"prefetch: {error}")
