# SPDX-License-Identifier: Apache-2.0
"""Masked diffusion language models in vLLM: model, scheduler, worker and requests of LLaDA."""


def register() -> None:
    """Make LLaDA known to vLLM. Its config needs no remote code."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from vllm_plugin.diffusion.config import LLaDAConfig
    from vllm_plugin.diffusion.names import ARCHITECTURE, MODEL_TYPE

    AutoConfig.register(MODEL_TYPE, LLaDAConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"vllm_plugin.diffusion.llada:{ARCHITECTURE}")
