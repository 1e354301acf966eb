# SPDX-License-Identifier: Apache-2.0
"""What keeps the hidden states of a quantized model from being pooled."""

from vllm.config import VllmConfig

from vllm_plugin.quantization.marker import marker_of


def pooling_problems(config: VllmConfig) -> list[str]:
    """List what keeps an engine from embedding or classifying with a checkpoint that we wrote.

    Args:
        config: vLLM's own, of this engine.
    """
    marker = marker_of(config) or {}
    if config.model_config.runner_type == "generate" or not marker.get("last_states_rotated"):
        return []
    problem = (
        f"--runner {config.model_config.runner_type}: the last hidden states of this checkpoint "
        "are rotated, which its lm_head undoes and pooling does not; quantize without "
        "rotation=both"
    )
    return [problem]
