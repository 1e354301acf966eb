# SPDX-License-Identifier: Apache-2.0
"""LLaDA in plain torch, to compare the served model with and to train a small one."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaDA model, with the names of the published ``config.json``."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_hidden_size: int
    vocab_size: int
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5

    @property
    def head_size(self) -> int:
        return self.d_model // self.n_heads


class Block(nn.Module):
    """One layer. Its parameters have their published names."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, kv_width = shape.d_model, shape.n_kv_heads * shape.head_size
        self.attn_norm = nn.RMSNorm(width, shape.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = nn.RMSNorm(width, shape.rms_norm_eps)
        self.ff_proj = nn.Linear(width, shape.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(width, shape.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(shape.mlp_hidden_size, width, bias=False)

    def attention_inputs(
        self, x: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries [B, Hq, T, D], keys and values [B, Hkv, T, D].

        Queries and keys are rotated.

        Args:
            x: Inputs of the layer, [B, T, d_model].
            positions: int64 [T].
        """
        normed = self.attn_norm(x)
        size = self.shape.head_size
        q, k, v = (
            proj(normed).unflatten(-1, (-1, size)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self._rotated(q, positions), self._rotated(k, positions), v

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Return the output of the layer, [B, T, d_model].

        Args:
            x: Input of the layer, [B, T, d_model].
            attended: Output of the attention, [B, Hq, T, D].
        """
        x = x + self.attn_out(attended.transpose(1, 2).flatten(2))
        normed = self.ff_norm(x)
        return x + self.ff_out(silu(self.ff_proj(normed)) * self.up_proj(normed))

    def _rotated(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        half = self.shape.head_size // 2
        steps = torch.arange(half, dtype=torch.float32, device=x.device) / half
        angles = positions[:, None].float() * self.shape.rope_theta**-steps
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        left, right = x.split(half, -1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


class DenseLLaDA(nn.Module):
    """The whole model. Keys of its ``state_dict`` are the published names without ``model.``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(shape.vocab_size, shape.d_model),
                "blocks": nn.ModuleList(Block(shape) for _ in range(shape.n_layers)),
                "ln_f": nn.RMSNorm(shape.d_model, shape.rms_norm_eps),
                "ff_out": nn.Linear(shape.d_model, shape.vocab_size, bias=False),
            }
        )

    @property
    def blocks(self) -> list[Block]:
        """The layers in order."""
        return list(self.transformer["blocks"])

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [B, T, d_model] of tokens int64 [B, T]."""
        return self.transformer["wte"](tokens)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [B, T, vocab_size] of the last layer's output [B, T, d_model]."""
        return self.transformer["ff_out"](self.transformer["ln_f"](x))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits [B, N, vocab_size] of tokens int64 [B, N], attending in both directions."""
        x, positions = self.embed(tokens), torch.arange(tokens.shape[1], device=tokens.device)
        for block in self.blocks:
            q, k, v = block.attention_inputs(x, positions)
            x = block.finish(x, scaled_dot_product_attention(q, k, v, enable_gqa=True))
        return self.logits(x)
