# SPDX-License-Identifier: Apache-2.0
"""int4 checkpoints by other tools: llm-compressor's AWQ and GPTQ, and AutoRound.

llm-compressor 0.14 requires another compressed-tensors and an older transformers than vLLM 0.32
does, so pip cannot put it into this project's environment. The tools go into an overlay: a virtual
environment that holds their packages and finds everything else (torch, transformers) in ours.
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

# Without their dependencies: torch and the rest are ours.
PACKAGES = (
    "llmcompressor==0.14.0.1",
    "compressed-tensors==0.19.0",
    "auto-round==0.16.1",
    "py-cpuinfo==9.0.0",
    *("datasets", "multiprocess", "dill", "pyarrow", "xxhash"),
    *("pandas", "python-dateutil", "pytz", "six", "nvidia-ml-py", "loguru"),
)
RUNNER = Path(__file__).with_name("peers_runner.py")


class PeersUnavailable(RuntimeError):
    """The overlay cannot be installed or a peer failed; the text says why."""


def peer_identity() -> str:
    """SHA-256 of what decides a peer's weights besides the model and the calibration windows."""
    return hashlib.sha256(RUNNER.read_bytes() + repr(PACKAGES).encode()).hexdigest()


def write_peer(method: str, model: Path, windows: Path) -> Path:
    """The checkpoint (groups of 64) that another tool makes of ``model``.

    Written once per model, windows and recipe, then taken from the cache.

    Args:
        method: "awq", "gptq", "autoround" or "autoround_light".
        model: Folder of a 16-bit checkpoint.
        windows: JSON file of calibration windows, lists of token ids.

    Raises:
        PeersUnavailable: The tool cannot be installed, or it failed.
    """
    from compress_common.checkpoints.checkpoint import Checkpoint

    recipe = hashlib.sha256(windows.read_bytes())
    recipe.update(f"{peer_identity()} {Checkpoint(model).weights_digest} {_dtype(model)}".encode())
    folder = cache_folder() / f"{method}-{recipe.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    run_peer(method, model, windows, partial)
    os.replace(partial, folder)
    return folder


def run_peer(method: str, model: Path, windows: Path, out: Path) -> None:
    """Write a peer's checkpoint into a new folder, with ``cost.json``: see ``write_peer``."""
    python, dtype = _overlay(), _dtype(model)
    log.print(f"{method}: calibrating, minutes to hours")
    _run(method, [python, RUNNER, method, model, windows, out, dtype])


def _dtype(model: Path) -> str:
    """What a peer calibrates in: float32 where bfloat16 is slow, as ours does."""
    from compress_common.calibration.precision import computed_in
    from compress_common.checkpoints.checkpoint import Checkpoint

    dtype = computed_in(Checkpoint(model).weight_bytes, "cpu")
    return str(dtype or "bfloat16").removeprefix("torch.")


def _overlay() -> Path:
    """The overlay's python, installed on the first call."""
    release = f"{sys.version_info[0]}.{sys.version_info[1]}"
    packages = hashlib.sha256(repr(PACKAGES).encode()).hexdigest()[:12]
    folder = cache_folder() / f"peers-{packages}-py{release}"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.is_file():
        log.print(f"installing {PACKAGES[0]} and {PACKAGES[2]} into {folder}")
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
