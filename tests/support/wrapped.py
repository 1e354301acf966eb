# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of images and text, with processors, and what vLLM answers of an image.

``make(family, folder, tokenizer)`` writes one. A model of text lies inside each of them.
"""

import os
from pathlib import Path
from typing import Any

from tests.support.child import SINGLE_PROCESS, in_child, kernel

TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [4, 6, 6],
    }
}
_TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
_QWEN_TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "depth": 2,
    "num_heads": 2,
    "out_hidden_size": 128,
}
_TOKENS = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}
_OTHER_TOKENS = (
    *("<image>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)

QUESTION = "What is in this picture? It is"

# family -> (config class, text, tower, its own fields, the image in a prompt)
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "llava": (
        "LlavaConfig",
        {"model_type": "llama"},
        _TOWER | {"model_type": "clip_vision_model"},
        {"image_token_index": "<image>"},
        "<image>",
    ),
    "mistral3": (
        "Mistral3Config",
        {"model_type": "mistral", "sliding_window": None},
        _TOWER | {"model_type": "pixtral", "head_dim": 32},
        {"image_token_index": "[IMG]", "spatial_merge_size": 2},
        "[IMG]",
    ),
    "gemma3": (
        "Gemma3Config",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 64,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
        },
        _TOWER | {"model_type": "siglip_vision_model"},
        {
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
            "mm_tokens_per_image": 4,
            "tie_word_embeddings": True,
        },
        "<start_of_image>",
    ),
    "qwen2.5 vl": (
        "Qwen2_5_VLConfig",
        _MROPE,
        _QWEN_TOWER | {"fullatt_block_indexes": [1], "window_size": 56},
        {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
        | {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"},
        "<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "qwen3 vl": (
        "Qwen3VLConfig",
        _MROPE,
        _QWEN_TOWER | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
        | {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"},
        "<|vision_start|><|image_pad|><|vision_end|>",
    ),
}


def make(family: str, folder: Path, tokenizer: Path, **text: Any) -> Path:
    """Write a random model with a processor.

    Args:
        family: A key of ``FAMILIES``.
        folder: A new one.
        tokenizer: A model folder; tokens of images are added to its tokens.
        **text: Other fields of the text model's config.
    """
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    kind, own, tower, fields, _ = FAMILIES[family]
    tokens = transformers.AutoTokenizer.from_pretrained(
        tokenizer, extra_special_tokens=_TOKENS if family == "gemma3" else {}
    )
    tokens.add_special_tokens({"additional_special_tokens": list(_OTHER_TOKENS)})
    tokens.add_tokens(["\n" * count for count in (1, 2, 3, 4)])  # vLLM's Gemma 3 asks for them
    ids = {
        key: tokens.convert_tokens_to_ids(value) if isinstance(value, str) else value
        for key, value in fields.items()
    }
    size = -(-len(tokens) // 64) * 64
    special = {f"{k}_token_id": getattr(tokens, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    config = getattr(transformers, kind)(
        text_config=TEXT | own | {"vocab_size": size} | special | text,
        vision_config=tower,
        **({"tie_word_embeddings": False} | ids),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:  # fresh norms are one and fresh biases zero
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
                elif "language_model" not in name and "lm_head" not in name:
                    parameter.copy_(torch.randn_like(parameter), non_blocking=False)
                    parameter.mul_(parameter[0].numel() ** -0.5)  # images matter
    model.to(torch.bfloat16).save_pretrained(folder)
    if family in ("llava", "gemma3"):  # as published checkpoints have it, and vLLM expects it
        file = folder / "model.safetensors"
        tensors = {
            name.replace("vision_tower.", "vision_tower.vision_model.", 1): tensor
            for name, tensor in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
    _processor(family, tokens).save_pretrained(folder)
    return folder


def _processor(family: str, tokens: Any) -> Any:
    import transformers as t

    if family == "llava":
        images = t.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=56)
        return t.LlavaProcessor(
            images,
            tokens,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    if family == "mistral3":
        images = t.PixtralImageProcessor(size={"longest_edge": 56}, patch_size=14)
        return t.PixtralProcessor(images, tokens, patch_size=14, spatial_merge_size=2)
    if family == "gemma3":
        images = t.Gemma3ImageProcessor(size={"height": 56, "width": 56})
        return t.Gemma3Processor(images, tokens, image_seq_length=4)
    bounds = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    if family == "qwen2.5 vl":
        images = t.Qwen2VLImageProcessor(size=bounds, patch_size=14)
        return t.Qwen2_5_VLProcessor(images, tokens, t.Qwen2VLVideoProcessor())
    images = t.Qwen2VLImageProcessor(size=bounds, patch_size=16)
    return t.Qwen3VLProcessor(images, tokens, t.Qwen3VLVideoProcessor())


def picture(seed: int) -> Any:
    """Return an image of 56 x 56 random pixels in blocks."""
    import numpy
    from PIL import Image

    blocks = numpy.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=numpy.uint8)
    return Image.fromarray(blocks.repeat(14, 0).repeat(14, 1))


def prompt(family: str, text: str = QUESTION) -> str:
    """Return a prompt with one image."""
    return f"{FAMILIES[family][4]}{text}"


def answer(
    model: Path | str,
    family: str,
    seeds: list[int],
    *,
    text: str = QUESTION,
    max_tokens: int = 8,
    **engine_args: Any,
) -> list[dict[str, Any]]:
    """What ``LLM(model, **engine_args)`` says of pictures: greedy ``tokens``, their ``nats``."""
    arguments = {
        "max_model_len": 512,
        "enforce_eager": True,
        "dtype": "float32",
        "gpu_memory_utilization": 0.2,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
    } | engine_args
    prompts = [(prompt(family, text), seed) for seed in seeds]
    request = str(model), prompts, max_tokens, arguments
    return in_child(_answer, *request, env=os.environ | SINGLE_PROCESS, timeout=600)


def _answer(
    model: str, prompts: list[tuple[str, int]], max_tokens: int, arguments: dict[str, Any]
) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams

    llm = LLM(model, **(kernel() | arguments))
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
    requests = [
        {"prompt": asked, "multi_modal_data": {"image": picture(seed)}} for asked, seed in prompts
    ]
    outputs = [llm.generate(one, sampling, use_tqdm=False)[0] for one in requests]
    llm.llm_engine.engine_core.shutdown()
    found = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        steps = zip(tokens, output.outputs[0].logprobs, strict=True)
        found.append(
            {
                "prompt": list(output.prompt_token_ids),
                "tokens": tokens,
                "nats": [-step[token].logprob for token, step in steps],
            }
        )
    return found
