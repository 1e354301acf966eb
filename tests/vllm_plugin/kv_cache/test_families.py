# SPDX-License-Identifier: Apache-2.0
"""The real engine with models whose attention or cache has something beside keys and values.

At keep 1 they say and hit what stock says and hits. Below it blocks are freed, a prompt hits what
it may and says what it said cold, and an abort or a preemption leaves nothing behind.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.kv_engine import run
from tests.support.kv_prompts import text_prompts
from tests.vllm_plugin.kv_cache.test_engine import assert_nothing_left, cached, tokens

slow = pytest.mark.slow
LENGTHS = [5, 33, 129, 300, 640, 1000, 1200]
ENGINE = {"dtype": "float32", "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 1 << 28}
# One request at a time: stock vLLM on a CPU needs bfloat16 there, in which other batches give other
# tokens. The block of a state is large.
ALONE = {"dtype": "bfloat16", "max_num_seqs": 1, "max_num_batched_tokens": 2048}
ENGINES: dict[str, dict[str, Any]] = {
    "gpt_oss": ENGINE,
    "gemma4": ENGINE,
    "gemma4_large": ENGINE,
    "qwen3_5": ENGINE | ALONE,
    "qwen3_5_moe": ENGINE | ALONE,
}
SLOW = [pytest.param(family, marks=slow) for family in ("gemma4_large", "qwen3_5_moe")]
FAMILIES = ["gpt_oss", "gemma4", "qwen3_5", *SLOW]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_request_keeps(tiny_model: Callable[..., Path], family: str) -> None:
    model = tiny_model(family)
    *others, longest = text_prompts(model, LENGTHS)
    # Two more begin like the longest one, and part from it in the same block.
    alike = [longest[:700] + other[:400] for other in others[-2:]]
    prompts = [*others, *alike, longest]
    case = {"prompts": prompts, "engine": ENGINES[family], "max_tokens": 24, "rounds": 2}
    kv = {"policy": "snap_kv", "keep": 0.25}
    stock, same, ours = run(
        model, [case | {"kv": None}, case | {"kv": kv | {"keep": 1}}, case | {"kv": kv}]
    )
    for number in range(2):
        assert tokens(same, number) == tokens(stock, number)
        assert cached(same, number) == cached(stock, number)
    assert not any(same["freed"])
    assert tokens(ours) != tokens(stock)
    assert tokens(ours, 1) == tokens(ours)
    assert cached(ours, 0)[-1] < cached(ours, 1)[-1]
    assert cached(ours, 1)[-1] >= 0.7 * cached(stock, 1)[-1] > 0
    least = 0 if "qwen" in family else 10  # a block of a hybrid is as large as a state
    assert max(freed or 0 for freed in ours["freed"]) > least
    assert ours["sinks"] == (1 if family == "gpt_oss" else 0)
    assert_nothing_left(same)
    assert_nothing_left(ours)


@slow
@pytest.mark.parametrize("policy", ["snap_kv", "prefix_kv", "key_diff"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keep_1_is_stock(tiny_model: Callable[..., Path], family: str, policy: str) -> None:
    model = tiny_model(family)
    case = {"prompts": text_prompts(model, LENGTHS), "engine": ENGINES[family], "rounds": 2}
    kv = {"policy": policy, "keep": 1}
    stock, ours = run(model, [case | {"kv": None}, case | {"kv": kv}])
    for number in range(2):
        assert tokens(ours, number) == tokens(stock, number)
        assert cached(ours, number) == cached(stock, number)
    assert not any(ours["freed"])
    assert_nothing_left(ours)


@slow
@pytest.mark.parametrize(
    ("family", "blocks", "longest", "window"),
    [
        ("gpt_oss", 60, 500, {"decode_window": 64}),
        ("qwen3_5", 24, 1300, {}),  # of 288 tokens
    ],
)
def test_a_storm_leaves_nothing(
    tiny_model: Callable[..., Path],
    family: str,
    blocks: int,
    longest: int,
    window: dict[str, Any],
) -> None:
    model = tiny_model(family)
    small = ENGINES[family] | {"num_gpu_blocks_override": blocks, "max_num_seqs": 64}
    small |= {"max_model_len": longest + 200}
    case = {
        "kv": {"policy": "snap_kv", "keep": 0.25} | window,
        "prompts": text_prompts(model, [40 + 97 * number % (longest - 40) for number in range(60)]),
        "engine": small,
        "max_tokens": 70,
        "storm": 7,
    }
    (answer,) = run(model, [case])
    assert answer["preemptions"] > 0
    assert max(freed or 0 for freed in answer["freed"]) > 0
    assert_nothing_left(answer)
