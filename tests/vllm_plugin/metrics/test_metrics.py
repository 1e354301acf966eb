# SPDX-License-Identifier: Apache-2.0
"""The metrics of a real engine say what its block pool says."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.diffusion_engine import expected
from tests.support.fixed_server import answering
from tests.support.generate import QUICK_WEIGHTS
from tests.support.kv_prompts import text_prompts
from tests.support.llada import random_llada
from tests.support.metrics_engine import watch
from vllm_plugin.commands import status
from vllm_plugin.commands.served_figures import models_in
from vllm_plugin.metrics import page
from vllm_plugin.metrics.catalogue import METRICS, REFUSALS
from vllm_plugin.metrics.stats import CompressStats

# Bytes of a token over all layers of ``watched`` in bfloat16, and of a block.
TOKEN_BYTES = 2 * 2 * 2 * 32 * 2
BLOCK_BYTES = TOKEN_BYTES * 32
BROWSER = (
    *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--virtual-time-budget=5000", "--dump-dom"),
)
LENGTHS = (50, 700, 300, 300)


@pytest.fixture(scope="module")
def watched(tiny_model: Callable[..., Path]) -> dict[str, Any]:
    model = tiny_model("llama")
    return watch(
        model,
        kv={"policy": "snap_kv", "keep": 0.25, "decode_window": 64},
        prompts=text_prompts(model, list(LENGTHS)),
        extra=[None, None, None, {"compress_keep": 1}],
        max_tokens=100,
    )


def test_all_series_are_there_before_the_first_request(watched: dict[str, Any]) -> None:
    there = {key.split()[0] for key in watched["start"]}
    for metric in METRICS:
        suffix = "_count" if metric.kind == "histogram" else ""
        assert metric.exported.removeprefix("vllm_compress_") + suffix in there
    assert watched["start"]["kv_kept_ratio"] == 1
    assert all(f"refused_requests_total reason={reason}" in watched["start"] for reason in REFUSALS)
    info = next(key for key in watched["start"] if key.startswith("info "))
    for state, value in (("original", TOKEN_BYTES), ("compressed", TOKEN_BYTES / 4)):
        assert watched["start"][f"kv_bytes_per_token state={state}"] == value
    assert "policy=snap_kv" in info and "keep=0.25" in info and "method=none" in info


def test_freed_and_saved_blocks_are_those_of_the_pool(watched: dict[str, Any]) -> None:
    """After each step: what tables cover, less what the pool gave out, is what we say we saved."""
    checked = peak = 0
    for step in watched["steps"]:
        if step["finished"]:
            break  # from here on the pool has back more than compaction freed
        given = watched["free"] - step["free"]
        saved = step["columns"] - given
        assert step["series"]["kv_freed_blocks_total"] == saved
        assert step["series"]["kv_saved_bytes"] == saved * BLOCK_BYTES
        assert step["series"]["kv_kept_ratio"] == pytest.approx(1 - saved / step["columns"])
        assert step["series"]["kv_live_tokens_max"] == step["live"] * 32
        peak = max(peak, saved * BLOCK_BYTES)
        assert step["series"]["kv_saved_bytes_peak"] == peak
        checked += saved > 0
    assert checked > 50


@pytest.mark.slow
def test_8000_generated_tokens_take_no_more_than_the_first(tiny_model: Callable[..., Path]) -> None:
    """By the pool's own count in each step, and by the gauge."""
    model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=16_384)
    seen = watch(
        model,
        kv={"policy": "key_diff", "budget": 256, "decode_window": 64},
        prompts=text_prompts(model, [40]),
        extra=[None],
        max_tokens=8000,
        every=13,
        engine={"max_model_len": 8192, "dtype": "float32"},
    )
    running = [step for step in seen["steps"] if not step["finished"]]
    taken = [seen["free"] - step["free"] for step in running]
    assert len(taken) > 7990 and taken == [step["live"] for step in running]
    most = (256 + 64 + 32) // 32
    assert max(taken[:600]) == max(taken) <= most  # flat from the first windows on
    told = [(at, step["series"]["kv_live_tokens_max"]) for at, step in enumerate(running[::13])]
    assert all(tokens == 32 * running[13 * at]["live"] for at, tokens in told)
    assert max(tokens for _, tokens in told) == 32 * max(taken)
    assert seen["end"]["kv_live_tokens_max"] == 0


def test_counters_at_the_end(watched: dict[str, Any]) -> None:
    end = watched["end"]
    # Prompts of 700 and 300 tokens: 21 and 9 full blocks, 6 and 3 stay. Windows of two blocks: one
    # for each request that did not opt out, of which one block stays.
    freed = (21 - 6) + (9 - 3) + 3
    assert end["kv_freed_blocks_total"] == freed
    assert end["kv_freed_bytes_total"] == freed * BLOCK_BYTES
    assert end["kv_evicted_tokens_total policy=snap_kv"] == freed * 32
    assert end["kv_tokens_total policy=snap_kv"] == (21 + 9 + 3 * 2) * 32
    assert end["kv_compactions_total segment=prompt"] == 2
    assert end["kv_compactions_total segment=window"] == 3
    assert end["kv_eligible_requests_total"] == 3  # a short prompt's window of generated tokens too
    assert end["kv_skipped_requests_total reason=short_prompt"] == 0
    assert end["kv_skipped_requests_total reason=opted_out"] == 1
    assert end["kv_compaction_seconds_count"] > 0 and end["kv_compaction_seconds_sum"] > 0
    # Nothing runs, so nothing is saved now; what was saved stays visible.
    assert end["kv_saved_bytes"] == 0 and end["kv_kept_ratio"] == 1
    saved = [step["series"]["kv_saved_bytes"] for step in watched["steps"]]
    assert end["kv_saved_bytes_peak"] == max(saved) > 0


def test_status_tells_what_the_engine_did(watched: dict[str, Any]) -> None:
    (figures,) = models_in(watched["page"], "here")
    told = dict(status.rows(figures))
    freed = (21 - 6) + (9 - 3) + 3
    assert told["weights"].startswith("not compressed")
    assert told["policy"] == "snap_kv, keep 0.25"
    assert told["KV bytes a token"] == f"{TOKEN_BYTES:,} -> {TOKEN_BYTES // 4:,} (0.250)"
    assert told["requests now"] == "0 running, 0 waiting"
    assert told["preemptions"] == "0"
    assert told["saved now"] == "0.0 MiB; running requests hold 100.0% of their blocks"
    assert told["given back in all"] == f"{freed * BLOCK_BYTES / 2**20:.1f} MiB in {freed} blocks"
    assert told["tokens evicted"] == f"{freed / 36:.1%} of {36 * 32:,} compacted"
    assert told["compactions"].startswith("2 prompts, 3 windows; ")
    assert told["finished requests"] == "3 compacted, 1 opted out"
    assert not status.warnings(figures)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_the_page_tells_it_too(watched: dict[str, Any], tmp_path: Path) -> None:
    """In a browser, so that what its script computes is compared with ``status``."""
    html = Path(page.__file__).with_suffix(".html").read_text(encoding="utf-8")
    with answering({page.ROUTE: html, "/metrics": watched["page"]}) as url:
        shown = subprocess.run(
            [*BROWSER, f"--user-data-dir={tmp_path}", f"http://{url}{page.ROUTE}"],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
    cells = re.findall("<td>(.*?)</td>", shown)
    told = dict(zip(cells[::2], cells[1::2], strict=True))
    (figures,) = models_in(watched["page"], "here")
    wanted = dict(status.rows(figures))
    same = ("policy", "requests now", "preemptions", "given back in all", "finished requests")
    assert [told[name] for name in same] == [wanted[name] for name in same]
    assert told["KV bytes a token"] == wanted["KV bytes a token"].replace("->", "→")
    assert told["tokens evicted"] == wanted["tokens evicted"].replace("%", " %")
    assert shown.count("<polyline points=") == 4


def test_keep_1_saves_nothing_and_says_why(demo_model: Path) -> None:
    seen = watch(
        demo_model,
        kv={"policy": "key_diff", "keep": 1},
        prompts=text_prompts(demo_model, [130]),
        extra=[None],
        max_tokens=4,
        weights=QUICK_WEIGHTS,
        engine={"quantization": "smoothquant_plus"},
    )
    end = seen["end"]
    assert any("method=smoothquant_plus" in key for key in end)
    original, left = (end[f"weight_bytes state={state}"] for state in ("original", "compressed"))
    file = (demo_model / "model.safetensors").stat().st_size
    # 0.46 with vLLM's int8 kernel for AMX, which holds more beside the codes.
    assert original == pytest.approx(file, rel=0.001) and 0.4 < left / original < 0.47
    assert end["kv_skipped_requests_total reason=nothing_to_evict"] == 1
    assert end["kv_freed_blocks_total"] == end["kv_evicted_tokens_total policy=key_diff"] == 0
    (figures,) = models_in(seen["page"], "here")
    assert dict(status.rows(figures))["weights"].startswith("smoothquant_plus, ")
    (warning,) = status.warnings(figures)
    assert "nothing of " in warning and "1 with nothing to evict" in warning


def test_a_diffusion_engine_did_what_the_reference_does(tmp_path: Path) -> None:
    model, section = random_llada(tmp_path, seed=2), {"policy": "elastic", "similarity": "heads"}
    prompts = [list(range(first, 4 * first)) for first in (6, 8, 4, 5)]
    extra = [None, {"compress_gamma": 0.98}, {"compress_tokens_per_step": 2}, {"compress_gamma": 5}]
    memory = 1 << 26
    watched = watch(
        tmp_path,
        diffusion=section,
        prompts=prompts,
        extra=extra,
        max_tokens=20,
        stop=[1],
        engine={
            "dtype": "float32",
            "max_model_len": 256,
            "kv_cache_memory_bytes": memory,
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
        },
    )
    start, end = watched["start"], watched["end"]
    assert watched["refused"] == [3] and end["refused_requests_total reason=diffusion"] == 1
    info = next(key for key in start if key.startswith("info "))
    assert "policy=elastic" in info and "keep=none" in info
    # Keys and values, and half as much for the inputs of all layers.
    token = start["kv_bytes_per_token state=original"]
    assert token == 4 * 2 * 128 * 4 and watched["free"] == memory // (32 * token * 3 // 2) - 1

    layers, steps, refreshes, computed, full = model.shape.n_layers, 0, 0, 0, 0
    tokens = []
    for prompt, asked in zip(prompts[:3], extra[:3], strict=True):
        request = {"prompt": prompt, "max_tokens": 20, "extra": asked or {}}
        released, plans = expected(model, section, request)
        tokens.append(len(released))
        steps += len(plans)
        refreshes += sum(plan.start < layers for plan in plans)
        computed += sum(plan.token_layers(len(prompt) + 20, layers) for plan in plans)
        full += len(plans) * (len(prompt) + 20) * layers
    counted = {
        "steps_total": steps,
        "refreshes_total": refreshes,
        "tokens_total": sum(tokens),
        "token_layers_total state=computed": computed,
        "token_layers_total state=full": full,
        "requests_total": 3,
        "request_steps_total": steps,
    }
    assert {f"diffusion_{name}": value for name, value in counted.items()} == {
        key: value for key, value in end.items() if key.startswith("diffusion_")
    }
    assert all(start[f"diffusion_{name}"] == 0 for name in counted)
    assert tokens[0] < 20  # a stop token ends the first
    assert 3 < refreshes < steps and computed < full


def test_reports_add_up_and_survive_their_journey() -> None:
    first, second = CompressStats(), CompressStats()
    assert first.is_empty() and CompressStats(first.to_dict()).is_empty()
    first.add("kv_compactions", 2, "prompt")
    first.set("kv_kept_ratio", 0.5)
    second.add("kv_compactions", 1, "prompt")
    second.add("kv_compactions", 4, "window")
    second.set("kv_kept_ratio", 0.25)
    second.took(0.1)
    both = CompressStats(first.to_dict()).aggregate(CompressStats(second.to_dict()))
    assert both.data == {
        "counters": {"kv_compactions": {"prompt": 3, "window": 4}},
        "gauges": {"kv_kept_ratio": 0.25},
        "seconds": [0.1],
    }
    assert both.reduce() == {"kv_compactions": 7, "kv_kept_ratio": 0.25}
    assert not CompressStats(both.to_dict()).is_empty() and len({m.name for m in METRICS}) > 10
