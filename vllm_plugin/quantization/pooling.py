# SPDX-License-Identifier: Apache-2.0
"""What keeps the hidden states of a quantized model from being pooled."""

from vllm.config import VllmConfig

from quant_methods.formats.checkpoint_formats import MARKER
from vllm_plugin.quantization.config import MethodConfig


def pooling_problems(config: VllmConfig, quant_config: MethodConfig) -> list[str]:
    """List what keeps an engine from embedding or classifying with a checkpoint that we wrote.

    Args:
        config: vLLM's own, of this engine.
        quant_config: has the marker of the checkpoint.
    """
    marker = (quant_config.config or {}).get(MARKER) or {}
    if config.model_config.runner_type == "generate" or not marker.get("last_states_rotated"):
        return []
    problem = (
        f"--runner {config.model_config.runner_type}: the last hidden states of this checkpoint "
        "are rotated, which its lm_head undoes and pooling does not; quantize without "
        "rotation=both"
    )
    return [problem]
