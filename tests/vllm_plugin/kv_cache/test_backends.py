# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's attention backends compressed layers run over on CUDA, told without a GPU."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import (
    AttentionConfig,
    CompilationConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.model_executor.layers.attention import attention
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention import selector
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
from vllm.v1.attention.selector import AttentionSelectorConfig, get_attn_spec_kind

from compress_common.errors import CompressError
from tests.vllm_plugin.kv_cache.test_refusals import configure
from vllm_plugin.kv_cache.backends import (
    CHOICES,
    choose_backend,
    chosen,
    put_behind_custom,
    selector_config,
)
from vllm_plugin.kv_cache.flash import FlashImpl
from vllm_plugin.kv_cache.triton import TritonImpl

FLASH, TRITON = CHOICES
AMPERE, ADA, HOPPER = (DeviceCapability(*at) for at in ((8, 0), (8, 9), (9, 0)))
BLACKWELL = [DeviceCapability(*at) for at in ((10, 0), (10, 3), (12, 0))]
TURING = DeviceCapability(7, 5)  # FlashAttention does not run there


@pytest.fixture(scope="module")
def configured(demo_model: Path) -> VllmConfig:
    """An engine's config; tests set its ``attention_config``."""
    return configure(demo_model)


def choice(config: VllmConfig, device: DeviceCapability, **attention: Any) -> AttentionBackendEnum:
    config.attention_config = AttentionConfig(**attention)
    return chosen(config, device)


def test_choice_is_vllms_where_the_user_names_none(configured: VllmConfig) -> None:
    """Except on Blackwell's 10.x, where vLLM would take FLASHINFER."""
    devices = (TURING, AMPERE, ADA, HOPPER, *BLACKWELL)
    assert [choice(configured, device) for device in devices] == [TRITON, *[FLASH] * 6]
    model = configured.model_config
    before, model.dtype = model.dtype, torch.float32  # which FlashAttention does not take
    assert choice(configured, HOPPER) is TRITON
    model.dtype = before


@pytest.mark.parametrize(
    ("ours", "vllms"), [(FlashImpl, FlashAttentionImpl), (TritonImpl, TritonAttentionImpl)]
)
def test_pieces_of_a_graph_hold_nothing_of_ours(ours: type, vllms: type) -> None:
    """Inductor's partition and breakable graphs capture the update of the cache, which is vLLM's
    own, and break at attention, where ours is."""
    assert ours.do_kv_cache_update is vllms.do_kv_cache_update  # type: ignore[attr-defined]
    assert "vllm::unified_attention_with_output" in CompilationConfig._attention_ops
    begun, _, _ = inspect.getsource(attention).partition("\ndef unified_attention_with_output(")
    assert "@eager_break_during_capture" in begun.splitlines()[-2:]


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


def test_vllm_is_asked_what_it_asks_itself(
    configured: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field that vLLM fills from the config, at values that are not the defaults."""
    model, parallel = configured.model_config, configured.parallel_config
    monkeypatch.setattr(configured, "attention_config", AttentionConfig(use_non_causal=True))
    monkeypatch.setattr(model.model_arch_config, "rswa_window", 64)
    monkeypatch.setattr(parallel, "decode_context_parallel_size", 2)
    monkeypatch.setattr(parallel, "prefill_context_parallel_size", 2)
    monkeypatch.setattr(configured.cache_config, "user_specified_block_size", True)
    drafts = SimpleNamespace(enable_adaptive_verification=True)
    monkeypatch.setattr(configured, "speculative_config", drafts)
    asked: list[AttentionSelectorConfig] = []
    monkeypatch.setattr(
        selector,
        "_cached_get_attn_backend",
        lambda *, attn_selector_config, **_: asked.append(attn_selector_config),
    )
    dtype = configured.cache_config.cache_dtype
    with set_current_vllm_config(configured):
        selector.get_attn_backend(model.get_head_size(), model.dtype, dtype)
    assert [selector_config(configured)] == asked
    assert asked[0].use_non_causal and asked[0].use_rswa and asked[0].use_kv_connector


def test_custom_is_reserved(configured: VllmConfig) -> None:
    """One class stands behind it in a process. It would be another's, or other layers get ours."""
    custom = AttentionBackendEnum.CUSTOM
    register_backend(custom, "elsewhere.Backend")
    try:
        with pytest.raises(CompressError, match=r"CUSTOM is elsewhere.Backend in this process"):
            choice(configured, HOPPER)
        configured.attention_config = AttentionConfig(backend_per_kind={"full_attention": FLASH})
        with pytest.raises(CompressError, match=r"CUSTOM is elsewhere.Backend in this process"):
            put_behind_custom(configured)
        assert custom.get_path() == "elsewhere.Backend"
        register_backend(custom, CHOICES[TRITON])  # an engine before this one
        assert choice(configured, HOPPER) is FLASH
        for named in (
            {"backend": "CUSTOM"},
            {"backend_per_kind": {"sliding_window": "CUSTOM"}},
            {"backend": "CUSTOM", "backend_per_kind": {"full_attention": "FLASH_ATTN"}},
        ):
            with pytest.raises(CompressError, match="CUSTOM: that name is reserved"):
                choice(configured, HOPPER, **named)
    finally:
        custom.clear_override()


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
