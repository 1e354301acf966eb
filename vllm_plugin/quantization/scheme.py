# SPDX-License-Identifier: Apache-2.0
"""The int4 linear of compressed-tensors, with our kernel on CPU and vLLM's elsewhere.

On a CPU, 2- and 3-bit codes become int4 codes when they are loaded: the file is smaller, the loaded
model is not.
"""

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import MPLinearKernel
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsWNA16,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (  # noqa: E501
    WNA16_SUPPORTED_TYPES_MAP,
    WNA16_ZP_SUPPORTED_TYPES_MAP,
)
from vllm.platforms import current_platform
from vllm.scalar_type import ScalarType

from compress_common.errors import CompressError
from vllm_plugin.quantization.cpu_int4 import Activations, CpuInt4LinearKernel
from vllm_plugin.quantization.cpu_int4_packing import widen

logger = init_logger(f"vllm.{__name__}")


_KERNEL_BITS = 4  # what a CPU multiplies; fewer bits are unpacked into these


def kernel_type(bits: int, symmetric: bool) -> ScalarType:
    """Return the type of weights that a kernel of this platform gets for weights of some bits."""
    if current_platform.is_cpu():
        bits = max(bits, _KERNEL_BITS)
    types = WNA16_SUPPORTED_TYPES_MAP if symmetric else WNA16_ZP_SUPPORTED_TYPES_MAP
    return types[bits]


class Int4Scheme(CompressedTensorsWNA16):
    """Parameters and sharding are those of the base class.

    Args:
        activations: As in ``WeightSettings``.
        **kwargs: As in the base class.
    """

    # The base class sets it in create_weights. vLLM 0.33 with VLLM_BATCH_INVARIANT=1 has none: it
    # unpacks the weights for each multiplication.
    kernel: MPLinearKernel | None

    def __init__(self, *, activations: Activations, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.activations = activations
        # The base class lays parameters out by num_bits, and chooses a kernel by quant_type.
        self.quant_type = kernel_type(self.num_bits, bool(self.symmetric))

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        if not current_platform.is_cpu() or self.kernel is None:
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
        elif self.num_bits < _KERNEL_BITS:
            raise CompressError(f"{self.num_bits}-bit weights cannot be served: {reason}")
        else:
            logger.warning_once(
                "%s serves int4 linears instead of the faster CpuInt4LinearKernel: %s",
                type(self.kernel).__name__,
                reason,
            )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        # A second call does nothing: the kernel has replaced the words.
        on_kernel = current_platform.is_cpu() and self.kernel is not None
        narrow = on_kernel and self.num_bits < _KERNEL_BITS
        if narrow and layer.weight_packed.dtype == torch.int32:
            self._widen(layer)
        super().process_weights_after_loading(layer)

    def _widen(self, layer: torch.nn.Module) -> None:
        zeros = None if self.symmetric else layer.weight_zero_point.data
        wide = widen(layer.weight_packed.data, zeros, self.num_bits, layer.input_size_per_partition)
        for name, tensor in zip(("weight_packed", "weight_zero_point"), wide, strict=True):
            if tensor is not None:
                layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
