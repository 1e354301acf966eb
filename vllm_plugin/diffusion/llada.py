# SPDX-License-Identifier: Apache-2.0
"""LLaDA (https://arxiv.org/abs/2502.09992) from vLLM's layers: Llama without a causal mask.

Attention is not causal because the metadata, which the worker builds, says so.
"""

import re
from collections.abc import Callable, Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.llama import LlamaAttention, LlamaMLP
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from vllm_plugin.diffusion.hidden_cache import HiddenCache
from vllm_plugin.diffusion.step import DenoiseStep
from vllm_plugin.diffusion.support import policy_of

See = Callable[[torch.Tensor, torch.Tensor], None]


class LLaDAAttention(LlamaAttention):
    """Attention that shows queries and keys to an observer before it attends."""

    def queries(self, positions: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """Return rotated queries, [T, Hq * D]."""
        q, k, _ = self._projected(normed)
        return self.rotary_emb(positions, q, k)[0]

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, see: See | None = None
    ) -> torch.Tensor:
        q, k, v = self._projected(hidden_states)
        q, k = self.rotary_emb(positions, q, k)
        if see is not None:
            see(q, k)
        return self.o_proj(self.attn(q, k, v))[0]

    def _projected(self, normed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        qkv, _ = self.qkv_proj(normed)
        return qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)


class LLaDALayer(nn.Module):
    """One layer. ``inputs`` caches its inputs if the policy needs them."""

    def __init__(self, vllm_config: VllmConfig, prefix: str, keep_inputs: bool) -> None:
        super().__init__()
        config, quant = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.self_attn = LLaDAAttention(
            config,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.max_position_embeddings,
            quant,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.self_attn",
        )
        self.mlp = LlamaMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.inputs = (
            HiddenCache(vllm_config, config.hidden_size, f"{prefix}.inputs")
            if keep_inputs
            else None
        )

    def forward(self, positions: torch.Tensor, x: torch.Tensor, see: See | None) -> torch.Tensor:
        x = x + self.self_attn(positions, self.input_layernorm(x), see)
        return x + self.mlp(self.post_attention_layernorm(x))

    def old_queries(self, positions: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Return queries of positions from the inputs they had when they were last computed."""
        assert self.inputs is not None
        old = self.inputs.read(slots)
        return self.self_attn.queries(positions, self.input_layernorm(old))


class LLaDAModel(nn.Module):
    """Embedding and layers. The number of rows can grow from one layer to the next."""

    def __init__(self, vllm_config: VllmConfig, prefix: str, keep_inputs: bool) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config
        )
        self.layers = nn.ModuleList(
            LLaDALayer(vllm_config, f"{prefix}.layers.{index}", keep_inputs)
            for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, step: DenoiseStep | None
    ) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        stages = {stage.first: stage for stage in step.stages} if step is not None else {}
        observer = step.observer if step is not None else None
        slots = stages[0].slots if stages else None
        for index, layer in enumerate(self.layers):
            see = None
            if observer is not None:
                tracked = observer.tracked
                past = layer.old_queries(*tracked) if len(tracked[0]) else None

                def see(q, k, index=index, past=past):  # type: ignore[no-untyped-def]
                    observer.see(index, q, k, past)

            if layer.inputs is not None and slots is not None:
                layer.inputs.write(slots, x)
                if index and index in stages:
                    positions, slots = stages[index].positions, stages[index].slots
                    x = layer.inputs.read(slots)
            x = layer(positions, x, see)
        return self.norm(x)


class LLaDAModelLM(nn.Module):
    """LLaDA-8B, LLaDA-1.5 and smaller models, loaded by the published names of their weights."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_regex={
            re.compile(r"^model\.transformer\.ff_out\."): "lm_head.",
            re.compile(r"^model\.transformer\.wte\."): "model.embed_tokens.",
            re.compile(r"^model\.transformer\.ln_f\."): "model.norm.",
            re.compile(r"^model\.transformer\.blocks\."): "model.layers.",
            re.compile(r"\.attn_norm\."): ".input_layernorm.",
            re.compile(r"\.ff_norm\."): ".post_attention_layernorm.",
            re.compile(r"\.([qkv])_proj\."): r".self_attn.\1_proj.",
            re.compile(r"\.attn_out\."): ".self_attn.o_proj.",
            re.compile(r"\.ff_proj\."): ".mlp.gate_proj.",
            re.compile(r"\.up_proj\."): ".mlp.up_proj.",
            re.compile(r"\.ff_out\."): ".mlp.down_proj.",
        },
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        },
    )
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.model = LLaDAModel(
            vllm_config, maybe_prefix(prefix, "model"), bool(policy_of(vllm_config).tracks)
        )
        self.lm_head = ParallelLMHead(
            self.config.vocab_size,
            self.config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
        step: DenoiseStep | None = None,
    ) -> torch.Tensor:
        """Return hidden states of the rows that the last layer computed, [T, hidden_size]."""
        return self.model(input_ids, positions, step)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
