# SPDX-License-Identifier: Apache-2.0
"""Finished parts of a calibration, kept so that an interrupted run goes on where it stopped."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from compress_common.errors import CompressError
from compress_common.store import Store, digest

KIND = "calibration-stage"
_FILE = "stage.safetensors"
Tensors = dict[str, torch.Tensor]

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM only shows loggers below its own


class Stages:
    """The stages of one calibration.

    Args:
        key: Hex SHA-256 of everything that the result depends on; None: nothing is kept.
        store: Where they are kept.
    """

    def __init__(self, key: str | None = None, store: Store | None = None) -> None:
        self.key = key
        self.store = store or Store()
        self._names: list[str] = []

    def tensors(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        """Return what ``compute`` returns, from an earlier run if that got so far.

        Args:
            name: Of the stage, unique in the calibration.
            compute: Called when the stage is not there yet. Its tensors must not share memory.
        """
        if self.key is None:
            return compute()
        entry = digest(self.key, name)
        self._names.append(name)
        if found := self.store.find(KIND, entry):
            return load_file(found / _FILE)
        result = compute()
        self._keep(
            entry, {key: tensor.detach().cpu().contiguous() for key, tensor in result.items()}
        )
        # From the file, which is mapped: what is computed need not stay in memory.
        found = self.store.find(KIND, entry) if self.key is not None else None
        return load_file(found / _FILE) if found else result

    def number(self, name: str, compute: Callable[[], float]) -> float:
        """Return a number, as ``tensors`` does."""
        kept = self.tensors(name, lambda: {"value": torch.tensor(compute(), dtype=torch.float64)})
        return kept["value"].item()

    def clear(self) -> None:
        """Remove the stages: what they were for is complete."""
        if self.key is not None:
            for name in self._names:
                self.store.remove(KIND, digest(self.key, name))

    def _keep(self, entry: str, tensors: Tensors) -> None:
        def build(folder: Path) -> None:
            save_file(tensors, folder / _FILE)

        try:
            kept = self.store.make(KIND, entry, build)
        except (CompressError, OSError) as error:
            logger.warning("an interrupted calibration will start again: %s", error)
            self.key = None
            return
        if self.store.root not in kept.parents:  # said once by the store, not for every stage
            self.key = None
