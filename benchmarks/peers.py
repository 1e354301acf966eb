# SPDX-License-Identifier: Apache-2.0
"""int4 checkpoints by other tools: AWQ and GPTQ of llm-compressor, in an environment of its own.

llm-compressor 0.14 requires another compressed-tensors and an older transformers than vLLM 0.32
does, so pip cannot put it into this project's environment. It goes into an overlay: a virtual
environment that holds its packages and finds everything else (torch, transformers) in ours.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import cache_folder, log

VERSION = "0.14.0.1"
# Without their dependencies: torch and the rest are ours.
PACKAGES = (
    f"llmcompressor=={VERSION}",
    "compressed-tensors==0.19.0",
    *("datasets", "multiprocess", "dill", "pyarrow", "xxhash"),
    *("pandas", "python-dateutil", "pytz", "six", "nvidia-ml-py", "loguru"),
)
RUNNER = Path(__file__).with_name("peers_runner.py")


class PeersUnavailable(RuntimeError):
    """The overlay cannot be installed or a peer failed; the text says why."""


def write_peer(method: str, model: Path, windows: Path) -> Path:
    """The checkpoint ("awq" or "gptq", groups of 64) that llm-compressor makes of ``model``.

    ``windows`` is a JSON file of calibration windows, lists of token ids. Written once per model,
    windows and recipe, then taken from the cache. Raises PeersUnavailable.
    """
    from quant_methods.checkpoint import Checkpoint

    recipe = hashlib.sha256(RUNNER.read_bytes() + windows.read_bytes())
    recipe.update(f"{VERSION} {Checkpoint(model).weights_digest}".encode())
    folder = cache_folder() / f"{method}-{recipe.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    python = _overlay()
    log.print(f"{method}: llm-compressor is calibrating, a few minutes")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _run(f"llm-compressor ({method})", [python, RUNNER, method, model, windows, partial])
    os.replace(partial, folder)
    return folder


def _overlay() -> Path:
    """The overlay's python, installed on the first call."""
    release = f"{sys.version_info[0]}.{sys.version_info[1]}"
    folder = cache_folder() / f"llmcompressor-{VERSION}-py{release}"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.is_file():
        log.print(f"installing llm-compressor {VERSION} into {folder}")
        venv.create(folder, clear=True)
        pip = (sys.executable, "-m", "pip", "--python", python)
        _run("pip install", [*pip, "install", "--quiet", "--no-deps", *PACKAGES])
        done.touch()
    # Paths from .pth files come after the overlay's own packages, which therefore win.
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "project.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def _run(what: str, command: Sequence[str | Path]) -> None:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode:
        raise PeersUnavailable(f"{what} failed: {done.stdout[-1000:]}")
