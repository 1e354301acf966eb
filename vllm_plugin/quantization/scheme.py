# SPDX-License-Identifier: Apache-2.0
"""The int4 linear of compressed-tensors, with our kernel on CPU and vLLM's elsewhere."""

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import MPLinearKernel
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsWNA16,
)
from vllm.platforms import current_platform

from vllm_plugin.quantization.cpu_int4 import Activations, CpuInt4LinearKernel

logger = init_logger(f"vllm.{__name__}")


class Int4Scheme(CompressedTensorsWNA16):
    """Parameters and sharding are those of the base class.

    Args:
        activations: As in ``WeightSettings``.
        **kwargs: As in the base class.
    """

    kernel: MPLinearKernel  # the base class sets it in create_weights

    def __init__(self, *, activations: Activations, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.activations = activations

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        if not current_platform.is_cpu():
            return
        able, reason = CpuInt4LinearKernel.can_implement(self.kernel.config)
        if able:
            self.kernel = CpuInt4LinearKernel(
                self.kernel.config,
                w_q_param_name="weight_packed",
                w_s_param_name="weight_scale",
                w_zp_param_name="weight_zero_point",
                activations=self.activations,
            )
        else:
            logger.warning_once(
                "%s serves int4 linears instead of the faster CpuInt4LinearKernel: %s",
                type(self.kernel).__name__,
                reason,
            )
