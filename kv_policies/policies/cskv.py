# SPDX-License-Identifier: Apache-2.0
"""CSKV: low-rank latents of old tokens, full keys and values of recent ones."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from kv_policies.base import Capabilities, NoSettings


class CSKVSettings(NoSettings):
    """Settings of ``cskv``."""

    bases: Path | None = Field(
        None,
        description="low-rank bases of the model, a file made by `vllm-compress calibrate-kv`; it "
        "names its own ratio. Needed unless keep is 1",
    )
    bits: Literal[4, 16] = Field(
        16, description="per number of a latent; 4: a third of the memory, more is lost"
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
    of their layer and packed; generated tokens follow as they age: see ``latent_layout``. Attention
    rebuilds keys tile by tile and maps the weighted sum of value latents once: see
    ``latent_attention``.

    The paper's latents come from the hidden states. Ours come from the cached keys and values, with
    the same result: the optimum of its reconstruction loss is a projection of these (``low_rank``).

    Limits: the error is the same for every old token, whatever it says. Not under tensor
    parallelism: a latent is of all KV heads.
    """

    name: ClassVar[str] = "cskv"
    settings_type: ClassVar[type[NoSettings]] = CSKVSettings
    capabilities: ClassVar[Capabilities] = Capabilities(
        needs_queries=False,
        per_head=False,
        needs_profile=False,
        paper="https://arxiv.org/abs/2409.10593",
        content="latents",
    )

    def __init__(self, settings: CSKVSettings) -> None:
        self.settings: Any = settings
