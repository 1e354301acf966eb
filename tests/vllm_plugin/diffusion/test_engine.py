# SPDX-License-Identifier: Apache-2.0
"""The real engine denoises as the dense reference does, token for token, however it is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_denoising.dense import DenseLLaDA
from dllm_denoising.memory import StepMemory
from tests.support.diffusion_engine import STOP, expected, run, some_requests
from tests.support.llada import random_llada

LAYERS = 4
SECTIONS: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "never": {"policy": "never"},
    "fixed_period": {"policy": "fixed_period", "period": 3},
    "dual_cache": {"policy": "dual_cache", "block_length": 12},
    "elastic": {"policy": "elastic", "gamma": 0.97, "similarity": "heads"},
    "elastic, rows": {
        "policy": "elastic",
        "similarity": "row",
        "track": 2,
        "tokens_per_step": 2,
        "block_length": 12,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DenseLLaDA]:
    folder = tmp_path_factory.mktemp("llada")
    return folder, random_llada(folder, layers=LAYERS)


def assert_nothing_left(answer: dict[str, Any]) -> None:
    assert answer["free_after"] == answer["free_before"]
    assert answer["held"] in (0, None) and answer["sized"] == 0


def test_every_policy_is_the_reference(model: tuple[Path, DenseLLaDA]) -> None:
    folder, dense = model
    requests = some_requests(12)
    padded = ("never", "dual_cache") if not torch.cuda.is_available() else ()
    cases = [
        {"section": section, "requests": requests, "padded": name in padded}
        for name, section in SECTIONS.items()
    ]
    *answers, alone = run(folder, [*cases, cases[0] | {"alone": True}])
    assert (alone["rounds"], alone["peak_running"]) == (answers[0]["rounds"], 1)
    middle = 0
    for case, answer in zip(cases, answers, strict=True):
        wanted = [expected(dense, case["section"], request) for request in requests]
        assert answer["rounds"] == [[tokens for tokens, _ in wanted]], case["section"]
        middle += sum(0 < plan.start < LAYERS for _, plans in wanted for plan in plans)
        assert answer["peak_running"] == len(requests)
        assert not answer["chunked"] and not answer["cached"]
        assert_nothing_left(answer)
        if case["padded"]:  # all but steps of many canvases, and of many rows and of few
            assert sum(answer["padded"].values()) > 0.8 * answer["steps"]
            assert len(answer["padded"]) > 4
        elif not torch.cuda.is_available():
            assert not answer["padded"]
    assert middle > 20  # refreshes that began between the layers were among them


def test_requests_of_their_own_settings_share_a_batch(model: tuple[Path, DenseLLaDA]) -> None:
    folder, dense = model
    requests = some_requests(10, seed=1)
    extras: list[dict[str, Any]] = [
        {},
        {"compress_gamma": 0.5},
        {"compress_tokens_per_step": 3},
        {"compress_threshold": 0.3, "compress_window_length": 5},
        {"compress_block_length": 7, "compress_similarity": "row", "compress_track": 3},
    ]
    for index, request in enumerate(requests):
        request["extra"] = extras[index % len(extras)]
        if index >= 5:
            request |= {"temperature": 0.7, "seed": index}
    section = SECTIONS["elastic"]
    (answer,) = run(folder, [{"section": section, "requests": requests}])
    wanted = [expected(dense, section, request)[0] for request in requests]
    assert answer["rounds"] == [wanted]
    assert max(answer["pieces"]) > 1  # they stream


@pytest.mark.parametrize("policy", ["full", "elastic"])
def test_tight_pool_and_aborts_lose_nothing(model: tuple[Path, DenseLLaDA], policy: str) -> None:
    folder, dense = model
    requests = some_requests(16, seed=2)
    case = {"section": SECTIONS[policy], "requests": requests}
    # 12 blocks of 32 tokens of 4 layers' keys and values, and of their inputs if these are kept.
    vectors = 3 if policy == "elastic" else 2
    tight = {"kv_cache_memory_bytes": 12 * 32 * LAYERS * vectors * 128 * 4}
    budget = {"max_num_batched_tokens": 260}
    (few, stormy) = run(
        folder,
        [
            case | {"engine": tight | budget, "rounds": 2},
            case | {"engine": tight, "rounds": 3, "storm": 1},
        ],
    )
    wanted = [expected(dense, case["section"], request)[0] for request in requests]
    assert few["rounds"] == [wanted, wanted]
    assert 1 < few["peak_running"] < 16 and few["preemptions"] == stormy["preemptions"] == 0
    aborted = 0
    for tokens in stormy["rounds"]:
        aborted += tokens.count(None)
        assert all(mine in (None, theirs) for mine, theirs in zip(tokens, wanted, strict=True))
    assert 0 < aborted < 48
    for answer in (few, stormy):
        assert_nothing_left(answer)


RESETS = (3, 7)


def resets(section: dict[str, Any], requests: list[dict[str, Any]]) -> dict[str, Any]:
    return {"section": section, "requests": requests, "resets": RESETS}


def test_longest_requests_end_and_resets_lose_nothing(model: tuple[Path, DenseLLaDA]) -> None:
    folder, dense = model
    asked = {"extra": {"compress_tokens_per_step": 16, "compress_block_length": 64}}
    long = some_requests(3, seed=6, max_tokens=10_000, **asked)  # above what the context holds
    long += [{"prompt": [5, 9] * 127 + [5], "max_tokens": 9}, long[0] | {"max_tokens": 40}]
    refused = [{"prompt": [5] * size, "max_tokens": 1, "refused": True} for size in (256, 300)]
    ragged = some_requests(10, seed=7)
    ragged[0] |= {"temperature": 0.7, "seed": 3}
    sections = [SECTIONS[name] for name in ("fixed_period", "dual_cache", "elastic")]
    cases = [resets(section, ragged) for section in sections[1:]]
    cases[1]["measure"] = not torch.cuda.is_available()
    cases[1]["engine"] = {"max_num_seqs": 16, "max_num_batched_tokens": 2048}
    lengths, *answers = run(
        folder, [{"section": sections[0], "requests": long + refused}, *cases], 200
    )

    wanted = [expected(dense, sections[0], request)[0] for request in long]
    assert lengths["rounds"] == [[*wanted, None, None]]
    for request, tokens, reason in zip(long, wanted, lengths["reasons"], strict=False):
        most = min(request["max_tokens"], 256 - len(request["prompt"]))
        assert (reason, len(tokens)) == ("length", most) or tokens[-1] == STOP
    assert lengths["reasons"][:3].count("length") > 0
    assert_nothing_left(lengths)

    for case, answer in zip(cases, answers, strict=True):
        found = [expected(dense, case["section"], one, restarts=RESETS) for one in ragged]
        assert answer["rounds"] == [[tokens for tokens, _ in found]]
        running = [sum(len(plans) > reset for _, plans in found) for reset in RESETS]
        assert answer["resumed"] == sum(running) > 12
        assert_nothing_left(answer)

    if cases[1]["measure"]:
        sizes = StepMemory(64, 128, 4, heads=4, kv_heads=4, head_size=32)
        needed = sizes.most(rows=2048, requests=16, length=256, watches=True)
        assert needed > 50 << 20
        assert answers[1]["set_aside"] == pytest.approx(needed, abs=8 << 20)


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two GPUs, or none, for two ranks")
def test_two_ranks_are_one(model: tuple[Path, DenseLLaDA]) -> None:
    folder, dense = model
    requests = some_requests(8, seed=3)
    requests[0] |= {"temperature": 0.8, "seed": 7}
    section = SECTIONS["elastic"]
    (answer,) = run(
        folder,
        [{"section": section, "requests": requests, "engine": {"tensor_parallel_size": 2}}],
    )
    assert answer["rounds"] == [[expected(dense, section, one)[0] for one in requests]]
    assert_nothing_left(answer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="all tests use Model Runner V2 on a GPU")
def test_model_runner_v2_is_the_reference(model: tuple[Path, DenseLLaDA]) -> None:
    pytest.importorskip("triton", reason="Model Runner V2 needs Triton")
    folder, dense = model
    requests = some_requests(6, seed=5)
    section = SECTIONS["elastic"]
    (answer,) = run(folder, [resets(section, requests)], v2=True)
    assert answer["v2"]
    wanted = [expected(dense, section, one, restarts=RESETS)[0] for one in requests]
    assert answer["rounds"] == [wanted]
    assert_nothing_left(answer)
