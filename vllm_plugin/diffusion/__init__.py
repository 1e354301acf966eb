# SPDX-License-Identifier: Apache-2.0
"""Masked diffusion language models: model, scheduler, worker and requests of LLaDA in vLLM."""


def register() -> None:
    """Make LLaDA known to vLLM, its config without remote code."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from vllm_plugin.diffusion.config import ARCHITECTURE, MODEL_TYPE, LLaDAConfig

    AutoConfig.register(MODEL_TYPE, LLaDAConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"vllm_plugin.diffusion.llada:{ARCHITECTURE}")
