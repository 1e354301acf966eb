# SPDX-License-Identifier: Apache-2.0
"""Questions about a picture, answered from int4 weights and a KV cache that lost most of it."""

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import openai
import pytest

from benchmarks import tiny_vision
from benchmarks.kv_vision import chat
from benchmarks.server import serving
from benchmarks.tiny_vision import IMAGE
from benchmarks.vision_grids import SIDE, grid
from kv_policies.layout.tokens import TokenLayout
from quant_methods.calibration.images import ImageSettings
from tests.support.vision_engine import chat_about
from vllm_plugin.commands.profiling.kv_profile import make_profile

BLOCK = 32
IMAGE_TOKENS = SIDE * SIDE
PROMPT = IMAGE_TOKENS + 3  # BOS, the name of a cell and a colon
WEIGHTS = {"group_size": 32, "activations": "bf16"}
OPTED_OUT = {"compress_keep": 1}
WHOLE = {"vllm_xargs": OPTED_OUT}  # over HTTP


class Served:
    """A profile of pictures on disk, and what it frees of a prompt.

    Attributes:
        kv: The section ``compress.kv``.
        freed: Tokens of a prompt that are evicted, mean over the layers.
        shared: Tokens of a prompt that no layer overwrites.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / "kv.json"
        made, _ = make_profile(str(tiny_vision.folder()), Fraction(1, 2), ImageSettings(samples=2))
        made.save(file)
        self.kv = {"policy": "prefix_kv", "profile": str(file)}
        blocks = PROMPT // BLOCK
        freed = [blocks - TokenLayout(BLOCK, share).kept(blocks) for share in made.cut().per_layer]
        self.freed = BLOCK * sum(freed) / len(freed)
        self.shared = BLOCK * min(freed)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("profile"))


def test_image_tokens_are_evicted_from_an_int4_model(served: Served) -> None:
    seeds = list(range(6))
    asked: list[tuple[int, dict[str, Any] | None]] = [(seed, None) for seed in seeds]
    got = chat_about(
        tiny_vision.folder(),
        [*asked, (0, None), *((seed, OPTED_OUT) for seed in seeds)],
        dtype="bfloat16",
        quantization="rtn",
        additional_config={"compress": {"weights": WEIGHTS, "kv": served.kv}},
    )
    answers, series = got["answers"], got["series"]
    first, again, whole = answers[:6], answers[6], answers[7:]
    for answer in answers:
        assert answer["prompt"].count(IMAGE) == IMAGE_TOKENS and len(answer["prompt"]) == PROMPT
    # Its first token is computed before anything is evicted: the name of the cell.
    wanted = [f"{grid(seed).cells[0]} {grid(seed).answers[0]}".split() for seed in seeds]
    read = [[a["text"].split()[:2] for a in some] for some in (first, whole)]
    assert [words[0] for words in read[0]] == [words[0] for words in read[1]]
    assert sum(map(list.__eq__, read[1], wanted)) >= 5
    # Of a prompt with three tokens of text, whatever else is evicted is of the picture.
    assert served.freed > 3
    assert series["kv_evicted_tokens_total policy=prefix_kv"] == 7 * served.freed
    assert series["kv_tokens_total policy=prefix_kv"] == 7 * (PROMPT // BLOCK) * BLOCK
    assert series["kv_compactions_total segment=prompt"] == 7
    assert series["kv_eligible_requests_total"] == 7
    assert series["kv_skipped_requests_total reason=opted_out"] == 6
    assert [answer["nats"][2:] for answer in first] != [answer["nats"][2:] for answer in whole]
    # The same picture again: what nobody overwrote is found, and the answer is the same.
    assert again["cached"] == served.shared
    assert again["tokens"] == first[0]["tokens"]
    assert again["nats"] == pytest.approx(first[0]["nats"], abs=0.05)  # rounded to bfloat16


@pytest.mark.slow
def test_the_whole_cache_gives_what_stock_vllm_gives() -> None:
    requests: list[tuple[int, dict[str, Any] | None]] = [(seed, None) for seed in range(4)]
    stock = chat_about(tiny_vision.folder(), requests)
    for kv in ({"policy": "snap_kv", "keep": 1}, {"policy": "snap_kv", "keep": 0.25}):
        extra = None if kv["keep"] == 1 else OPTED_OUT
        config = {"compress": {"kv": kv}}
        asked = [(seed, extra) for seed, _ in requests]
        ours = chat_about(tiny_vision.folder(), asked, additional_config=config)
        for theirs, mine in zip(stock["answers"], ours["answers"], strict=True):
            assert mine["tokens"] == theirs["tokens"] and mine["nats"] == theirs["nats"]


@pytest.mark.slow
def test_an_openai_client_asks_about_an_image(served: Served, tmp_path: Path) -> None:
    config = json.dumps({"compress": {"weights": WEIGHTS, "kv": served.kv}})
    arguments = ["--quantization", "rtn", "--additional-config", config, "--max-model-len", "512"]
    arguments += ["--limit-mm-per-prompt", '{"image": 1}', "--enable-prefix-caching"]
    with serving(tiny_vision.folder(), *arguments, output=tmp_path / "log") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")

        def ask(seed: int, **more: object) -> openai.types.chat.ChatCompletion:
            return client.chat.completions.create(
                model="demo",
                messages=chat(seed)["messages"],
                temperature=0,
                max_tokens=8,
                extra_body=more,
            )

        seeds = range(8)
        asked, whole = ([ask(seed, **more) for seed in seeds] for more in ({}, WHOLE))
        for answer in asked:
            assert answer.usage.prompt_tokens == PROMPT
        right = [
            [
                answer.choices[0].message.content.split()
                == [grid(seed).cells[0], grid(seed).answers[0]]
                for seed, answer in zip(seeds, some, strict=True)
            ]
            for some in (asked, whole)
        ]
        assert sum(right[1]) >= 7
        evicted = server.value("vllm_compress_kv_evicted_tokens_total", policy="prefix_kv")
        assert evicted == len(seeds) * served.freed
        assert server.value("vllm_compress_kv_skipped_requests_total", reason="opted_out") == 8
        hits = server.value("vllm:prefix_cache_hits_total")
        again = ask(0)
        assert again.choices[0].message.content == asked[0].choices[0].message.content
        assert server.value("vllm:prefix_cache_hits_total") - hits == served.shared
        command = (sys.executable, "-m", "vllm_plugin.cli", "status", server.url, "--json")
        told = json.loads(subprocess.check_output(command))[0]
        assert told["info"]["policy"] == "prefix_kv" and told["info"]["method"] == "rtn"
        assert not told["warnings"]
