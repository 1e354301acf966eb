# SPDX-License-Identifier: Apache-2.0
"""Drafts beside quantized weights: which were run, and how a draft model is quantized."""

from vllm.config import VllmConfig

from vllm_plugin.quantization.config import CONFIGS, MethodConfig

# Drafts without a model of their own, for which vLLM notes the target's.
_WITHOUT_MODEL = ("ngram", "ngram_gpu", "suffix")
# Heads that vLLM builds with their own config. It gives others the config of the target, or takes
# them from its checkpoint.
_HEADS = {"eagle3": ("Eagle3LlamaForCausalLM", "LlamaForCausalLMEagle3")}
_OURS = tuple(config.method for config in CONFIGS)


def drafts_with_a_model(config: VllmConfig) -> bool:
    """Whether an engine has a draft model, or a head of the target that drafts."""
    speculative = config.speculative_config
    return speculative is not None and speculative.method not in _WITHOUT_MODEL


def speculative_problems(config: VllmConfig) -> list[str]:
    """List what keeps an engine from its drafts, where the target or the draft is quantized by us.

    Args:
        config: vLLM's own, of this engine.
    """
    speculative = config.speculative_config
    if speculative is None:
        return []
    method, draft = speculative.method, speculative.draft_model_config
    known = (*_WITHOUT_MODEL, "draft_model")
    architectures = () if draft is None else tuple(draft.architectures)
    served = method in known or bool({*_HEADS.get(str(method), ())} & {*architectures})
    if isinstance(config.quant_config, MethodConfig) and not served:
        problem = (
            f"--speculative-config: drafts of {method!r} ({', '.join(architectures)}) were never "
            f"tested beside quantized weights; use {', '.join(known)} or eagle3 of a Llama, or "
            "remove the flag"
        )
        return [problem]
    if method in _WITHOUT_MODEL or draft is None or draft.quantization not in _OURS:
        return []
    if getattr(draft.hf_config, "quantization_config", None):
        return []
    problem = (
        f"--speculative-config: a draft model is not quantized while it loads (quantization is "
        f"{draft.quantization}); write it with `vllm-compress quantize {draft.model} --method "
        f"{draft.quantization} --out DIR` and give that folder as its model, or remove "
        "quantization to draft at 16 bits"
    )
    return [problem]
