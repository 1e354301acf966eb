# SPDX-License-Identifier: Apache-2.0
"""From settings to layouts, with policies of somebody else's."""

import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from transformers import AutoConfig

from compress_common.errors import CompressError
from kv_policies.base import LatentPolicy
from kv_policies.latents.format import Bits, LatentFormat
from kv_policies.layout.latents import LatentLayout
from kv_policies.policies.cskv import CSKV
from kv_policies.registry import KV_POLICIES
from tests.compress_common.test_registry import Entry
from tests.vllm_plugin.kv_cache.conftest import save_bases, save_profile
from vllm_plugin.kv_cache.budget import layouts_of
from vllm_plugin.settings import KVSettings


class Coarse(CSKV):
    """Stores fewer latents in a block than cskv, and keeps more tokens raw."""

    name = "coarse"

    @property
    def recent(self) -> int:
        return 64

    def most_tokens(self, elements: int, key_rank: int, value_rank: int, bits: Bits) -> int:
        return super().most_tokens(elements, key_rank, value_rank, bits) // 64 * 32

    def form(self, key_rank: int, value_rank: int, bits: Bits, tokens: int) -> LatentFormat:
        return LatentFormat(key_rank, value_rank, 16, tokens)


def test_a_profile_scales_a_budget(demo_model: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(demo_model)
    file = save_profile(demo_model, tmp_path / "kv.json", Fraction(1, 4), 3)
    given = {"policy": "prefix_kv", "profile": str(file), "decode_window": 256}
    made = [
        layouts_of(KVSettings(**given, budget=budget), 32, str(demo_model), config)  # type: ignore[arg-type]
        for budget in (2048, 1024)
    ]
    budgets = [[layout.budget for layout in of.values()] for of in made]  # type: ignore[attr-defined]
    assert len(set(budgets[0])) == 3 and min(budgets[0]) < 2048 < max(budgets[0])
    assert sum(budgets[0]) / len(budgets[0]) == pytest.approx(2048, rel=0.02)
    assert sum(budgets[1]) / len(budgets[1]) == pytest.approx(1024, rel=0.04)
    with pytest.raises(CompressError, match="in the layer with the least") as caught:
        layouts_of(KVSettings(**given, budget=600), 32, str(demo_model), config)  # type: ignore[arg-type]
    raised = int(re.findall(r"budget to (\d+)", str(caught.value))[0])
    layouts_of(KVSettings(**given, budget=raised), 32, str(demo_model), config)  # type: ignore[arg-type]


def test_a_second_latent_policy_needs_its_file_only(
    demo_model: Path, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress_common.registry.entry_points", lambda group: [Entry(Coarse)])
    registry = replace(KV_POLICIES)
    for module in ("kv_policies.registry", "vllm_plugin.settings"):
        monkeypatch.setattr(f"{module}.KV_POLICIES", registry)
    config = AutoConfig.from_pretrained(demo_model)
    made = {
        name: layouts_of(
            KVSettings(policy=name, bases=str(bases)),
            32,
            str(demo_model),
            config,  # type: ignore[call-arg]
        )
        for name in ("cskv", "coarse")
    }
    assert isinstance(KVSettings(policy="coarse", keep=1).build(), LatentPolicy)
    for layer, layout in made["cskv"].items():
        other = made["coarse"][layer]
        assert isinstance(layout, LatentLayout) and isinstance(other, LatentLayout)
        assert (layout.recent, other.recent) == (32, 64)
        assert other.tokens == layout.tokens // 64 * 32


def test_layers_of_one_level_share_a_layout_whatever_their_ranks(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Keys take more bytes than values in 4 bits, and larger blocks are filled more finely."""
    model = tiny_model("llama", num_hidden_layers=6)
    # 224, 192 and 160 tokens in a block of 32, by one number more or less.
    totals = (56, 57, 66, 67, 80, 81)
    file = save_bases(model, tmp_path / "kv.safetensors", Fraction(83, 100), totals, bits=4)
    config = AutoConfig.from_pretrained(model)
    kv = KVSettings(policy="cskv", bases=str(file))  # type: ignore[call-arg]
    for block_size, levels in ((32, 3), (256, 3), (1024, 3)):
        made = layouts_of(kv, block_size, str(model), config)
        tokens = [layout.tokens for layout in made.values() if isinstance(layout, LatentLayout)]
        assert len(set(tokens)) == levels and tokens[0] == tokens[1] > tokens[2] == tokens[3]
        for total, per_block in zip(totals, tokens, strict=True):
            form = LatentFormat(total // 2, -(-total // 2), 4, per_block)
            assert form.bytes(2) <= block_size * 2 * 64 * 2
