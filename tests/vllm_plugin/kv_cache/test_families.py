# SPDX-License-Identifier: Apache-2.0
"""The real engine with models whose attention or cache has something beside keys and values.

One engine per family answers everything: a request that keeps its whole cache says what stock says,
the others free blocks, and an abort or a preemption leaves none behind.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.kv_engine import run
from tests.support.kv_prompts import text_prompts
from tests.vllm_plugin.kv_cache.test_engine import assert_nothing_left, cached, tokens

slow = pytest.mark.slow
LENGTHS = [5, 33, 129, 300, 640, 1000]
ENGINE = {"dtype": "float32", "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 1 << 28}
HYBRIDS = [
    "qwen3_next",
    *(
        pytest.param(name, marks=slow)
        for name in ("qwen3_5", "qwen3_5_moe", "granite_4", "nemotron_h", "falcon_h1", "jamba")
    ),
]
FAMILIES = ["gpt_oss", *HYBRIDS]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_request_keeps(tiny_model: Callable[..., Path], family: str) -> None:
    model = tiny_model(family)
    prompts = text_prompts(model, LENGTHS)
    case = {"prompts": prompts, "engine": ENGINE, "max_tokens": 24, "rounds": 2}
    kv = {"policy": "snap_kv", "keep": 0.25}
    stock, ours = run(
        model,
        [
            case | {"kv": None},
            case | {"kv": kv, "prompts": prompts * 2, "keep": [1] * 6 + [None] * 6},
        ],
    )
    for number in range(2):
        assert tokens(ours, number)[:6] == tokens(stock, number)
    assert tokens(ours, 0)[6:] == tokens(ours, 1)[6:] != tokens(stock)
    assert max(freed or 0 for freed in ours["freed"]) > 40
    assert cached(ours, 1)[-1] >= 0.7 * cached(stock, 1)[-1]
    assert ours["sinks"] == (1 if family == "gpt_oss" else 0)
    assert_nothing_left(ours)


@slow
@pytest.mark.parametrize("policy", ["snap_kv", "prefix_kv", "key_diff"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keep_1_is_stock(tiny_model: Callable[..., Path], family: str, policy: str) -> None:
    model = tiny_model(family)
    case = {"prompts": text_prompts(model, LENGTHS), "engine": ENGINE, "rounds": 2}
    kv = {"policy": policy, "keep": 1}
    stock, ours = run(model, [case | {"kv": None}, case | {"kv": kv}])
    for number in range(2):
        assert tokens(ours, number) == tokens(stock, number)
        assert cached(ours, number) == cached(stock, number)
    assert not any(ours["freed"])
    assert_nothing_left(ours)


@slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_storm_leaves_nothing(tiny_model: Callable[..., Path], family: str) -> None:
    model = tiny_model(family)
    small: dict[str, Any] = ENGINE | {"num_gpu_blocks_override": 60, "max_model_len": 700}
    case = {
        "kv": {"policy": "snap_kv", "keep": 0.25, "decode_window": 64},
        "prompts": text_prompts(model, [40 + 97 * number % 460 for number in range(60)]),
        "engine": small,
        "max_tokens": 70,
        "storm": 7,
    }
    (answer,) = run(model, [case])
    assert answer["preemptions"] > 0
    assert max(freed or 0 for freed in answer["freed"]) > 0
    assert_nothing_left(answer)
