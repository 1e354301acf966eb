# SPDX-License-Identifier: Apache-2.0
"""What a command line of ``vllm-compress serve`` lacks, and what is made for it: bases of cskv."""

import argparse
import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

from compress_common.calibration.text import CalibrationSettings
from compress_common.checkpoints.checkpoint import Checkpoint, resolve
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent
from compress_common.store import Store, digest
from kv_policies.registry import policies
from vllm_plugin.commands.calibrate_kv import BITS, LENGTH, RATIOS, SAMPLES
from vllm_plugin.settings import KEY

KIND = "kv-bases"
_FILE = "bases.safetensors"
_REVISION = "1"  # raised when other bases are fitted with equal arguments


def lacks_bases(parsed: argparse.Namespace) -> bool:
    """Whether the policy stores latents, and no bases are named, nor a ``keep`` that needs none."""
    kv = _section(parsed).get("kv")
    if not isinstance(kv, dict) or {"bases", "keep"} & kv.keys():
        return False
    kind = policies().get(str(kv.get("policy")))
    return kind is not None and kind.capabilities.content == "latents"


def whole(parsed: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments with a cache that stays whole: all checks apply, without bases.

    Args:
        parsed: arguments that lack bases.
    """
    return _with_kv(parsed, keep=1)


def with_bases(parsed: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments with the bases of their model: see ``default_bases``.

    Raises:
        CompressError: the model cannot have bases.
    """
    folder = resolve(parsed.model, parsed.revision, parsed.download_dir)
    ranks = parsed.tensor_parallel_size
    return _with_kv(parsed, bases=str(default_bases(Checkpoint(folder), tensor_parallel=ranks)))


def default_bases(
    checkpoint: Checkpoint, progress: Progress = silent, tensor_parallel: int = 1
) -> Path:
    """Return the file of bases that ``vllm-compress calibrate-kv`` makes of a model by default.

    They are fitted first if the store lacks them, by that command in a process of its own: here
    they would leave memory of the device taken, which an engine wants to find free.

    Args:
        checkpoint: of the model.
        progress: told before and after.
        tensor_parallel: ranks that will serve the model.

    Raises:
        CompressError: the model cannot have bases.
    """
    settings = CalibrationSettings(samples=SAMPLES, length=LENGTH)
    parts = (checkpoint.digest, RATIOS[BITS], str(BITS), settings.model_dump_json())
    several = [] if tensor_parallel == 1 else ["--tensor-parallel-size", str(tensor_parallel)]
    key = digest(KIND, _REVISION, *parts, *several)

    def build(target: Path) -> None:
        command = ["calibrate-kv", str(checkpoint.folder), "--out", str(target / _FILE)]
        command += ["--samples", str(SAMPLES), "--length", str(LENGTH), *several]
        progress("fit bases", 0, 1)
        made = subprocess.run(
            [sys.executable, "-m", "vllm_plugin.cli", *command], stdout=subprocess.DEVNULL
        )
        if made.returncode:
            raise CompressError(f"vllm-compress calibrate-kv {checkpoint.folder} failed, see above")
        progress("fit bases", 1, 1)

    return Store().make(KIND, key, build) / _FILE


def _with_kv(parsed: argparse.Namespace, **settings: object) -> argparse.Namespace:
    changed, section = copy.copy(parsed), _section(parsed)
    kv = {"kv": section["kv"] | settings}
    changed.additional_config = parsed.additional_config | {KEY: section | kv}
    return changed


def _section(parsed: argparse.Namespace) -> dict[str, Any]:
    config = parsed.additional_config
    section = config.get(KEY) if isinstance(config, dict) else None
    return section if isinstance(section, dict) else {}
