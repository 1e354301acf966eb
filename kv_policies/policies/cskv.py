# SPDX-License-Identifier: Apache-2.0
"""CSKV: low-rank latents of old tokens, full keys and values of recent ones."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from kv_policies.base import Capabilities, NoSettings
from kv_policies.latents.format import Bits, LatentFormat


class CSKVSettings(NoSettings):
    """Settings of ``cskv``."""

    bases: Path | None = Field(
        None,
        description="low-rank bases of the model, a file made by `vllm-compress calibrate-kv`; it "
        "names its own ratio and bits. Needed unless keep is 1",
    )
    bits: Bits | None = Field(
        None,
        description="of a number of a latent, 4 or 16. The bases are made for some, and are "
        "refused where this is given and differs",
    )
    recent: int = Field(
        32,
        ge=0,
        description="last tokens that stay as they are, rounded up to whole blocks; larger: less "
        "is lost, more memory per request",
    )


class CSKV:
    """Keeps every token, as a latent of fewer numbers than its keys and values.

    CSKV, Wang et al. 2024 (https://arxiv.org/abs/2409.10593). Prefill is untouched; when a prompt
    ends, the keys before RoPE and the values of all but its last tokens are projected on the bases
    of their layer and packed; generated tokens follow as they age: see ``layout.latents``.
    Attention rebuilds keys tile by tile and maps the weighted sum of value latents once: see
    ``latents.attention``.

    The paper computes latents from the hidden states. Here they come from the cached keys and
    values, with the same result: the optimum of its reconstruction loss is a projection of these
    (see ``latents.low_rank``).

    Limits: The error is the same for every old token, whatever it says. Under tensor parallelism a
    latent is of the KV heads of one rank, so bases are made for a number of ranks, and more ranks
    lose more in the same bytes.
    """

    name: ClassVar[str] = "cskv"
    settings_type: ClassVar[type[NoSettings]] = CSKVSettings
    capabilities: ClassVar[Capabilities] = Capabilities(
        needs=frozenset({"keys", "values"}),
        per_head=False,
        needs_profile=False,
        paper="https://arxiv.org/abs/2409.10593",
        content="latents",
    )

    def __init__(self, settings: CSKVSettings) -> None:
        self.settings: Any = settings

    @property
    def recent(self) -> int:
        return int(self.settings.recent)

    def most_tokens(self, elements: int, key_rank: int, value_rank: int, bits: Bits) -> int:
        return LatentFormat.most_tokens(elements, key_rank, value_rank, bits)

    def form(self, key_rank: int, value_rank: int, bits: Bits, tokens: int) -> LatentFormat:
        return LatentFormat(key_rank, value_rank, bits, tokens)
