# SPDX-License-Identifier: Apache-2.0
"""`vllm-compress plan` against what an engine really takes, and its errors."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from quant_methods.formats.writing import quantize_checkpoint
from tests.support.child import SINGLE_PROCESS, in_child
from tests.support.kv_engine import ENGINE
from tests.support.kv_prompts import text_prompts
from vllm_plugin.settings import WeightSettings

PROMPT, CONTEXT = 1575, 1800  # seven eighths of it are prompt, as the self-check assumes
# Bytes do not depend on how well it is calibrated.
SECTION: dict[str, Any] = {
    "weights": {"alpha": 0.5, "clip": False, "calibration": {"samples": 2, "length": 16}},
    "kv": {"policy": "snap_kv", "keep": 0.25},
}


@pytest.fixture
def plan(run: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str]]:
    """Run the command; its exit code and all that it printed."""

    def plan(*arguments: object) -> tuple[int, str]:
        code, output, errors = run("plan", *arguments)
        return code, output + errors

    return plan


@pytest.mark.slow
def test_figures_are_those_of_running_engines(
    plan: Callable, demo_model: Path, tmp_path: Path
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    import vllm_plugin
    from vllm_plugin.capacity.footprint import weight_footprint
    from vllm_plugin.commands.checks import model_checks
    from vllm_plugin.quantization.cpu_int4 import resolve_activations

    vllm_plugin.register()
    predicted = model_checks(EngineArgs(model=str(demo_model), quantization="smoothquant_plus"))
    code, text = plan(
        demo_model,
        *("--gpu-memory", "512MiB", "--gpu-memory-utilization", "1", "--activation-memory", "0B"),
        *("--context", str(CONTEXT), "--prompt", str(PROMPT), "--block-size", "32"),
        *("--quantization", "smoothquant_plus", "--packing", f"cpu-{resolve_activations()}"),
        *("--policy", "snap_kv", "--keep", "0.25", "--json"),
    )
    assert code == 0, text
    planned = json.loads(text.splitlines()[-1])
    int4 = tmp_path / "int4"
    request = WeightSettings(**SECTION["weights"]).request("smoothquant_plus", 1)
    quantize_checkpoint(demo_model, int4, request)
    prompts = text_prompts(demo_model, [PROMPT])
    for name, config, quantization in (
        ("without", {}, None),
        ("with", {"compress": SECTION}, "smoothquant_plus"),
    ):
        column = planned[name]
        engine = ENGINE | {
            "additional_config": config,
            "quantization": quantization,
            "kv_cache_memory_bytes": column["kv_memory"],
            "max_model_len": CONTEXT,
        }
        case = {"model": str(demo_model), "engine": engine, "prompt": prompts[0]}
        environment = os.environ | SINGLE_PROCESS | {"OMP_NUM_THREADS": "1"}
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
        measured = in_child(_measure, case, env=environment, timeout=300)
        assert column["block_bytes"] == measured["block_bytes"]
        assert column["blocks"] == measured["blocks"]
        assert column["peak_blocks"] == max(measured["used"])
        # The step that ends the prompt is the first; its blocks go back in the second.
        assert column["decoding_blocks"] == max(measured["used"][2:])
    original, written = tensor_bytes(demo_model), tensor_bytes(int4)
    assert planned["without"]["weights"] == pytest.approx(original, rel=0.001)
    assert planned["with"]["weights"] == pytest.approx(measured["parameters"], rel=0.001)
    unpacked = weight_footprint(demo_model, "smoothquant_plus")
    assert unpacked is not None
    assert unpacked.compressed == pytest.approx(written, rel=0.001)
    # What `doctor` and the table at start say of the same engine.
    assert measured["kernels"] == [
        check.found.partition(",")[0] for check in predicted if check.name == "kernel of q+k+v"
    ]
    table = dict(measured["table"])
    before, after = (planned[name]["weights"] / 2**20 for name in ("without", "with"))
    assert f"{before:.1f} -> {after:.1f} MiB" in table["weights"]
    assert table["KV bytes a token"].startswith("23,040 -> 5,760")
    assert f"-> {planned['with']['requests']} of 1,800 tokens" in table["requests that fit"]
    assert planned["with"]["weights"] < 0.47 * planned["without"]["weights"]
    assert planned["with"]["requests"] > 2.5 * planned["without"]["requests"]
    assert planned["with"]["beside_cache"] == measured["beside_cache"]


def test_a_budget_bounds_a_request_that_decodes(plan: Callable, demo_model: Path) -> None:
    options = ("--gpu-memory", "2GB", "--policy", "snap_kv", "--budget", "1024", "--block-size", 32)
    found = []
    for context in ("4000", "8000"):
        code, text = plan(demo_model, *options, "--context", context, "--prompt", "2000", "--json")
        assert code == 0, text
        found.append(json.loads(text.splitlines()[-1])["with"])
    # The budget, a window, and the block that is being filled.
    assert found[0]["decoding_blocks"] == found[1]["decoding_blocks"] <= (1024 + 256 + 32) // 32
    code, text = plan(demo_model, *options, "--context", "8000", "--prompt", "4000", "--json")
    longer = json.loads(text.splitlines()[-1])["with"]
    assert 2 * longer["kv_bytes_per_token"] == pytest.approx(found[0]["kv_bytes_per_token"], abs=1)
    options += ("--context", "8000", "--prompt", "7000", "--max-num-batched-tokens", "512")
    cut = ("--additional-config", '{"compress": {"kv": {"prompt_window": 2048}}}')
    whole, windowed = (
        json.loads(plan(demo_model, *options, *more, "--json")[1].splitlines()[-1])["with"]
        for more in ((), cut)
    )
    # The window, the steps in flight, and a block that it begins in.
    assert (whole["peak_blocks"], windowed["peak_blocks"]) == (219, (2048 + 2 * 512) // 32 + 1)
    on_cpu = json.loads(plan(demo_model, *options, *cut, "--packing", "cpu-bf16", "--json")[1])
    assert on_cpu["with"]["peak_blocks"] == (2048 + 512) // 32 + 1
    _, text = plan(demo_model, *options, *cut)
    assert "Prompts of more than 2,048 tokens are compacted while they are computed." in text
    assert "needs all its blocks" not in text
    assert max(whole["decoding_blocks"], windowed["decoding_blocks"]) <= (1024 + 256 + 32) // 32


def test_stored_queries_leave_less_for_the_cache(plan: Callable, demo_model: Path) -> None:
    """Of the demo model: 8 queries of 9 heads of 64 numbers, of one request more than may run."""
    options = ("--gpu-memory", "4GiB", "--context", "8000", "--budget", "1024", "--block-size", 32)
    found = {}
    for policy, sequences in (("key_diff", 256), ("r_kv", 256), ("r_kv", 512)):
        arguments = (demo_model, *options, "--policy", policy, "--max-num-seqs", sequences)
        found[policy, sequences] = json.loads(plan(*arguments, "--json")[1])["with"]
    for (policy, sequences), column in found.items():
        stored = 30 * (sequences + 1) * 8 * 9 * 64 * 2 if policy == "r_kv" else 0
        assert column["stored_queries"] == stored
        assert column["beside_cache"] >= stored + (128 << 20)
    less = [column["kv_memory"] + column["beside_cache"] for column in found.values()]
    assert len(set(less)) == 1
    _, text = plan(*arguments)
    assert "memory beside the KV cache" in text
    stored = found["r_kv", 512]["stored_queries"] / 2**20
    assert f"{stored:,.1f} MiB are queries that score decode windows, stored for 512" in text


def test_the_table_says_what_a_prompt_needs(plan: Callable, demo_model: Path) -> None:
    options = ("--context", "8K", "--policy", "recent", "--keep", ".5")
    code, text = plan(demo_model, "--gpu-memory", "2GB", *options)
    assert code == 0, text
    assert "7,168 tokens of prompt, 8,192 in all" in text
    assert "A prompt needs all its blocks while it is computed" in text
    assert "Not one such prompt fits" not in text
    code, text = plan(demo_model, "--gpu-memory", "1GB", *options)
    assert code == 1
    assert "take all of the memory" in text  # the allowance alone is more


def test_only_what_is_compacted_is_said_to_be(plan: Callable, demo_model: Path) -> None:
    options = ("--gpu-memory", "2GB", "--context", "8K", "--quantization", "smoothquant_plus")
    _, text = plan(demo_model, *options)
    assert "then it is compacted" not in text


def test_a_folder_that_does_not_exist_is_not_a_hub_id(plan: Callable) -> None:
    code, text = plan("./nowhere", "--gpu-memory", "2GB", "--context", "8K")
    assert code == 1
    assert "model folder ./nowhere does not exist" in text


def test_all_problems_at_once(plan: Callable, demo_model: Path) -> None:
    """Those of the command line alone come first: they need no torch."""
    code, text = plan("./nowhere", "--gpu-memory", "80Gix", "--context", "4k", "--prompt", "5k")
    assert code == 1
    for expected in (
        "3 problems",
        "./nowhere does not exist",
        "--gpu-memory '80Gix' is not a size",
        "--prompt 5000 leaves no room",
    ):
        assert expected in text
    wrong = ("--policy", "snap_vk", "--keep", "0.25", "--quantization", "smothquant_plus")
    code, text = plan(demo_model, "--gpu-memory", "80GiB", "--context", "4k", *wrong)
    assert code == 1
    for expected in (
        "2 problems",
        "did you mean 'smoothquant_plus'?",
        "did you mean 'snap_kv'?",
    ):
        assert expected in text
    wrong = ("--additional-config", '{"compress": {"kv": 3}}', "--keep", "0.1")
    code, text = plan(demo_model, "--gpu-memory", "80GiB", "--context", "4k", *wrong)
    assert code == 1 and "compress.kv" in text
    code, text = plan("nobody/has-this-model", "--gpu-memory", "80GiB", "--context", "4k")
    assert code == 1
    assert "`plan` downloads nothing" in text
    code, text = plan(demo_model, "--gpu-memory", "80GiB", "--context", "1")
    assert code == 1 and "--context 1 has no room for a prompt and an answer" in text


@pytest.mark.parametrize("option", ["--gpu-memory", "--activation-memory"])
def test_memory_needs_a_unit(plan: Callable, demo_model: Path, option: str) -> None:
    given = {"--gpu-memory": "80GiB"} | {option: "80"}
    code, text = plan(demo_model, "--context", "4k", *sum(given.items(), ()))
    assert code == 1
    assert f"error: {option} '80' has no unit; give one, such as 80GiB" in text


def test_a_context_above_the_model_is_warned_of(plan: Callable, demo_model: Path) -> None:
    memory = ("--gpu-memory", "4GiB")
    _, text = plan(demo_model, *memory, "--context", "8192")
    assert "Warning" not in text
    _, text = plan(demo_model, *memory, "--context", "9000")
    assert "Warning: --context 9,000 is more than the model's 8,192 positions" in text
    _, text = plan(demo_model, *memory, "--context", "9000", "--json")
    assert "warning: --context 9,000 is more" in text
    assert json.loads(text.splitlines()[0])["context"] == 9000


def test_without_compression_there_is_nothing_to_compare(plan: Callable, demo_model: Path) -> None:
    _, text = plan(demo_model, "--gpu-memory", "4GiB", "--context", "4k")
    assert "Nothing is compressed: give --policy" in text
    assert "factor" not in text


def test_memory_of_a_request_is_in_bytes(plan: Callable, demo_model: Path) -> None:
    """Blocks of different sizes cannot be compared."""
    options = ("--context", "4096", "--prompt", "4000", "--policy", "recent", "--keep", ".25")
    arguments = (demo_model, "--gpu-memory", "4GiB", *options)
    column = json.loads(plan(*arguments, "--json")[1])["with"]
    _, text = plan(*arguments)
    for name in ("peak", "decoding"):
        size = column[f"{name}_blocks"] * column["block_bytes"] / 2**20
        assert f" {size:,.1f} MiB" in text


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors of a checkpoint, which a CPU's engine packs in another way."""
    files = folder.glob("*.safetensors")
    return sum(tensor.nbytes for file in files for tensor in load_file(file).values())


def _measure(request: dict[str, Any]) -> dict[str, Any]:
    """In a child: one engine, one request, its blocks after each step."""
    from vllm import LLM, SamplingParams, TokensPrompt

    from vllm_plugin import self_check
    from vllm_plugin.settings import parse_settings

    llm = LLM(request["model"], **request["engine"])
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    worker = core.model_executor.driver_worker.worker
    parameters = {p.data_ptr(): p.nbytes for p in worker.model_runner.get_model().parameters()}
    config = core.scheduler.kv_cache_config
    schemes = [m.scheme for m in worker.model_runner.get_model().modules() if hasattr(m, "scheme")]
    settings = parse_settings(engine.vllm_config.additional_config)
    sampling = SamplingParams(
        temperature=0, max_tokens=CONTEXT - PROMPT, ignore_eos=True, detokenize=False
    )
    engine.add_request("0", TokensPrompt(prompt_token_ids=request["prompt"]), sampling)
    used = []
    while engine.has_unfinished_requests():
        engine.step()
        if core.scheduler.running:
            used.append(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
    return {
        "parameters": sum(parameters.values()),
        "blocks": config.num_blocks,
        "block_bytes": config.kv_cache_tensors[0].size // config.num_blocks,
        "used": used,
        "beside_cache": getattr(worker, "_transient", lambda: 0)(),
        "kernels": sorted({type(scheme.kernel).__name__ for scheme in schemes}),
        "table": self_check.table(engine.vllm_config, settings, config.num_blocks),
    }
