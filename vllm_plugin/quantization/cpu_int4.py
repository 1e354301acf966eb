# SPDX-License-Identifier: Apache-2.0
"""int4 linears on CPU, in place of vLLM's CPUWNA16LinearKernel."""

from typing import Literal

import torch
from vllm import envs
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from compress_common.errors import CompressError
from vllm_plugin.quantization.cpu_int4_ops import cpu_int4_linear, cpu_w4a8_linear, crossover
from vllm_plugin.quantization.cpu_int4_packing import pack_int4, pack_w4a8

Activations = Literal["auto", "bf16", "int8"]
SETTING = "additional_config.compress.weights.activations"
GROUP_SIZES = (32, 64, 128, 256)  # what torch's int4 GEMM takes
WEIGHT_TYPES = (scalar_types.uint4, scalar_types.uint4b8)


def _has_amx() -> bool:
    # vLLM's W4A8 kernel needs AVX-512 and AMX, and aborts elsewhere.
    return torch.cpu._is_amx_tile_supported() and hasattr(torch.ops._C, "int4_scaled_mm_cpu")


def resolve_activations(requested: str = "auto") -> Literal["bf16", "int8"]:
    """Return the type that activations are multiplied in.

    Args:
        requested: "auto" is "int8" where vLLM would choose it: the CPU has AMX and
            VLLM_CPU_INT4_W4A8 is on, which is its default.

    Raises:
        CompressError: An unknown value, or "int8" without AMX.
    """
    if requested not in ("auto", "bf16", "int8"):
        raise CompressError(f"{SETTING} is {requested!r}; allowed are 'auto', 'bf16' and 'int8'")
    if requested == "int8" and not _has_amx():
        raise CompressError(
            f"{SETTING} is 'int8', which needs a CPU with AMX, and this one has none; "
            "use 'auto' or 'bf16'"
        )
    if requested == "auto":
        return "int8" if envs.VLLM_CPU_INT4_W4A8 and _has_amx() else "bf16"
    return "int8" if requested == "int8" else "bf16"


class CpuInt4LinearKernel(MPLinearKernel):
    """int4 weights in compressed-tensors layout times bfloat16 activations [..., K] -> [..., N].

    With activations "bf16" the weights are kept once, in torch's int4pack layout. Few rows use
    torch's int4 GEMM, many rows a bfloat16 GEMM on weights that are dequantized for the call. With
    "int8" activations are rounded per row to int8, and vLLM's AMX kernel multiplies any number of
    rows. "auto" is resolved by `resolve_activations`, and becomes "bf16" for shapes that the AMX
    kernel does not take.
    """

    def __init__(
        self,
        c: MPLinearLayerConfig,
        w_q_param_name: str,
        w_s_param_name: str,
        w_zp_param_name: str | None = None,
        activations: Activations = "auto",
    ) -> None:
        possible, reason = self.can_implement(c)
        if not possible:
            raise ValueError(reason)
        # The AMX kernel always needs zero points, so they need a name.
        w_zp_param_name = w_zp_param_name or "weight_zero_point"
        super().__init__(c, w_q_param_name, w_s_param_name, w_zp_param_name)
        self.activations = self.served_activations(c, activations)

    @staticmethod
    def served_activations(c: MPLinearLayerConfig, requested: str) -> Literal["bf16", "int8"]:
        """Return what the activations of a layer are multiplied in.

        Raises:
            CompressError: As of `resolve_activations`, or "int8" and the kernel for AMX does not
                take the layer.
        """
        kind, outputs = resolve_activations(requested), c.partition_weight_shape[1]
        if kind == "int8" and outputs % 32:
            if requested == "int8":
                raise CompressError(
                    f"{SETTING} is 'int8', which needs output sizes that are multiples of 32, and "
                    f"a layer has {outputs}; use 'auto' or 'bf16'"
                )
            return "bf16"
        return kind

    @classmethod
    def get_min_capability(cls) -> int:
        """Return -1: CPUs have no compute capability."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Return whether this layer is supported, and if not, why."""
        name = cls.__name__
        k, n = c.partition_weight_shape
        if not current_platform.is_cpu():
            return False, f"{name} only runs on CPU"
        if c.weight_type not in WEIGHT_TYPES:
            return False, f"{name} takes weights of {WEIGHT_TYPES}, not {c.weight_type}"
        if c.zero_points != (c.weight_type == scalar_types.uint4):
            return False, f"{name} takes uint4 with zero points or uint4b8 without"
        if c.act_type != torch.bfloat16:
            return False, f"{name} takes activations of torch.bfloat16, not {c.act_type}"
        if c.group_size not in GROUP_SIZES:
            return False, f"{name} takes group sizes {GROUP_SIZES}, not {c.group_size}"
        if k % c.group_size:
            return False, f"{name} takes input sizes divisible by the group size, not {k}"
        if n % 16:
            return False, f"{name} takes output sizes that are multiples of 16, not {n}"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the loaded parameters of a layer by packed ones. A second call does nothing."""
        words, scales, zero_points = self._get_weight_params(layer)
        if words.dtype != torch.int32:
            return
        zeros = zero_points.data if self.config.zero_points else None
        new: tuple[torch.Tensor | None, ...]
        if self.activations == "int8":
            new = pack_w4a8(words.data, scales.data, zeros)
            if (bias := getattr(layer, "bias", None)) is not None:
                bias.data = bias.data.float()  # as the kernel adds it: not again in every call
        else:
            packed, scale_zero = pack_int4(words.data, scales.data, zeros)
            crossover(packed, scale_zero, self.config.group_size)
            new = packed, scale_zero, None  # zero points are folded into scale_zero
        for name, tensor in zip((self.w_q_name, self.w_s_name, self.w_zp_name), new, strict=True):
            # Not in place: the loaded parameters are subclasses that torch.compile cannot trace.
            parameter = None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(name, parameter)

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply by the weights of a layer.

        Args:
            layer: After ``process_weights_after_loading``.
            x: bfloat16 [..., K], any strides.
            bias: bfloat16 [N], or None.

        Returns:
            bfloat16 [..., N].
        """
        weights, scales, zero_points = self._get_weight_params(layer)
        if self.activations == "int8":
            return cpu_w4a8_linear(x, weights, scales, zero_points, bias)
        return cpu_int4_linear(x, weights, scales, bias, self.config.group_size)
