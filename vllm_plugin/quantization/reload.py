# SPDX-License-Identifier: Apache-2.0
"""``reload_weights`` of an engine that was quantized at load: what is refused, and how.

vLLM reloads from disk through the loader, which quantizes again. A plan that was calibrated fits
only the weights it was made from, and calibration needs the whole 16-bit model, so a running engine
does not calibrate other weights.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

from compress_common.errors import CompressError
from quant_methods.checkpoint import Checkpoint


def refuse_reload(checkpoint: Checkpoint, quant_config: Any, model_config: ModelConfig) -> None:
    """Refuse to reload other weights than an engine was quantized from.

    Args:
        checkpoint: What is to be loaded.
        quant_config: The engine's. Its ``source`` is what was loaded; None on the first load.
        model_config: The engine's. vLLM has put the new path into it; a refusal takes it out again.

    Raises:
        CompressError: The weights are others.
    """
    if quant_config.source is None:
        return
    digest, model, revision = quant_config.source
    if digest != checkpoint.digest:
        model_config.model, model_config.revision = model, revision
        raise CompressError(
            f"reload_weights: {checkpoint.folder} has other weights than this engine was quantized "
            "from, and other weights need another calibration; the engine goes on with its present "
            "ones. Start a new engine, or use --quantization rtn, which needs no calibration"
        )


def refuse_tensors(model: nn.Module, model_config: ModelConfig, allowed: type) -> None:
    """Make a quantized model refuse 16-bit tensors, and keep the weights that it has.

    vLLM hands such tensors to ``model.load_weights`` when ``reload_weights`` is called with an
    iterator, or by a weight-transfer engine. It has taken the present weights away by then;
    ``finalize_layerwise_reload`` puts them back.

    Args:
        model: What the loader has loaded.
        model_config: Its config.
        allowed: The type of iterable that the loader itself hands over.
    """
    load_weights = model.load_weights

    def guarded(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        if isinstance(weights, allowed):
            try:
                return load_weights(weights, *args, **kwargs)
            except Exception:
                finalize_layerwise_reload(model, model_config)
                raise
        finalize_layerwise_reload(model, model_config)
        raise CompressError(
            "this engine quantized its weights at load and cannot take 16-bit tensors; the engine "
            "goes on with its present weights. Reload from disk (reload_weights without an "
            "iterator), or serve a checkpoint that `vllm-compress quantize` wrote"
        )

    model.load_weights = guarded  # type: ignore[assignment]
