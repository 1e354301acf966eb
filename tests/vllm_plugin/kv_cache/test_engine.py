# SPDX-License-Identifier: Apache-2.0
"""The real engine with KV policies: nothing changes at keep 1, nothing leaks or mixes below it.

Where texts of different schedules are compared the model runs in float32: in bfloat16 stock vLLM
too takes another token now and then when a prompt is cut or batched differently.
"""

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_policies.layout.bounded import BoundedLayout
from tests.support.kv_engine import run
from tests.support.kv_prompts import needle_prompts, text_prompts
from tests.vllm_plugin.kv_cache.conftest import save_bases, save_low_rank, save_profile
from vllm_plugin.kv_cache.support import lacks_fp8

LENGTHS = [5, 17, 32, 33, 64, 90, 127, 128, 129, 160, 200, 256, 300, 400, 512, 640, 800, 1000, 1250]
LENGTHS += [1500]
POLICIES = ("snap_kv", "prefix_kv", "key_diff", "recent", "cskv")


@pytest.fixture(scope="module", params=["random", pytest.param("demo", marks=pytest.mark.slow)])
def model(
    request: pytest.FixtureRequest, demo_model: Path, tiny_model: Callable[..., Path]
) -> Path:
    """The demo model, and a quick one that attends as it does, so that its blocks are as large."""
    if request.param == "demo":
        return demo_model
    heads = {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    return tiny_model("llama", num_hidden_layers=6, **heads)


@pytest.fixture(scope="module")
def profile(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep 0.25 in three levels."""
    path = tmp_path_factory.mktemp("profile") / "kv.json"
    return save_profile(model, path, Fraction(1, 4), 3)


@pytest.fixture(scope="module")
def bases(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ratio 0.8 in three levels: 224, 160 and 128 tokens to a block of 32."""
    path = tmp_path_factory.mktemp("bases") / "kv.safetensors"
    return save_bases(model, path, Fraction(4, 5), (54, 76, 96))


@pytest.fixture(scope="module")
def four_bits(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of as many numbers, in 4 bits."""
    path = tmp_path_factory.mktemp("bases") / "kv4.safetensors"
    return save_bases(model, path, Fraction(47, 50), (54, 76, 96), bits=4)


def tokens(answer: dict[str, Any], number: int = 0) -> list[list[int]]:
    return [one["tokens"] for one in answer["rounds"][number]]


def cached(answer: dict[str, Any], number: int) -> list[int]:
    return [one["cached"] for one in answer["rounds"][number]]


def assert_nothing_left(answer: dict[str, Any]) -> None:
    assert answer["free_after"] == answer["free_before"]
    assert answer["held"] == answer["remembered"] == 0


def pool(model: Path, blocks: int) -> dict[str, Any]:
    """A cache of so many blocks of 32 tokens over all layers, in float32."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_hidden_layers"] * config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        "dtype": "float32",
        "kv_cache_memory_bytes": blocks * 32 * 2 * heads * head_dim * 4,
        "max_model_len": 900,
        "max_num_batched_tokens": 512,
        "enable_prefix_caching": False,
    }


@pytest.mark.parametrize(
    ("chunk", "caching"),
    [
        (256, True),
        pytest.param(256, False, marks=pytest.mark.slow),
        pytest.param(2048, True, marks=pytest.mark.slow),
        pytest.param(2048, False, marks=pytest.mark.slow),
    ],
)
def test_keep_1_is_stock(model: Path, chunk: int, caching: bool) -> None:
    assert_stock(model, POLICIES, LENGTHS, chunk, caching)


def test_keep_1_is_stock_for_real_weights(demo_model: Path) -> None:
    """Short prompts, and one policy of each layout. The slow cases above have all."""
    assert_stock(demo_model, ("prefix_kv", "cskv"), [5, 32, 129, 200], 256, True)


def assert_stock(
    model: Path, policies: Sequence[str], lengths: list[int], chunk: int, caching: bool
) -> None:
    engine = {"max_num_batched_tokens": chunk, "enable_prefix_caching": caching}
    case = {"prompts": text_prompts(model, lengths), "engine": engine}
    kvs: list[dict[str, Any] | None] = [None, {"policy": "snap_kv", "budget": 1600}]
    kvs += [{"policy": policy, "keep": 1} for policy in policies]
    stock, *ours = run(model, [case | {"kv": kv} for kv in kvs])
    for answer in ours:
        assert tokens(answer) == tokens(stock)
        assert answer["steps"] == stock["steps"] and answer["freed"] == [0]
        assert_nothing_left(answer)


@pytest.mark.parametrize(
    "attention", [pytest.param("grouped queries", marks=pytest.mark.slow), "multi-head"]
)
def test_latents_of_low_rank_keys_and_values_lose_nothing(
    demo_model: Path, tiny_model: Callable[..., Path], tmp_path: Path, attention: str
) -> None:
    """Where the bases hold all that there is, the texts are stock's. In float32: what is left is
    the order of sums, about 1e-6 of a logit. In bfloat16, by the kernel for CPUs, latents are
    rounded where stock rounds keys and values, and texts part where two tokens are as likely: in
    the model cut to half its rank at once, in the random one after a while."""
    mha = attention == "multi-head"
    source = tiny_model("llama", num_key_value_heads=4) if mha else demo_model
    low_rank_model = save_low_rank(source, tmp_path / "model")
    file = save_bases(low_rank_model, tmp_path / "kv.safetensors", Fraction(1, 2))
    prompts = text_prompts(demo_model, LENGTHS[1::3])
    engine = pool(low_rank_model, 900)
    case: dict[str, Any] = {"prompts": prompts, "engine": engine, "max_tokens": 40}
    case["engine"] |= {"max_model_len": 2048}
    kv = {"policy": "cskv", "bases": str(file), "decode_window": 32, "min_prompt": 0}
    cases = [case | {"kv": None}, case | {"kv": kv}]
    if mha and torch.cpu._is_avx512_supported():  # what the kernel for CPUs needs
        engine = case["engine"] | {"dtype": "bfloat16"}
        cases += [one | {"engine": engine} for one in cases]
    whole = save_bases(low_rank_model, tmp_path / "whole.safetensors", Fraction(0))
    *answers, nothing_saved = run(
        low_rank_model, [*cases, case | {"kv": kv | {"bases": str(whole)}}]
    )
    assert tokens(answers[1]) == tokens(nothing_saved) == tokens(answers[0])
    assert nothing_saved["freed"] == [0]
    for ours, stock in zip(answers[1::2], answers[::2], strict=True):
        pairs = list(zip(tokens(ours), tokens(stock), strict=True))
        assert all(text[0] == other[0] for text, other in pairs)
        same = [a == b for text, other in pairs for a, b in zip(text, other, strict=True)]
        assert sum(same) > 0.4 * len(same), "of tokens drawn at random next to none are"
        assert ours["freed"][0] > 30
        assert_nothing_left(ours)


@pytest.mark.parametrize(
    "kind",
    [
        "one level",
        "three levels",
        "latents",
        "latents of 4 bits",
    ],
)
def test_freed_blocks_are_used_by_others_and_nothing_mixes(
    model: Path, profile: Path, bases: Path, four_bits: Path, kind: str
) -> None:
    kv: dict[str, Any] = {"policy": "snap_kv", "keep": 0.25, "decode_window": 0}
    if kind == "three levels":
        kv = {"policy": "prefix_kv", "profile": str(profile), "queries": 128}
    elif kind != "one level":
        kv = {"policy": "cskv", "bases": str(four_bits if "4" in kind else bases)}
    case = {"kv": kv, "prompts": needle_prompts(model, 16, 450), "max_tokens": 24}
    sizes = (30 if "4" in kind else 70, 600)
    tight, ample = run(model, [case | {"engine": pool(model, blocks)} for blocks in sizes])
    assert tokens(tight) == tokens(ample)
    assert tight["steps"] > ample["steps"]  # the pool was short
    assert len(tight["freed"]) == (1 if kind == "one level" else 3) and min(tight["freed"]) > 0
    assert_nothing_left(tight)
    assert_nothing_left(ample)


@pytest.mark.parametrize("kind", ["share", "budget", "latents"])
def test_windows_survive_preemption(model: Path, bases: Path, kind: str) -> None:
    """A resumed request recomputes prompt and windows, and says what it would have said."""
    kvs: dict[str, dict[str, Any]] = {
        "share": {"policy": "key_diff", "keep": 0.5},
        "budget": {"policy": "r_kv", "budget": 192},  # with the queries of each window
        "latents": {"policy": "cskv", "bases": str(bases)},
    }
    case = {
        "kv": kvs[kind] | {"decode_window": 64},
        "prompts": needle_prompts(model, 6, 260),
        "max_tokens": 200,
    }
    tight, ample = run(model, [case | {"engine": pool(model, blocks)} for blocks in (34, 400)])
    assert tight["preemptions"] > 0 and ample["preemptions"] == 0
    assert tokens(tight) == tokens(ample)
    assert ample["freed"][0] > sum(len(prompt) // 32 // 2 for prompt in case["prompts"])
    assert_nothing_left(tight)


def test_a_budget_bounds_what_a_request_takes(model: Path) -> None:
    """However much it generates: the longer request takes no block more."""
    kv, layout = {"policy": "snap_kv", "budget": 256, "decode_window": 64}, (32, 256, 64)
    for prompt in text_prompts(model, [40, 700]):
        case = {"kv": kv, "prompts": [prompt], "engine": pool(model, 60) | {"max_model_len": 1600}}
        short, long = run(model, [case | {"max_tokens": tokens} for tokens in (350, 800)])
        taken = [answer["free_before"] - answer["free_least"] for answer in (short, long)]
        assert taken[0] == taken[1] <= max((256 + 64 + 32) // 32, -(-len(prompt) // 32))
        settled = len(prompt) + 800 - 1
        freed = BoundedLayout(*layout).freed(len(prompt), settled)
        assert long["freed"] == [sum(stop - first for first, stop in freed)]
        assert_nothing_left(long)


@pytest.mark.parametrize("kind", [pytest.param("share", marks=pytest.mark.slow), "budget"])
def test_a_request_that_asks_for_less_gets_what_a_server_of_less_gives(
    model: Path, kind: str
) -> None:
    """Beside requests that ask for nothing, or opt out, in a pool that is short."""
    served, less, extra, blocks = {
        "share": ({"keep": 0.5}, {"keep": 0.25}, {"compress_keep": 0.25}, 36),
        "budget": ({"budget": 320}, {"budget": 192}, {"compress_budget": 192}, 60),
    }[kind]
    kv = {"policy": "r_kv", "decode_window": 64}
    case = {"prompts": needle_prompts(model, 6, 300), "max_tokens": 150}
    engine = pool(model, blocks) | {"enable_prefix_caching": True}
    keep = [None, extra, extra, 1, None, extra]
    mixed, smaller, *whole = run(
        model,
        [
            case | {"kv": kv | served, "engine": engine, "keep": keep},
            case | {"kv": kv | less, "engine": pool(model, 400)},
        ]
        + [case | {"kv": kv | served, "engine": pool(model, 400)}] * (kind == "share"),
    )
    assert mixed["preemptions"] > 0
    for at, (one, given) in enumerate(zip(tokens(mixed), keep, strict=True)):
        if given == extra:
            assert one == tokens(smaller)[at]
        elif given is None and whole:
            assert one == tokens(whole[0])[at]
    assert_nothing_left(mixed)


@pytest.mark.parametrize("policy", ["snap_kv", "budget", "prefix_kv", "cskv"])
def test_prefix_cache_hits_and_changes_nothing(
    model: Path, profile: Path, bases: Path, policy: str
) -> None:
    kvs: dict[str, dict[str, Any]] = {
        "snap_kv": {"keep": 0.25},
        "budget": {"policy": "snap_kv", "budget": 192, "decode_window": 64},
        "prefix_kv": {"profile": str(profile)},
        "cskv": {"bases": str(bases)},
    }
    kv = {"policy": policy} | kvs[policy]
    first = needle_prompts(model, 1, 700)[0]
    prompts = [first, *(first[:cut] + first[-30:] for cut in (500, 560))]
    case = {"kv": kv, "prompts": prompts, "max_tokens": 16}
    on = pool(model, 300) | {"enable_prefix_caching": True}
    # One after the other, so that each can hit what the one before left.
    cold, warm = run(
        model,
        [
            case | {"engine": pool(model, 300)},
            case | {"engine": on | {"max_num_seqs": 1}, "rounds": 2},
        ],
    )
    assert tokens(warm, 0) == tokens(warm, 1) == tokens(cold)
    assert all(cached(warm, 1)) and all(cached(warm, 0)[1:]) and not any(cached(cold, 0))
    assert_nothing_left(warm)


@pytest.mark.skipif(lacks_fp8(), reason="vLLM's FP8 cache needs AVX-512 or AMX on a CPU")
@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2"])
def test_fp8_cache(model: Path, dtype: str) -> None:
    """Stock at keep 1; below it blocks are freed and used by others, and nothing mixes."""
    case = {"prompts": needle_prompts(model, 8, 450), "max_tokens": 24}
    kv = {"policy": "snap_kv", "keep": 0.25, "decode_window": 64}
    fp8 = {"kv_cache_dtype": dtype}
    stock, same, tight, ample = run(
        model,
        [
            case | {"kv": None, "engine": pool(model, 300) | fp8},
            case | {"kv": kv | {"keep": 1}, "engine": pool(model, 300) | fp8},
            case | {"kv": kv, "engine": pool(model, 10) | fp8},  # of 40 blocks of a byte
            case | {"kv": kv, "engine": pool(model, 300) | fp8},
        ],
    )
    assert tokens(same) == tokens(stock) and same["freed"] == [0]
    assert tokens(tight) == tokens(ample) != tokens(stock)
    assert min(tight["freed"]) > 0
    for answer in (same, tight, ample):
        assert_nothing_left(answer)


@pytest.mark.parametrize("policy", ["recent", "cskv"])
def test_a_request_may_keep_everything(model: Path, bases: Path, policy: str) -> None:
    kv = {"policy": policy} | ({"bases": str(bases)} if policy == "cskv" else {"keep": 0.25})
    case = {"prompts": needle_prompts(model, 3, 450), "max_tokens": 16}
    engine = pool(model, 300) | {"enable_prefix_caching": True}
    stock, mixed, all_out = run(
        model,
        [
            case | {"kv": None, "engine": engine},
            case
            | {
                "kv": kv,
                "engine": engine,
                "keep": [1, None, "1"],
                "rounds": 2,
            },
            case | {"kv": kv, "engine": engine, "keep": [1, 1, 1]},
        ],
    )
    assert tokens(all_out) == tokens(stock) and not any(all_out["freed"])
    for number in range(2):
        first, second, third = tokens(mixed, number)
        assert [first, third] == [tokens(stock)[0], tokens(stock)[2]]
        assert second != tokens(stock)[1]  # the needle in the middle is gone
    assert_nothing_left(mixed)


@pytest.mark.parametrize("policy", ["r_kv", pytest.param("snap_kv", marks=pytest.mark.slow)])
def test_prompts_may_be_larger_than_the_pool(model: Path, policy: str) -> None:
    """They say what they say alone and in a pool with room: nothing mixes, hits change nothing, and
    it does not matter how a prompt was cut into steps. One that fits its window is left alone."""
    kv = {"policy": policy, "budget": 192, "decode_window": 64}
    prompts = [*needle_prompts(model, 3, 1500), *needle_prompts(model, 3, 200)]
    case = {"prompts": prompts, "max_tokens": 100}
    windows, longest = kv | {"prompt_window": 320}, {"max_model_len": 2000}
    tight = pool(model, 38) | longest | {"enable_prefix_caching": True}
    tight |= {"max_num_batched_tokens": 256}
    assert min(map(len, prompts[:3])) > 37 * 32
    small, ample, whole = run(
        model,
        [
            case | {"kv": windows, "engine": tight, "rounds": 2},
            case | {"kv": windows, "engine": pool(model, 400) | longest},
            case | {"kv": kv, "engine": pool(model, 400) | longest},
        ],
    )
    assert tokens(small, 0) == tokens(small, 1) == tokens(ample)
    assert tokens(ample)[3:] == tokens(whole)[3:] and tokens(ample)[:3] != tokens(whole)[:3]
    assert small["preemptions"] > 0 and any(cached(small, 1))
    assert_nothing_left(small)
    assert_nothing_left(ample)


@pytest.mark.parametrize(
    "kind", ["one level", "three levels", "budget", "prompt windows", "latents"]
)
def test_a_storm_of_aborts_and_preemptions_leaves_nothing(
    model: Path, profile: Path, bases: Path, kind: str
) -> None:
    kv: dict[str, Any] = {"policy": "snap_kv", "keep": 0.25, "decode_window": 32}
    if kind == "three levels":
        kv = {"policy": "prefix_kv", "profile": str(profile), "decode_window": 32, "queries": 64}
    elif kind == "budget":
        kv = {"policy": "key_diff", "budget": 96, "decode_window": 32}
    elif kind == "prompt windows":
        kv = {"policy": "r_kv", "budget": 96, "decode_window": 32, "prompt_window": 160}
    elif kind == "latents":
        kv = {"policy": "cskv", "bases": str(bases)}
    lengths = [40 + 97 * number % 460 for number in range(200 if kind == "one level" else 60)]
    engine = pool(model, {"latents": 30, "prompt windows": 22}.get(kind, 36))
    engine |= {"enable_prefix_caching": True, "max_num_batched_tokens": 192}
    case = {"kv": kv, "prompts": text_prompts(model, lengths), "max_tokens": 70, "storm": 7}
    (answer,) = run(model, [case | {"engine": engine}])
    # With latents and prompt windows a request hardly grows, so that none has to be thrown out.
    assert answer["preemptions"] > 0 or kind in ("latents", "prompt windows")
    assert min(answer["freed"]) > 0
    assert_nothing_left(answer)
