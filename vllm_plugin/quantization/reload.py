# SPDX-License-Identifier: Apache-2.0
"""``reload_weights`` of an engine that was quantized at load: what is refused, and how.

vLLM reloads from disk through the loader, which quantizes again. A plan that was calibrated fits
only the weights it was made from, and calibration needs the whole 16-bit model, so a running engine
does not calibrate other weights.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError

_BROKEN = "a reload failed when some weights were replaced already; restart the engine"


@dataclass(frozen=True)
class Source:
    """What an engine was quantized from.

    Attributes:
        digest: Of the checkpoint.
        model: Folder or hub id, as ``ModelConfig`` has it.
        model_weights: Where object storage has the weights, as ``ModelConfig`` has it.
        revision: Of the model on the hub.
    """

    digest: str
    model: str
    model_weights: str
    revision: str | None

    @classmethod
    def now(cls, digest: str, model_config: ModelConfig) -> "Source":
        """Return what the config names at present."""
        return cls(digest, model_config.model, model_config.model_weights, model_config.revision)

    def restore(self, model_config: ModelConfig) -> None:
        """Take out of the config what a reload that failed has put into it."""
        model_config.model = self.model
        model_config.model_weights = self.model_weights
        model_config.revision = self.revision


@contextmanager
def present_kept(quant_config: Any, model_config: ModelConfig) -> Iterator[None]:
    """Let the config name the present weights again when the block fails.

    Args:
        quant_config: The engine's. Its ``source`` is what was loaded; None on the first load.
        model_config: The engine's. vLLM has put a new path into it.
    """
    present: Source | None = quant_config.source
    try:
        yield
    except BaseException:
        if present is not None:
            present.restore(model_config)
        raise


def refuse_reload(checkpoint: Checkpoint, source: Source | None) -> None:
    """Refuse to reload other weights than an engine was quantized from.

    Args:
        checkpoint: What is to be loaded.
        source: What was loaded; None on the first load.

    Raises:
        CompressError: The weights are others.
    """
    if source is not None and source.digest != checkpoint.digest:
        raise CompressError(
            f"reload_weights: {checkpoint.folder} has other weights than this engine was quantized "
            "from, and other weights need another calibration; the engine goes on with its present "
            "ones. Start a new engine, or use --quantization rtn, which needs no calibration"
        )


class Stream(Protocol):
    """The tensors that the loader hands over."""

    started: bool  # whether a tensor was handed on


def guard_weights(
    model: nn.Module, model_config: ModelConfig, quant_config: Any, allowed: type[Stream]
) -> None:
    """Make a quantized model refuse 16-bit tensors, and never serve some new and some old weights.

    vLLM hands 16-bit tensors to ``model.load_weights`` when ``reload_weights`` is called with an
    iterator, or by a weight-transfer engine. It has taken the present weights away by then;
    ``finalize_layerwise_reload`` puts them back. That is right only until the first new tensor was
    handed on: after that, layers without weights stay, with which the model cannot run.

    Args:
        model: What the loader has loaded.
        model_config: Its config.
        quant_config: The engine's. Its ``source`` is what was loaded.
        allowed: The type of iterable that the loader itself hands over.
    """
    load_weights = model.load_weights
    present: Source = quant_config.source
    broken = False

    def guarded(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        nonlocal present, broken
        if broken:
            raise CompressError(f"reload_weights: {_BROKEN}")
        if isinstance(weights, allowed):
            try:
                loaded = load_weights(weights, *args, **kwargs)
            except Exception as error:
                if weights.started:
                    broken = True
                    raise CompressError(f"reload_weights: {error}; {_BROKEN}") from error
                finalize_layerwise_reload(model, model_config)
                present.restore(model_config)
                quant_config.source = present
                raise
            present = quant_config.source
            return loaded
        finalize_layerwise_reload(model, model_config)
        raise CompressError(
            "this engine quantized its weights at load and cannot take 16-bit tensors; the engine "
            "goes on with its present weights. Reload from disk (reload_weights without an "
            "iterator), or serve a checkpoint that `vllm-compress quantize` wrote"
        )

    model.load_weights = guarded  # type: ignore[assignment]
