# SPDX-License-Identifier: Apache-2.0
"""`vllm-compress doctor`: what it looks at, what it finds wrong, and its exit code."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from hypothesis import given
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import quantization

import vllm_plugin
from quant_methods.formats.writing import quantize_checkpoint
from quant_methods.plan_request import PlanRequest
from tests.vllm_plugin.kv_cache.conftest import save_bases, save_profile
from vllm_plugin.cli import main
from vllm_plugin.commands.checks import (
    Check,
    installation,
    model_checks,
    ranges,
)
from vllm_plugin.commands.doctor import show
from vllm_plugin.guard import METHODS
from vllm_plugin.seams import broken_seams

SNAP = {"policy": "snap_kv", "keep": 0.25}


def checks(
    model: Path, kv: dict[str, Any] | None = None, slow: tuple[str, ...] = (), **engine: Any
) -> dict[str, str]:
    """What was found, by name. All of it must be ok, but for what must be ``slow``."""
    installation()  # loads the plugin
    config = {"compress": {"kv": kv}} if kv else {}
    found = model_checks(EngineArgs(model=str(model), additional_config=config, **engine))
    assert {check.status for check in found if check.name not in slow} == {"ok"}, found
    assert all(check.status == "slow" for check in found if check.name in slow)
    return {check.name: check.found for check in found}


def test_this_installation_is_well() -> None:
    found = {check.name: check for check in installation()}
    assert all(check.ok for check in found.values()), found
    assert found["vLLM"].found == vllm.__version__
    assert found["plugin"].found.endswith("vllm_plugin:register")
    assert "smoothquant_plus" in found["plugin loaded"].found


def test_a_processor_without_avx512_is_slow() -> None:
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512" or platform.machine() != "x86_64"
    [device] = [check for check in installation() if check.name == "device"]
    assert device.status == ("ok" if fast else "slow")
    assert fast or "--dtype float32" in device.found


def test_memory_that_is_not_free_is_a_problem(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM says so after two minutes, in the middle of a long log."""
    args = {"model": str(demo_model), "max_model_len": 256}
    status = {c.name: c for c in model_checks(EngineArgs(**args))}
    assert "memory" not in status  # VLLM_CPU_KVCACHE_SPACE says what the cache takes
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    for share, expected in ((0.01, "ok"), (1.0, "problem")):
        engine = EngineArgs(**args, gpu_memory_utilization=share)
        [memory] = [c for c in model_checks(engine) if c.name == "memory"]
        assert memory.status == expected
        assert ("set VLLM_CPU_KVCACHE_SPACE" in memory.found) == (expected == "problem")


def test_a_disabled_plugin_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where registration fails before it has told vLLM of anything."""
    installation()  # loads the plugin
    theirs = {
        name: kind
        for name, kind in quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.items()
        if name not in METHODS
    }
    names = [name for name in quantization.QUANTIZATION_METHODS if name not in METHODS]
    monkeypatch.setattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", theirs)
    monkeypatch.setattr(quantization, "QUANTIZATION_METHODS", names)
    stock = EngineArgs.create_engine_config
    monkeypatch.setattr(EngineArgs, "create_engine_config", stock)  # as it is after the test
    monkeypatch.setitem(sys.modules, "vllm_plugin.kv_cache.manager", None)
    monkeypatch.delattr("vllm_plugin.kv_cache.manager")
    monkeypatch.setattr(vllm_plugin, "_registered", False)
    monkeypatch.setattr(vllm_plugin, "_disabled", None)
    monkeypatch.setattr(vllm_plugin, "_vllm_methods", None)
    vllm_plugin.register()
    (found,) = (check for check in installation() if check.name == "plugin loaded")
    assert not found.ok and "disabled: ModuleNotFoundError: " in found.found


def test_a_seam_that_moved_is_named() -> None:
    manager = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"
    broken = broken_seams(
        {
            f"{manager}.no_longer_there": (),
            "vllm.no_longer_there:Worker": (),
            f"{manager}.pop_blocks_for_free": ("request",),
        }
    )
    assert len(broken) == 3
    assert "no_longer_there is gone" in broken[0]
    assert "vllm.no_longer_there:Worker is gone" in broken[1]
    assert broken[2].endswith("takes request_id; expected request")


def test_a_compressed_model(demo_model: Path) -> None:
    found = checks(demo_model, SNAP, quantization="smoothquant_plus")
    assert found["block size"] == "32 tokens"
    assert found["kernel of q+k+v"].startswith("CpuInt4LinearKernel")
    assert found["kernel of down"].endswith("1536 x 576, groups of 128")
    assert found["weights"].startswith("smoothquant_plus, 256.6 -> 1")
    assert found["KV bytes a token"] == "23,040 -> 5,760 (0.250)"
    assert found["compacted"].startswith("prompts from 128 tokens on")
    assert found["keep 0.250"] == "layers 0 to 29"


def test_a_budget_is_told_in_tokens_and_bytes(demo_model: Path) -> None:
    kv = {"policy": "r_kv", "budget": 1024}
    found = checks(demo_model, kv, max_num_seqs=16)
    # 23,040 bytes a token; a window of 256 and a block of 32 come on top.
    assert found["budget"] == (
        "1,024 tokens of a request in each layer, 22.5 MiB; 28.8 MiB at most while it generates"
    )
    assert found["budget 1,024 tokens"] == "layers 0 to 29"
    stored = 30 * 17 * 8 * 9 * 64 * 2 / 2**20
    told = f"{stored:.1f} MiB of it for queries that score decode windows, of 16 requests"
    assert told in found["beside the KV cache"]
    assert "queries" not in checks(demo_model, SNAP)["beside the KV cache"]


@pytest.mark.parametrize(
    ("dtype", "reader"),
    [("bfloat16", "the kernel"), ("float32", "torch, slowly: the kernel reads bf")],
)
def test_what_reads_latents(demo_model: Path, tmp_path: Path, dtype: str, reader: str) -> None:
    bases = save_bases(demo_model, tmp_path / "kv.safetensors", Fraction(4, 5))
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        reader = "torch, slowly: "
    slow = ("latents",) if reader.startswith("torch") else ()
    found = checks(demo_model, {"policy": "cskv", "bases": str(bases)}, slow, dtype=dtype)
    assert found["latents"].startswith(f"read by {reader}")


def test_what_is_slow_is_told_once_and_is_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "read by torch, slowly: no C++ compiler; install g++"
    show([Check("vLLM", True, "0.32.0"), Check("latents", True, reason, slow=True)])
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == f"slow: latents: {reason}"
    assert shown.count("torch") == 1 and "0.32.0" in shown


@given(st.sets(st.integers(0, 40)))
def test_ranges_name_each_layer_once(layers: set[int]) -> None:
    told: list[int] = []
    for part in filter(None, ranges(sorted(layers)).split(", ")):
        first, _, last = part.partition(" to ")
        told += range(int(first), int(last or first) + 1)
    assert told == sorted(layers)


def test_levels_of_a_profile_and_what_is_left_alone(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    model = tiny_model("gemma3", num_hidden_layers=4, layer_types=kinds)
    profile = save_profile(model, tmp_path / "kv.json", Fraction(1, 2), 2)
    found = checks(model, {"policy": "prefix_kv", "profile": str(profile)})
    assert found["keep 0.250"] == "layer 1"
    assert found["keep 0.750"] == "layer 3"
    assert found["KV cache"].startswith("prefix_kv, 2 of 4 layers")
    assert found["weights"].startswith("not compressed, ")


def test_a_written_checkpoint(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    request = PlanRequest(method="rtn", settings={"group_size": 64, "symmetric": True})
    quantize_checkpoint(tiny_model("llama"), tmp_path / "int4", request)
    found = checks(tmp_path / "int4")
    assert found["kernel of gate+up"].endswith("128 x 512, groups of 64")
    assert found["weights"].startswith("rtn, ")
    assert found["KV cache"].startswith("not compressed, ")


@pytest.mark.parametrize("content", ["half", "a damaged header"])
def test_a_written_checkpoint_that_is_incomplete(
    tiny_model: Callable[..., Path], tmp_path: Path, content: str
) -> None:
    request = PlanRequest(method="rtn", settings={"group_size": 64, "symmetric": True})
    quantize_checkpoint(tiny_model("llama"), tmp_path / "int4", request)
    (file,) = (tmp_path / "int4").glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:5000] if content == "half" else b"\xff" * 8 + whole[8:])
    installation()  # loads the plugin
    (problem,) = model_checks(EngineArgs(model=str(tmp_path / "int4")))
    assert not problem.ok
    assert f"{file.name} is damaged or incomplete" in problem.found
    assert problem.found.endswith("fetch the checkpoint again")


def test_a_model_that_would_be_refused(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(demo_model), "--policy", "snap_vk", "--keep", "0.25"]
    monkeypatch.setattr(sys, "argv", ["vllm-compress", "doctor", *arguments])
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # gone after the test
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("problem: engine arguments: ") and "did you mean 'snap_kv'?" in last


def test_an_installation_without_the_plugin(demo_model: Path) -> None:
    """In a process of its own: in this one the plugin is loaded."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_PLUGINS": "other"}
    command = [sys.executable, "-m", "vllm_plugin.cli", "doctor", str(demo_model), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 1, done.stderr
    content = json.loads(done.stdout)
    assert content["ok"] is False
    wrong = {check["name"]: check["found"] for check in content["checks"] if not check["ok"]}
    assert set(wrong) == {"VLLM_PLUGINS", "plugin loaded"}
    assert "add compress to it" in wrong["VLLM_PLUGINS"]
