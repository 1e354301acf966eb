# SPDX-License-Identifier: Apache-2.0
"""R-KV: what recent queries attend to, without what the cache says twice."""

from typing import ClassVar, Final

import torch
from pydantic import Field

from kv_policies.attention import attention_transient, pooled
from kv_policies.attention_policy import AttentionPolicy, AttentionSettings, decode_queries
from kv_policies.base import Capabilities, Context, NoSettings
from kv_policies.workspace import Heads, Transient

# Elements of one block of similarities, as many as a core's cache holds on a CPU.
_CPU_BLOCK: Final = 1 << 19
_BLOCK: Final = 1 << 22


class RKVSettings(AttentionSettings):
    """Settings of ``r_kv``."""

    window: int = Field(
        8, ge=1, description="last tokens that vote and always stay; larger: steadier votes"
    )
    pool: int = Field(
        7, ge=1, description="tokens of the max pooling of votes; larger: whole phrases stay"
    )
    importance: float = Field(
        0.1,
        ge=0,
        le=1,
        description="weight of votes; the rest is that of redundancy. Larger: less is dropped for "
        "being said again later",
    )
    threshold: float = Field(
        0.5,
        ge=0,
        le=1,
        description="cosine from which on two keys count as alike: of those like a key, the last "
        "is not held redundant for it",
    )
    decode_queries: int = decode_queries(8)


class RKV(AttentionPolicy):
    """Keeps tokens that recent queries attend to and whose keys are unlike the others.

    R-KV, Cai et al. 2025 (https://arxiv.org/abs/2505.24133), for long reasoning that repeats
    itself. The score is ``importance * attention - (1 - importance) * redundancy``, per KV head.
    Attention is that of the last ``window`` tokens to those before them, max-pooled. Redundancy is
    the softmax over tokens of the mean cosine with all keys. The last of the keys that are like a
    key is left out of that key's row, so the latest of several copies stays. The last ``window``
    tokens always stay.

    What differs: The attention of a group of query heads is their mean, where the published code
    takes the largest logit. It is divided by what the tokens before ``window`` receive in all,
    where that code takes the softmax over these tokens alone.

    Limits: Redundancy compares all pairs of keys: about half a second pass of attention for a long
    prompt. Keys are taken after RoPE, so that copies far apart are less alike.
    """

    name: ClassVar[str] = "r_kv"
    settings_type: ClassVar[type[NoSettings]] = RKVSettings
    capabilities: ClassVar[Capabilities] = Capabilities(
        needs=frozenset({"queries", "keys"}),
        per_head=True,
        needs_profile=False,
        paper="https://arxiv.org/abs/2505.24133",
        counts_sinks=True,
        caps_logits=True,
    )

    @property
    def queries(self) -> int:
        return int(self.settings.window)

    def score(self, context: Context) -> torch.Tensor:
        observed, keys = context.observed, context.keys
        assert observed is not None and keys is not None
        at = torch.arange(context.tokens, device=observed.device)
        recent = at - (context.lengths[:, None, None] - self.settings.window)
        votes = observed.masked_fill(recent >= 0, 0)
        votes = pooled(votes / votes.sum(-1, keepdim=True).clamp(min=1e-12), self.settings.pool)
        alike = redundancy(keys, context.lengths, self.settings.threshold)
        importance = self.settings.importance
        scores = importance * votes - (1 - importance) * alike
        return torch.where(recent >= 0, 2 + recent, scores)  # scores are at most 1

    def transient(self, heads: Heads) -> Transient:
        block = _CPU_BLOCK if heads.device == "cpu" else _BLOCK
        # Unit keys, and a score's few copies; a block of cosines, their mask and their places.
        pairs = Transient(4 * heads.size + 64, 16 * heads.size, 32 * block)
        # A block is a row of tokens at least.
        return attention_transient(heads) + pairs + Transient(per_token=32)


def redundancy(
    keys: torch.Tensor, lengths: torch.Tensor, threshold: float, block: int | None = None
) -> torch.Tensor:
    """How much of each key the others say too.

    Args:
        keys: [R, H, T, D], zero behind the end of a request.
        lengths: Valid tokens, int64 [R].
        threshold: Cosine above which keys are alike.
        block: Most cosines that are computed at a time, at least a row of tokens (R * H * T). None:
            what suits the device.

    Returns:
        float32 [R, H, T], a softmax over the tokens that are there; 0 behind them.
    """
    rows, heads, tokens, _ = keys.shape
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    transposed = unit.transpose(-1, -2)
    # The sum of all cosines of a key is one product, that with itself taken off.
    total = (unit @ unit.sum(2, keepdim=True).transpose(-1, -2)).squeeze(-1)
    total -= unit.square().sum(-1)
    if block is None:
        block = _CPU_BLOCK if keys.device.type == "cpu" else _BLOCK
    step = max(1, block // max(1, rows * heads * tokens))
    # A place is a whole number, exact in float32 up to 16 M tokens.
    places = torch.arange(1, tokens + 1, device=keys.device, dtype=torch.float32)
    for start in range(0, tokens, step):
        cosines = unit[:, :, start : start + step] @ transposed
        at = torch.arange(start, start + cosines.shape[2], device=keys.device)
        cosines.scatter_(-1, at.view(-1, 1).expand(*cosines.shape[:2], -1, 1), -1)
        last = ((cosines > threshold) * places).amax(-1).long() - 1  # -1: no key is like it
        found = cosines.gather(-1, last.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        total.scatter_add_(-1, last.clamp(min=0), torch.where(last >= 0, -found, 0))
    mean = total / lengths.clamp(min=1)[:, None, None]
    hidden = torch.arange(tokens, device=keys.device) >= lengths[:, None, None]
    return mean.masked_fill_(hidden, -torch.inf).softmax(-1)
