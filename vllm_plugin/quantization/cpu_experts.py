# SPDX-License-Identifier: Apache-2.0
"""int4 routed experts on a CPU without AMX, for which vLLM has no kernel.

Experts stay packed. A step multiplies by those that its tokens go to, one after the other, with
the int4 linear of ``cpu_int4_ops``.
"""

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    CompressedTensorsMoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
    CompressedTensorsWNA16MoEMethod,
)
from vllm.utils.torch_utils import direct_register_custom_op

from compress_common.errors import CompressError
from vllm_plugin.quantization.cpu_int4 import GROUP_SIZES
from vllm_plugin.quantization.cpu_int4_ops import crossover, int4_linear
from vllm_plugin.quantization.cpu_int4_packing import pack_int4

BITS = 4
_ACTIVATIONS: dict[MoEActivation, Any] = {
    MoEActivation.SILU: torch.nn.functional.silu,
    MoEActivation.GELU: torch.nn.functional.gelu,
    MoEActivation.GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def experts_problem(
    bits: int, group_size: int, dtype: torch.dtype, shapes: list[tuple[int, int]]
) -> str | None:
    """Say why ``CpuExperts`` cannot serve routed experts; None: it can.

    Args:
        bits: Of a weight.
        group_size: Input channels that share a scale.
        dtype: Of the activations.
        shapes: ``(out_features, in_features)`` of what is multiplied on one rank.
    """
    if bits != BITS:
        return f"routed experts have {BITS} bits on a CPU, not {bits}"
    if group_size not in GROUP_SIZES:
        return f"routed experts have groups of {GROUP_SIZES} on a CPU, not {group_size}"
    if dtype != torch.bfloat16:
        return f"routed experts have activations of torch.bfloat16 on a CPU, not {dtype}"
    for outputs, inputs in shapes:
        if outputs % 16 or inputs % group_size:
            return (
                f"routed experts have outputs that are multiples of 16 and inputs that are "
                f"multiples of the group size {group_size} on a CPU, not {outputs} and {inputs}"
            )
    return None


# vLLM loads tensors by the words "compressed" in the name of the class.
class CompressedTensorsCpuExperts(CompressedTensorsWNA16MoEMethod):
    """Parameters and sharding are those of the base class. Routing is vLLM's own.

    Args:
        weights: Scheme of the weights.
        moe: Of the layer.
    """

    def __init__(self, weights: QuantizationArgs, moe: FusedMoEConfig) -> None:
        # Not the base class, which looks for a kernel of vLLM's and finds none.
        CompressedTensorsMoEMethod.__init__(self, moe)
        self.weight_quant, self.input_quant = weights, None
        self.symmetric, self.num_bits = bool(weights.symmetric), int(weights.num_bits)
        self.packed_factor = 32 // self.num_bits  # type: ignore[assignment]
        self.strategy, self.group_size = weights.strategy, weights.group_size or -1

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack the loaded experts, one after the other. A second call does nothing."""
        if layer.w13_weight_packed.dtype != torch.int32:
            return
        if layer.activation not in _ACTIVATIONS or self.moe.has_bias:
            raise CompressError(
                f"routed experts with {layer.activation} or biases are not served in int4 on a CPU "
                f"without AMX; activations that are: {', '.join(a.value for a in _ACTIVATIONS)}"
            )
        if layer.apply_router_weight_on_input:
            raise CompressError(
                "routed experts whose inputs are weighed are not served in int4 on a CPU without "
                "AMX"
            )
        for name in ("w13", "w2"):
            words, scales = getattr(layer, f"{name}_weight_packed"), f"{name}_weight_scale"
            zeros = getattr(layer, f"{name}_weight_zero_point", None)
            packed, scale_zero = _packed(words, getattr(layer, scales), zeros)
            crossover(packed[0], scale_zero[0], self.group_size)
            for key, tensor in (
                (f"{name}_weight_packed", packed),
                (scales, scale_zero),
                (f"{name}_weight_zero_point", None),  # folded into scale_zero
            ):
                parameter = None if tensor is None else torch.nn.Parameter(tensor, False)
                layer.register_parameter(key, parameter)

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """Return None: no kernel of vLLM's is used."""

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the weighed sum of the chosen experts, bfloat16 [M, hidden].

        The runner adds shared experts itself where there is no kernel of vLLM's.
        """
        if layer.expert_map is not None:  # -1: on another rank
            topk_ids = layer.expert_map[topk_ids.long()]
        return torch.ops.vllm.cpu_int4_experts(  # type: ignore[no-any-return]
            x,
            *(layer.w13_weight_packed, layer.w13_weight_scale),
            *(layer.w2_weight_packed, layer.w2_weight_scale),
            *(topk_weights, topk_ids, layer.activation.value, self.group_size),
        )


def _packed(
    words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the int4pack codes [E, N, K/2] and ``scale_zero`` [E, K/g, N, 2] of all experts."""
    experts, n, groups = scales.shape
    packed = torch.empty(experts, n, words.shape[2] * 4, dtype=torch.uint8)
    scale_zero = torch.empty(experts, groups, n, 2, dtype=torch.bfloat16)
    for index in range(experts):
        zero = None if zeros is None else zeros.data[index]
        packed[index], scale_zero[index] = pack_int4(words.data[index], scales.data[index], zero)
    return packed, scale_zero


def _cpu_int4_experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    group_size: int,
) -> torch.Tensor:
    ids, act = topk_ids.flatten().long(), _ACTIVATIONS[MoEActivation.from_str(activation)]
    order = ids.argsort(stable=True)
    order = order[ids[order] >= 0]
    token = order // topk_ids.shape[1]
    counts = torch.bincount(ids[order], minlength=len(w13)).tolist()
    rows = x[token]
    out = torch.empty_like(rows)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        part = slice(start, start + count)
        both = int4_linear(rows[part], w13[expert], w13_scale[expert], group_size)
        gate, up = both.float().chunk(2, dim=-1)
        inner = (act(gate) * up).to(x.dtype)
        out[part] = int4_linear(inner, w2[expert], w2_scale[expert], group_size)
        start += count
    share = topk_weights.flatten()[order, None].float()
    total = torch.zeros(x.shape, dtype=torch.float32)
    return total.index_add_(0, token, out.float() * share).to(x.dtype)


def _cpu_int4_experts_fake(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    group_size: int,
) -> torch.Tensor:
    return torch.empty_like(x)


# One opaque op: which experts it uses depends on the tokens.
direct_register_custom_op("cpu_int4_experts", _cpu_int4_experts, fake_impl=_cpu_int4_experts_fake)
