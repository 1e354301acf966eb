# SPDX-License-Identifier: Apache-2.0
"""Finished parts of a calibration, kept so that an interrupted run goes on where it stopped."""

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from compress_common.errors import CompressError
from compress_common.store import Store, digest
from compress_common.tensor_file import save_tensors

KIND = "calibration-stage"
_FILE = "stage.safetensors"
_KEY = "calibration"  # in the header of that file
Tensors = dict[str, torch.Tensor]

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM only shows loggers below its own


class Stages:
    """The stages of one calibration.

    Args:
        key: Hex SHA-256 of everything that the result depends on; None: nothing is kept.
        store: Where they are kept.
        kind: Of the store's entries.
        required: Whether a stage that cannot be kept is an error. False: a log line says so, and
            the work goes on.
    """

    def __init__(
        self,
        key: str | None = None,
        store: Store | None = None,
        *,
        kind: str = KIND,
        required: bool = False,
    ) -> None:
        self.key = key
        self.store = store or Store()
        self.kind = kind
        self.required = required
        self._keeps = key is not None

    def has(self, name: str) -> bool:
        """Return whether a stage is there already. Its content is not checked."""
        if self.key is None:
            return False
        # Not Path.is_dir, which raises below a folder that this user cannot enter.
        return os.path.isdir(self.store.root / self.kind / digest(self.key, name))

    def tensors(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        """Return what ``compute`` returns, from an earlier run if that got so far.

        Args:
            name: Of the stage, unique in the calibration.
            compute: Called when the stage is not there yet. Its tensors must not share memory.

        Raises:
            CompressError: The stage is required, and cannot be kept.
        """
        if self.key is None:
            return compute()
        entry = digest(self.key, name)
        if found := self.store.find(self.kind, entry):
            return load_file(found / _FILE)
        result = compute()
        if not self._keeps:
            return result
        kept = self._keep(
            entry, {key: tensor.detach().cpu().contiguous() for key, tensor in result.items()}
        )
        # From the file, which is mapped: what is computed need not stay in memory.
        return load_file(kept / _FILE) if kept else result

    def reread(self, name: str, tensors: Tensors) -> Tensors:
        """Return the tensors of a stage from a new mapping of its file.

        Pages of the old one that were read count as memory of this process as long as it lives.

        Args:
            name: Of the stage.
            tensors: What ``tensors`` returned for it. Returned where the stage is not kept.
        """
        if self.key is None:
            return tensors
        found = self.store.find(self.kind, digest(self.key, name))
        return load_file(found / _FILE) if found else tensors

    def number(self, name: str, compute: Callable[[], float]) -> float:
        """Return a number, as ``tensors`` does."""
        kept = self.tensors(name, lambda: {"value": torch.tensor(compute(), dtype=torch.float64)})
        return kept["value"].item()

    def clear(self) -> None:
        """Remove the stages, those of earlier runs too: what they were for is complete."""
        if self.key is None:
            return
        for file in (self.store.root / self.kind).glob(f"*/{_FILE}"):
            # A stage of another calibration may go, or be incomplete, while it is read.
            with suppress(OSError, SafetensorError), safe_open(file, "pt") as stage:
                if (stage.metadata() or {}).get(_KEY) == self.key:
                    self.store.remove(self.kind, file.parent.name)

    def _keep(self, entry: str, tensors: Tensors) -> Path | None:
        """Store a stage. Returns its folder; None: it could not be stored."""

        def build(folder: Path) -> None:
            save_tensors(tensors, folder / _FILE, metadata={_KEY: str(self.key)})

        try:
            kept = self.store.make(self.kind, entry, build)
        except (CompressError, OSError) as error:
            self._lost(str(error), error)
            return None
        if self.store.root not in kept.parents:  # said once by the store, not for every stage
            self._lost(f"{self.store.root} cannot be written", None)
            return None
        return kept

    def _lost(self, reason: str, cause: Exception | None) -> None:
        """Go on without stages, or stop where they are required."""
        if self.required:
            raise CompressError(
                f"cannot keep the work in {self.store.root}: {reason}; what was finished before "
                "stays. Free space, or set VLLM_COMPRESS_CACHE to a writable folder with space "
                "(copy the old one to keep the finished parts), and run the same command again"
            ) from cause
        if cause is not None:
            logger.warning("an interrupted calibration will start again: %s", reason)
        self._keeps = False
