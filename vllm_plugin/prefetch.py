# SPDX-License-Identifier: Apache-2.0
"""Fetch the model of a ``serve.yaml`` into the cache: ``python3 -m vllm_plugin.prefetch FILE``.

An init container runs this, so that a server with an accelerator does not wait for a download. It
ends with status 1 and one line if the model cannot be had, or cannot be read.
"""

import os
import re
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

from compress_common.errors import CompressError
from quant_methods.checkpoint import resolve

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def prefetch(file: Path) -> Path | None:
    """Fetch the model that the flags of ``vllm serve`` in a file name.

    Args:
        file: YAML with the flags, without their dashes.

    Returns:
        The model's folder. None if the model is neither a folder nor the id of a repository, but a
        bucket or a GGUF file of a repository: vLLM fetches those itself.

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
    if not Path(model).is_dir() and not _HUB_ID.fullmatch(model):
        return None
    folder = resolve(model, flags.get("revision"), flags.get("download-dir"))
    user = os.getuid()
    if closed := unreadable(folder, user, {os.getgid(), *os.getgroups()}):
        raise CompressError(
            f"{folder}: user {user} cannot read {len(closed)} files, such as {closed[0].name}; "
            f"as their owner run: chmod -R a+rX {folder}"
        )
    return folder


def unreadable(folder: Path, user: int, groups: Iterable[int]) -> list[Path]:
    """List files of a folder that a user's mode bits do not let it read; none for root."""
    groups = set(groups)
    closed = []
    for file in sorted(folder.rglob("*")) if user else ():
        status = file.stat()
        own = status.st_uid == user
        shared = status.st_gid in groups
        bit = stat.S_IRUSR if own else stat.S_IRGRP if shared else stat.S_IROTH
        if not status.st_mode & bit:
            closed.append(file)
    return closed


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python3 -m vllm_plugin.prefetch SERVE_YAML")
    try:
        print(f"prefetch: {prefetch(Path(sys.argv[1])) or 'left to vLLM'}")
    except CompressError as error:
        sys.exit(f"prefetch: {error}")
