# SPDX-License-Identifier: Apache-2.0
"""Two pipeline stages, and two ranks of tensor parallelism, say, free and count what one process
does. In float32: batches and the order of sums differ."""

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks.cskv_ranks import as_one_rank
from kv_policies.latents.bases import Bases
from tests.support.kv_prompts import text_prompts
from tests.support.metrics_engine import watch
from tests.vllm_plugin.kv_cache.conftest import save_bases, save_profile

LENGTHS = (50, 300, 450, 200, 700)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    heads = {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    return tiny_model("llama", num_hidden_layers=6, **heads)


def served(model: Path, stages: int, kv: dict[str, Any] | None, ranks: int = 1) -> dict[str, Any]:
    engine = {
        "dtype": "float32",
        "pipeline_parallel_size": stages,
        "tensor_parallel_size": ranks,
        "kv_cache_memory_bytes": None,
        "num_gpu_blocks_override": 160,  # of a few layers each
        "max_model_len": 1024,
        "max_num_batched_tokens": 256,
        "enable_prefix_caching": True,
    }
    with mock.patch.dict(os.environ, VLLM_CPU_OMP_THREADS_BIND="nobind"):
        return watch(
            model,
            kv=kv,
            prompts=text_prompts(model, list(LENGTHS)),
            extra=[None, None, {"compress_keep": 1} if kv else None, None, None],
            max_tokens=70,
            engine=engine,
        )


def counted(answer: dict[str, Any]) -> dict[str, float]:
    """What does not depend on time, and is not bytes, which are of the first rank."""
    return {
        name: value
        for name, value in answer["end"].items()
        if "seconds" not in name and "bytes" not in name
    }


def test_stages_without_layers_of_a_level(model: Path, tmp_path: Path) -> None:
    """Three levels of two layers on two stages: each stage lacks one of them."""
    profile = save_profile(model, tmp_path / "kv.json", Fraction(1, 4), 3)
    kv = {"policy": "prefix_kv", "profile": str(profile), "queries": 64, "decode_window": 64}
    assert_alike(*(served(model, stages, kv) for stages in (1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one level", "latents"])
def test_other_policies(model: Path, tmp_path: Path, kind: str) -> None:
    kv: dict[str, Any] = {"policy": "snap_kv", "keep": 0.25, "decode_window": 64}
    if kind == "latents":
        file = save_bases(model, tmp_path / "kv.safetensors", Fraction(4, 5), (54, 76, 96))
        kv = {"policy": "cskv", "bases": str(file)}
    assert_alike(*(served(model, stages, kv) for stages in (1, 2)))


@pytest.mark.slow
def test_keep_1_is_stock(model: Path) -> None:
    stock, ours = served(model, 1, None), served(model, 2, {"policy": "snap_kv", "keep": 1})
    assert ours["tokens"] == stock["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latents", "chosen tokens"])
def test_ranks_compress_their_own_heads(
    tiny_model: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    """One rank serves block-diagonal bases, which keep what those of two ranks do: not all."""
    heads = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = tiny_model("llama", num_hidden_layers=4, **heads)
    kv: dict[str, Any] = {"policy": "snap_kv", "keep": 0.25, "decode_window": 64}
    whole = kv
    if kind == "latents":
        # Of one name, which metrics have as a label.
        file, joined = (tmp_path / name / "kv.safetensors" for name in ("two", "one"))
        file.parent.mkdir()
        joined.parent.mkdir()
        save_bases(model, file, Fraction(4, 5), (20, 30), ranks=2)
        as_one_rank(Bases.load(file)).save(joined)
        kv, whole = ({"policy": "cskv", "bases": str(each)} for each in (file, joined))
    assert_alike(served(model, 1, whole), served(model, 1, kv, ranks=2))


def assert_alike(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert two["tokens"] == one["tokens"]
    assert all(len(tokens) == 70 for tokens in two["tokens"])
    assert two["free"] == one["free"] == two["steps"][-1]["free"]
    assert counted(two) == pytest.approx(counted(one))
    assert one["end"]["kv_freed_blocks_total"] > 0
    assert one["end"]["kv_compactions_total segment=window"] > 0
    assert two["end"]["kv_compaction_seconds_sum"] > 0
