# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's attention backends compressed layers run over on CUDA, told without a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import AttentionConfig, VllmConfig
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import get_attn_spec_kind

from compress_common.errors import CompressError
from tests.vllm_plugin.kv_cache.test_refusals import configure
from vllm_plugin.kv_cache.backends import CHOICES, choose_backend, chosen, put_behind_custom

FLASH, TRITON = CHOICES
AMPERE, HOPPER, BLACKWELL = (DeviceCapability(*at) for at in ((8, 0), (9, 0), (10, 0)))
TURING = DeviceCapability(7, 5)  # FlashAttention does not run there


@pytest.fixture(scope="module")
def configured(demo_model: Path) -> VllmConfig:
    """An engine's config; tests set its ``attention_config``."""
    return configure(demo_model)


def choice(config: VllmConfig, device: DeviceCapability, **attention: Any) -> AttentionBackendEnum:
    config.attention_config = AttentionConfig(**attention)
    return chosen(config, device)


def test_choice_is_vllms_where_the_user_names_none(configured: VllmConfig) -> None:
    """Except on Blackwell, where vLLM would take FLASHINFER."""
    choices = [choice(configured, device) for device in (TURING, AMPERE, HOPPER, BLACKWELL)]
    assert choices == [TRITON, FLASH, FLASH, FLASH]
    model = configured.model_config
    before, model.dtype = model.dtype, torch.float32  # which FlashAttention does not take
    assert choice(configured, HOPPER) is TRITON
    model.dtype = before


def test_named_backend_is_honored(configured: VllmConfig) -> None:
    for named in CHOICES:
        assert choice(configured, HOPPER, backend=named) is named
        both = {"backend": FLASH, "backend_per_kind": {"full_attention": named.name}}
        assert choice(configured, HOPPER, **both) is named


def test_other_backends_are_refused(configured: VllmConfig) -> None:
    with pytest.raises(CompressError, match="FLASHINFER: .* over FLASH_ATTN or TRITON_ATTN; name"):
        choice(configured, HOPPER, backend="FLASHINFER")
    with pytest.raises(CompressError, match=r"FLASH_ATTN: compute capability not supported\); rem"):
        choice(configured, TURING, backend=FLASH)


def test_only_full_attention_is_ours(configured: VllmConfig) -> None:
    """Sliding windows keep what vLLM chooses, and FLASH_ATTN stays vLLM's own by its name."""
    for backend, ours in CHOICES.items():
        configured.attention_config = AttentionConfig(
            backend_per_kind={"full_attention": backend.name, "sliding_window": "TRITON_ATTN"}
        )
        assert put_behind_custom(configured) == ours
        assert put_behind_custom(configured) == ours  # also in a second worker
        per_kind = configured.attention_config.backend_per_kind
        found = [
            per_kind[get_attn_spec_kind(False, window, "decoder").value].get_class()
            for window in (False, True)
        ]
        assert [f"{kind.__module__}.{kind.__name__}" for kind in found] == [ours, TRITON.value]
        assert backend.get_class().__module__.startswith("vllm.")
    AttentionBackendEnum.CUSTOM.clear_override()


def test_a_cpu_has_one(configured: VllmConfig) -> None:
    configured.attention_config = AttentionConfig(backend="CPU_ATTN")
    choose_backend(configured)
    configured.attention_config = AttentionConfig(backend=FLASH)
    with pytest.raises(CompressError, match="FLASH_ATTN: on a CPU there is only CPU_ATTN"):
        choose_backend(configured)
