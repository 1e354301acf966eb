# SPDX-License-Identifier: Apache-2.0
"""Where the project keeps what it can build again: the converted demo model, smoothed weights."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache folder; it need not exist yet.

    ``$VLLM_COMPRESS_CACHE`` if set, else ``vllm-compress`` under ``$XDG_CACHE_HOME``, else under
    ``~/.cache``. Everything in it may be deleted at any time while no server is starting.
    """
    if own := os.environ.get("VLLM_COMPRESS_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "vllm-compress"
