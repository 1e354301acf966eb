# SPDX-License-Identifier: Apache-2.0
"""The folder for files that the project can build again, such as plans and compiled kernels."""

import os
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache folder. It may not exist yet.

    The folder is ``$VLLM_COMPRESS_CACHE`` if set, else ``vllm-compress`` under ``$XDG_CACHE_HOME``,
    else under ``~/.cache``. Where a user has no home, it is ``temp_dir()``. Its content may be
    deleted at any time while no server is starting.
    """
    try:
        if own := os.environ.get("VLLM_COMPRESS_CACHE"):
            return Path(own).expanduser().absolute()
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(base).expanduser().absolute() / "vllm-compress"
    except (RuntimeError, OSError):  # no HOME and no passwd entry, or no working directory
        return temp_dir()


def temp_dir() -> Path:
    """Return the folder of this user under the system's temporary folder. It may not exist yet.

    Anyone can create a folder of this name first. ``Store`` checks its owner; other callers must.
    """
    try:
        base = tempfile.gettempdir()
    except OSError:  # no temporary folder can be written
        base = "/tmp"
    return Path(base).absolute() / f"vllm-compress-{os.geteuid()}"
