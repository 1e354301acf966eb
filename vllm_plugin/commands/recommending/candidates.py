# SPDX-License-Identifier: Apache-2.0
"""The settings that are compared: weights at 16 bits or int4, times a few settings of the cache."""

import shlex
from dataclasses import dataclass
from typing import Any, Final

from vllm_plugin.presets import PRESETS, flags

METHOD: Final = "smoothquant_plus"
CSKV: Final = "cskv"
# The safest first. Those of the presets are among them, which a test checks.
CACHES: Final[dict[str, dict[str, Any] | None]] = {
    "full cache": None,
    "snap_kv 0.5": {"policy": "snap_kv", "keep": 0.5},
    "snap_kv 0.25": {"policy": "snap_kv", "keep": 0.25},
    "cskv": {"policy": CSKV},  # with the bases that `vllm-compress serve` fits
}
WEIGHTS: Final[dict[str, str | None]] = {"16 bits": None, "int4": METHOD}


@dataclass(frozen=True)
class Setting:
    """Weights and a cache, by their names above."""

    weights: str
    cache: str

    @property
    def name(self) -> str:
        """What it is called in a table."""
        return f"{self.weights}, {self.cache}"

    @property
    def quantization(self) -> str | None:
        """``--quantization``."""
        return WEIGHTS[self.weights]

    @property
    def kv(self) -> dict[str, Any] | None:
        """The section ``compress.kv``, without bases."""
        return CACHES[self.cache]

    @property
    def flags(self) -> list[str]:
        """Its flags of ``vllm serve``, without bases."""
        words = [] if self.quantization is None else ["--quantization", self.quantization]
        for key, value in (self.kv or {}).items():
            words += [f"--additional-config.compress.kv.{key}", str(value)]
        return words

    @property
    def preset(self) -> str | None:
        """The preset of ``vllm-compress serve`` that is this setting, if there is one."""
        return next((name for name in PRESETS if flags(name) == self.flags), None)

    def command(self, model: str, *more: str) -> str:
        """Return the shell command that serves a model with it.

        Args:
            model: a folder or hub id.
            more: further flags.
        """
        if preset := self.preset:
            return shlex.join(["vllm-compress", "serve", model, "--preset", preset, *more])
        latents = self.kv is not None and self.kv["policy"] == CSKV
        program = ["vllm-compress", "serve"] if latents else ["vllm", "serve"]
        return shlex.join([*program, model, *self.flags, *more])


def settings() -> list[Setting]:
    """Return all settings, the one without compression first."""
    return [Setting(weights, cache) for weights in WEIGHTS for cache in CACHES]
