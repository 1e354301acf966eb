# SPDX-License-Identifier: Apache-2.0
"""What a command line of ``vllm-compress serve`` lacks, and what is made for it: bases of cskv."""

import argparse
import copy
from fractions import Fraction
from pathlib import Path
from typing import Any

from compress_common.store import Store, digest
from kv_policies.registry import policies
from quant_methods.calibration.text import CalibrationSettings
from quant_methods.checkpoint import Checkpoint, resolve
from quant_methods.progress import Progress
from vllm_plugin.commands.calibrate_kv import BITS, LENGTH, RATIOS, SAMPLES
from vllm_plugin.commands.profiling.kv_bases import make_bases
from vllm_plugin.progress import bar
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


def without_kv(parsed: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments without ``compress.kv``, to be checked before bases are fitted."""
    rest = copy.copy(parsed)
    section = {name: content for name, content in _section(parsed).items() if name != "kv"}
    rest.additional_config = dict(parsed.additional_config) | {KEY: section}
    return rest


def bases_flags(parsed: argparse.Namespace) -> list[str]:
    """Return the flag that names the bases of a model: see ``default_bases``.

    Raises:
        CompressError: the model cannot have bases.
    """
    folder = resolve(parsed.model, parsed.revision, parsed.download_dir)
    with bar() as progress:
        file = default_bases(Checkpoint(folder), progress)
    return [f"--additional-config.{KEY}.kv.bases", str(file)]


def default_bases(checkpoint: Checkpoint, progress: Progress) -> Path:
    """Return the file of bases that ``vllm-compress calibrate-kv`` makes of a model by default.

    They are fitted first if the store lacks them.

    Args:
        checkpoint: of the model.
        progress: told as the work advances.

    Raises:
        CompressError: the model cannot have bases.
    """
    settings = CalibrationSettings(samples=SAMPLES, length=LENGTH)
    parts = (checkpoint.digest, RATIOS[BITS], str(BITS), settings.model_dump_json())
    key = digest(KIND, _REVISION, *parts)

    def build(target: Path) -> None:
        bases, _ = make_bases(
            str(checkpoint.folder),
            Fraction(RATIOS[BITS]),
            settings,
            bits=BITS,
            device="auto",
            progress=progress,
        )
        bases.save(target / _FILE)

    return Store().make(KIND, key, build) / _FILE


def _section(parsed: argparse.Namespace) -> dict[str, Any]:
    config = parsed.additional_config
    section = config.get(KEY) if isinstance(config, dict) else None
    return section if isinstance(section, dict) else {}
