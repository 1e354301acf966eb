# SPDX-License-Identifier: Apache-2.0
"""What keeps an engine from int4 weights with FP8 activations (compressed-tensors' W4A8-FP8)."""

import torch
from compressed_tensors.quantization import QuantizationType
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_plugin.quantization.config import MethodConfig

_HOPPER = 90  # vLLM's CutlassW4A8LinearKernel runs on exactly this compute capability


def fp8_problems(config: VllmConfig, quant_config: MethodConfig) -> list[str]:
    """List what keeps an engine from linears whose activations are rounded to FP8.

    vLLM itself would end while it loads, with an error that names no cause.

    Args:
        config: vLLM's own, of this engine.
        quant_config: has the scheme of each linear.
    """
    inputs = [scheme["input_activations"] for scheme in quant_config.target_scheme_map.values()]
    if not any(given is not None and given.type == QuantizationType.FLOAT for given in inputs):
        return []
    problems = []
    capability = current_platform.get_device_capability()
    if not current_platform.is_cuda() or capability is None or capability.to_int() != _HOPPER:
        here = "a CPU" if current_platform.is_cpu() else str(current_platform.device_name)
        if capability is not None:
            here += f" of capability {capability.as_version_str()}"
        problems.append(
            f"{quant_config.method}: vLLM multiplies int4 weights with FP8 activations only on a "
            f"Hopper GPU (capability 9.0), and this is {here}; write the checkpoint with another "
            "method, such as `vllm-compress quantize --method rsq`"
        )
    if config.model_config.dtype != torch.bfloat16:
        problems.append(
            f"{quant_config.method}: vLLM's FP8 kernel writes bfloat16, not "
            f"{config.model_config.dtype}; serve with --dtype bfloat16"
        )
    if (ranks := config.parallel_config.tensor_parallel_size) > 1:
        problems.append(
            f"{quant_config.method}: each of {ranks} ranks would round the scales of o_proj and "
            "down_proj in another way than the codes were made for; serve with "
            "--tensor-parallel-size 1"
        )
    return problems
