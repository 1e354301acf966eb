# SPDX-License-Identifier: Apache-2.0
"""What a command line of ``vllm-compress serve`` lacks, and what is made for it: bases of cskv."""

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from compress_common.calibration.text import CalibrationSettings
from compress_common.checkpoints.checkpoint import Checkpoint, resolve
from compress_common.checkpoints.local import local_folder
from compress_common.errors import CompressError, LimitError
from compress_common.progress import Progress, silent
from compress_common.store import Store, digest
from kv_policies.registry import policies
from vllm_plugin import KEY
from vllm_plugin.commands.calibrate_kv import BITS, LENGTH, RATIOS, SAMPLES
from vllm_plugin.commands.common import INTERRUPTED

KIND = "kv-bases"
_FILE = "bases.safetensors"
_NEED_NONE = {"bases", "keep", "budget"}  # latents refuse the last, whatever their bases
_REVISION = "2"  # raised when other bases are fitted with equal arguments


def lacks_bases(additional_config: Any) -> bool:
    """Whether the policy stores latents, and no bases are named, nor what needs none.

    Args:
        additional_config: as given, valid or not.
    """
    kv = _section(additional_config).get("kv")
    if not isinstance(kv, dict) or _NEED_NONE & kv.keys():
        return False
    kind = policies().get(str(kv.get("policy")))
    return kind is not None and kind.capabilities.content == "latents"


def whole(additional_config: dict[str, Any]) -> dict[str, Any]:
    """Return settings that lack bases with a cache that stays whole: most checks apply to it."""
    return _with_kv(additional_config, keep=1)


def with_bases(parsed: argparse.Namespace, bases: Path | None = None) -> argparse.Namespace:
    """Return the arguments with the bases of their model.

    Args:
        parsed: arguments that lack bases.
        bases: the file; None: that of ``default_bases``.

    Raises:
        CompressError: the model cannot have bases.
    """
    if bases is None:
        folder = resolve(parsed.model, parsed.revision, parsed.download_dir)
        bases = default_bases(Checkpoint(folder), tensor_parallel=parsed.tensor_parallel_size)
    return with_config(parsed, _with_kv(parsed.additional_config, bases=str(bases)))


def with_config(
    parsed: argparse.Namespace, additional_config: dict[str, Any]
) -> argparse.Namespace:
    """Return the arguments with another ``--additional-config``."""
    changed = copy.copy(parsed)
    changed.additional_config = additional_config
    return changed


def stored_bases(parsed: argparse.Namespace) -> Path | None:
    """Return the file of ``default_bases`` where it is stored already.

    Returns:
        None: it is not, or that takes reading all weights.
    """
    with suppress(CompressError):  # whoever checks the arguments says what is wrong with the model
        folder = local_folder(parsed.model, parsed.revision, parsed.download_dir)
        checkpoint = None if folder is None else Checkpoint(folder)
        if checkpoint is not None and checkpoint.digests_are_known():
            found = Store().find(KIND, _key(checkpoint, parsed.tensor_parallel_size))
            return None if found is None else found / _FILE
    return None


def default_bases(
    checkpoint: Checkpoint,
    progress: Progress = silent,
    tensor_parallel: int = 1,
    environment: Mapping[str, str] | None = None,
) -> Path:
    """Return the file of bases that ``vllm-compress calibrate-kv`` makes of a model by default.

    They are fitted first if the store lacks them, by that command in a process of its own: here
    they would leave memory of the device taken, which an engine wants to find free.

    Args:
        checkpoint: of the model.
        progress: told before and after.
        tensor_parallel: ranks that will serve the model.
        environment: what that process gets beside our own environment.

    Raises:
        CompressError: the model cannot have bases.
    """
    several = _ranks(tensor_parallel)

    def build(target: Path) -> None:
        command = ["calibrate-kv", str(checkpoint.folder), "--out", str(target / _FILE)]
        command += ["--samples", str(SAMPLES), "--length", str(LENGTH), *several]
        progress("fit bases", 0, 1)
        made = subprocess.run(
            [sys.executable, "-m", "vllm_plugin.cli", *command],
            stdout=subprocess.DEVNULL,
            env=os.environ | dict(environment or {}),
        )
        if made.returncode:
            interrupted = made.returncode < 0 or made.returncode == INTERRUPTED
            kind = LimitError if interrupted else CompressError  # another process may end it
            raise kind(f"vllm-compress calibrate-kv {checkpoint.folder} failed, see above")
        progress("fit bases", 1, 1)

    store = Store()
    with store.writing("the bases"):
        return store.make(KIND, _key(checkpoint, tensor_parallel), build) / _FILE


def _ranks(tensor_parallel: int) -> list[str]:
    return [] if tensor_parallel == 1 else ["--tensor-parallel-size", str(tensor_parallel)]


def _key(checkpoint: Checkpoint, tensor_parallel: int) -> str:
    settings = CalibrationSettings(samples=SAMPLES, length=LENGTH)
    # Not ``checkpoint.digest``: it needs transformers, which takes seconds to import.
    config = json.dumps(checkpoint.config, sort_keys=True)
    parts = (checkpoint.weights_digest, config, RATIOS[BITS], str(BITS), settings.model_dump_json())
    return digest(KIND, _REVISION, *parts, *_ranks(tensor_parallel))


def _with_kv(additional_config: dict[str, Any], **settings: object) -> dict[str, Any]:
    section = _section(additional_config)
    return additional_config | {KEY: section | {"kv": section["kv"] | settings}}


def _section(additional_config: Any) -> dict[str, Any]:
    section = additional_config.get(KEY) if isinstance(additional_config, dict) else None
    return section if isinstance(section, dict) else {}
