# SPDX-License-Identifier: Apache-2.0
"""Capacity arithmetic against vLLM's own grouping and against files that were really written."""

import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    Qwen3_5TextConfig,
)
from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from compress_common.calibration.text import CalibrationSettings
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.local import local_folder
from compress_common.errors import CompressError
from kv_policies.layout.base import Layout
from kv_policies.layout.bounded import BoundedLayout
from kv_policies.layout.latents import LatentLayout
from kv_policies.layout.tokens import TokenLayout
from quant_methods.formats.sizes import predicts_further
from quant_methods.formats.writing import quantize_checkpoint
from quant_methods.plan_request import PlanRequest
from tests.support.grouping import (
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
    projected,
)
from tests.vllm_plugin.test_page_sizes import LARGE
from vllm_plugin.capacity.blocks import (
    Group,
    block_bytes,
    groups_of,
    request_blocks,
    requests_in_pool,
    typical_prompt,
)
from vllm_plugin.capacity.footprint import kv_footprint, layer_token_bytes, weight_footprint
from vllm_plugin.kv_cache.spec import CompressedSpec
from vllm_plugin.kv_cache.windows import WindowSpec
from vllm_plugin.kv_fingerprint import full_attention_layers, layer_configs, state_layers
from vllm_plugin.metrics.connector import block_bytes_of
from vllm_plugin.page_sizes import block_sizes
from vllm_plugin.settings import WeightSettings

BLOCK = 32
SMALL = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}

ONE_HEAD = SMALL | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}


@pytest.mark.parametrize(
    ("config", "shares"),
    [
        (LlamaConfig(num_hidden_layers=30, **SMALL), None),
        (LlamaConfig(num_hidden_layers=30, **SMALL), (Fraction(1, 4),)),
        (LlamaConfig(num_hidden_layers=30, **SMALL), (Fraction(1, 8), Fraction(3, 8))),
        (LlamaConfig(num_hidden_layers=26, **SMALL), tuple(Fraction(n, 9) for n in (1, 2, 3))),
        (Gemma3TextConfig(num_hidden_layers=26, sliding_window=512, **SMALL), None),
        (Gemma3TextConfig(num_hidden_layers=26, sliding_window=512, **SMALL), (Fraction(1, 4),)),
        (Qwen3_5TextConfig(num_hidden_layers=24, **SMALL), None),
        (Qwen3_5TextConfig(num_hidden_layers=24, **SMALL), (Fraction(1, 8), Fraction(3, 8))),
        (Gemma4TextConfig(num_hidden_layers=24, global_head_dim=64, **SMALL), (Fraction(1, 4),)),
        (Gemma4TextConfig(num_hidden_layers=24, global_head_dim=32, **ONE_HEAD), (Fraction(1, 4),)),
    ],
    ids=[
        *("stock", "one level", "two levels", "padded levels", "sliding", "sliding and compressed"),
        *("states", "states and two levels", "larger heads", "fewer heads"),
    ],
)
def test_groups_and_block_bytes_are_those_of_vllm(
    config: LlamaConfig, shares: tuple[Fraction, ...] | None
) -> None:
    full = full_attention_layers(config)
    full_size, window_size = block_sizes(config, BLOCK)
    layouts = shares and {
        layer: TokenLayout(full_size, shares[at * len(shares) // len(full)])
        for at, layer in enumerate(full)
    }
    specs: dict[str, KVCacheSpec] = {}
    for layer, one in enumerate(layer_configs(config)):
        shape = {"num_kv_heads": one.num_key_value_heads, "head_size": one.head_dim}
        shape |= {"block_size": BLOCK, "dtype": torch.bfloat16}
        spec = FullAttentionSpec(**shape)
        if layer in state_layers(config):
            size = {"shapes": ((64,),), "dtypes": (torch.float32,), "block_size": BLOCK}
            state = MambaSpec(**size, page_size_padded=spec.page_size_bytes)
            specs[f"layers.{layer}.state"] = state
        elif layer not in full:
            spec = SlidingWindowSpec(**shape, sliding_window=512)
            if layouts:
                spec = WindowSpec.of(spec, tuple(layouts.values()), window_size)
        if layer in full and layouts:
            spec = CompressedSpec.of(spec, layouts[layer])
        if layer in full or layer not in state_layers(config):
            specs[f"layers.{layer}"] = spec
    theirs_config = VllmConfig()
    theirs_config.cache_config.kv_cache_layout = "LBHNC"
    pages = {spec.page_size_bytes for spec in specs.values()}
    assert len(pages) == 1, "vLLM would change the size of blocks"
    theirs = get_kv_cache_groups(theirs_config, specs)
    ours = groups_of(config, layouts)
    members = [{int(name.split(".")[1]) for name in group.layer_names} for group in theirs]
    assert sorted(map(sorted, members)) == sorted(sorted(group.members) for group in ours)
    memory, each = 1 << 28, layer_token_bytes(config, torch.bfloat16)
    for count in (1, 2, 3):
        depth = config.num_hidden_layers
        stages = [range(*get_pp_indices(depth, at, count)) for at in range(count)]
        assert [layer for stage in stages for layer in stage] == list(range(depth))
        blocks = []
        for stage in stages:  # vLLM gives all stages as many blocks as the one with the fewest
            here = {name: x for name, x in specs.items() if int(name.split(".")[1]) in stage}
            there = projected(theirs, here)
            found = get_kv_cache_config_from_groups(theirs_config, there, memory)
            blocks.append(found.num_blocks)
        assert memory // block_bytes(ours, BLOCK, each, stages) == min(blocks)
        if count == 1:
            assert block_bytes(ours, BLOCK, each) == block_bytes(ours, BLOCK, each, stages)
            # What metrics count freed blocks in, however many groups there are.
            assert block_bytes_of(found) == block_bytes(ours, BLOCK, each)


@pytest.mark.parametrize(
    "layout",
    [
        TokenLayout(BLOCK, Fraction(1, 4), window=128),
        LatentLayout(BLOCK, 5 * BLOCK, BLOCK, window=BLOCK, recent=BLOCK),
    ],
)
def test_blocks_of_a_request_follow_the_layout(layout: Layout) -> None:
    """Against the columns that are not freed, token by token."""
    config = LlamaConfig(num_hidden_layers=4, **SMALL)
    groups = groups_of(config, dict.fromkeys(range(4), layout))
    for prompt, context in ((1000, 1001), (1000, 1500), (1024, 1152), (1024, 2000), (5, 900)):
        held = [
            -(-tokens // BLOCK) - sum(b - a for a, b in layout.freed(prompt, tokens - 1))
            for tokens in range(prompt + 1, context + 1)
        ]
        found = request_blocks(groups, BLOCK, context, prompt)
        assert found.decoding == max(held)
        assert found.peak == max(*held, -(-prompt // BLOCK))
    stock = request_blocks(groups_of(config, None), BLOCK, 2000, 1024)
    assert stock.peak == stock.decoding == 63
    assert stock.all_decoding(127) == 2  # 126 blocks are usable, vLLM keeps one back
    assert stock.all_decoding(126) == 1
    assert stock.one_in_prefill(0) == stock.all_decoding(0) == 0
    with pytest.raises(CompressError, match="does not fit"):
        request_blocks(groups, BLOCK, 100, 100)


def test_a_prompt_takes_the_blocks_that_an_engine_reserves() -> None:
    """With two steps in flight, in layers with a prompt window, and with a sliding window."""
    prompt, in_flight = 8000, 2 * 512
    layout = BoundedLayout(BLOCK, 256, 64, prompt_window=320)
    shape = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16}
    spec = CompressedSpec.of(FullAttentionSpec(**shape), layout, prompt, in_flight)
    window = SlidingWindowSpec(**shape, sliding_window=512)
    theirs = window.max_admission_blocks_per_request(in_flight, prompt)
    for group, blocks in (
        (Group((0,), layout), spec.most_blocks),
        (Group((0,), None, 512), theirs),
    ):
        found = request_blocks([group], BLOCK, prompt + 1, prompt, in_flight=in_flight)
        assert found.peak == blocks


@pytest.mark.parametrize(("ranks", "full", "window"), [(1, 2, 1), (8, 1, 1), (16, 1, 2)])
def test_groups_have_the_blocks_of_a_rank(ranks: int, full: int, window: int) -> None:
    """Gemma 4 31B: a rank of 16 has one head of 512 numbers, or one of 256."""
    config = Gemma4TextConfig(**LARGE)
    groups = groups_of(config, None, ranks)
    assert {(group.window is None, group.scale) for group in groups} == {
        (True, full),
        (False, window),
    }
    fit = request_blocks(groups, BLOCK, 4096, 3584).all_decoding(2000)
    assert requests_in_pool(config, {}, BLOCK, 2000, 4096, ranks=ranks) == (fit, fit)


def test_a_typical_prompt_leaves_room_for_an_answer() -> None:
    assert [typical_prompt(context) for context in (1, 2, 7, 8, 2000)] == [1, 1, 6, 7, 1750]


def test_pool_in_smaller_blocks_holds_as_much_without_compression() -> None:
    """Two levels have blocks of half as many layers: twice as many of them in the same memory."""
    config = LlamaConfig(num_hidden_layers=4, **SMALL)
    layouts = {layer: TokenLayout(BLOCK, Fraction(1, 8 if layer < 2 else 2)) for layer in range(4)}
    before, after = requests_in_pool(config, layouts, BLOCK, 2000, 4096)
    assert before == (1000 - 1) // 128
    # 3,584 tokens of prompt in 112 blocks, of which 14 and 56 stay; 16 for the answer.
    assert after == (2000 - 1) // (14 + 16 + 56 + 16)


def test_other_attention_is_refused() -> None:
    config = LlamaConfig(num_hidden_layers=2, **SMALL)
    config.layer_types = ["linear_attention", "full_attention"]
    config.kv_lora_rank = 512
    with pytest.raises(CompressError, match="(?s)linear_attention.*latent attention"):
        layer_token_bytes(config, torch.bfloat16)


def test_kv_bytes_leave_sliding_windows_out() -> None:
    config = Gemma3TextConfig(num_hidden_layers=12, sliding_window=64, **SMALL)
    layers = full_attention_layers(config)
    assert len(layers) == 2
    layouts = {
        layers[0]: TokenLayout(BLOCK, Fraction(1, 2)),
        layers[1]: TokenLayout(BLOCK, Fraction(1, 4)),
    }
    found = kv_footprint(config, torch.bfloat16, "auto", layouts)
    assert (found.original, found.compressed) == (2 * 256, 192)
    assert kv_footprint(config, torch.bfloat16, "fp8", None).original == 256
    with pytest.raises(CompressError, match="nvfp4 is not one of"):
        kv_footprint(config, torch.bfloat16, "nvfp4", None)


@pytest.mark.parametrize("format_name", ["compressed-tensors", "awq"])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_weight_bytes_are_those_of_the_files(
    tiny_model: Callable[..., Path], tmp_path: Path, arch: str, format_name: str
) -> None:
    """Planned from the 16-bit model, read from the written one, and the tensors themselves."""
    source = tiny_model(arch)
    planned = weight_footprint(source, "rtn", WeightSettings())
    assert planned is not None
    tensors = sum(size for _, size in Checkpoint(source).shapes().values())
    assert planned.original == tensors
    request = PlanRequest(method="rtn", calibration=CalibrationSettings())
    quantize_checkpoint(source, tmp_path / "int4", request, format_name=format_name)
    written = weight_footprint(tmp_path / "int4", None)
    assert written is not None and written.original == tensors
    files = sum(size for _, size in Checkpoint(tmp_path / "int4").shapes().values())
    if format_name == "compressed-tensors":
        assert written.compressed == planned.compressed == files
    else:  # no weight_shape
        assert written.compressed == pytest.approx(files, rel=0.001)


def test_a_second_copy_of_a_tied_embedding_is_not_counted(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_model("llama")
    shutil.copy(source / "config.json", tmp_path)
    tensors = dict(Checkpoint(source).tensors(Checkpoint(source).files))
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    assert weight_footprint(tmp_path, "rtn") == weight_footprint(source, "rtn")


@pytest.mark.parametrize("place", ["model.layers.2.eh_proj", "model.mtp.layers.0.fc", "mtp.fc"])
def test_layers_that_predict_further_tokens_are_not_counted(
    tiny_model: Callable[..., Path], tmp_path: Path, place: str
) -> None:
    """vLLM leaves them out when it loads the model: they are a draft model's."""
    source = tiny_model("llama")
    shutil.copy(source / "config.json", tmp_path)
    tensors = dict(Checkpoint(source).tensors())
    more = {f"{place}.weight": torch.zeros(128, 128, dtype=torch.bfloat16)}
    save_file(tensors | more, tmp_path / "model.safetensors")
    for method in (None, "rtn"):
        assert weight_footprint(tmp_path, method) == weight_footprint(source, method)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "visual.encoder.layers.30.fc.weight", "mtps.x"]
)
def test_other_tensors_are_counted(name: str) -> None:
    assert not predicts_further(name, 2)
    assert not predicts_further("model.layers.2.mlp.up_proj.weight", None)


def test_what_is_not_known_is_none(tiny_model: Callable[..., Path]) -> None:
    assert local_folder("nobody/has-this-model") is None
    assert weight_footprint("nobody/has-this-model", None) is None
    assert weight_footprint(tiny_model("llama"), "fp8") is None
    plain = weight_footprint(tiny_model("llama"), None)
    assert plain is not None and plain.ratio == 1
    assert AutoConfig.from_pretrained(tiny_model("llama")).tie_word_embeddings
