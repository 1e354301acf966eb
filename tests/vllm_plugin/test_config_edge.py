# SPDX-License-Identifier: Apache-2.0
"""What users see of the config edge: refusals, the table at start, and figures that are missing."""

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

import vllm_plugin
from compress_common.errors import CompressError
from kv_policies.layout.bounded import BoundedLayout
from tests.support import kv_engine
from tests.support.child import ROOT
from tests.support.logs import logged
from tests.vllm_plugin.kv_cache.conftest import save_bases
from vllm_plugin.exits import is_vllm_command
from vllm_plugin.guard import METHODS, SECTION
from vllm_plugin.kv_cache.beside import beside_of
from vllm_plugin.metrics.facts import facts_of
from vllm_plugin.quantization.config import CONFIGS
from vllm_plugin.self_check import _beside, table
from vllm_plugin.settings import KEY, parse_settings

SNAP = {"compress": {"kv": {"policy": "snap_kv", "keep": 0.25}}}


def configure(model: Path | str, **engine: Any) -> VllmConfig:
    vllm_plugin.register()
    args = {"enforce_eager": True, "max_model_len": 512} | engine
    return EngineArgs(model=str(model), **args).create_engine_config()


@pytest.fixture
def pickled(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A model whose weights are in pytorch_model.bin, which vLLM reads and we do not."""
    source, folder = tiny_model("llama"), tmp_path / "pickled"
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file)
    torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


def test_the_guard_knows_our_names() -> None:
    """It cannot import them."""
    assert SECTION == KEY
    assert set(METHODS) == {config.method for config in CONFIGS}


def test_a_plugin_that_failed_half_way_refuses_its_methods(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers import quantization

    from vllm_plugin.kv_cache import manager

    def fail() -> None:
        raise AttributeError("a seam moved")

    stock = getattr(EngineArgs.create_engine_config, "__wrapped__", EngineArgs.create_engine_config)
    methods = [name for name in quantization.QUANTIZATION_METHODS if name not in METHODS]
    monkeypatch.setattr(quantization, "QUANTIZATION_METHODS", methods)
    monkeypatch.setattr(EngineArgs, "create_engine_config", stock)
    monkeypatch.setattr(manager, "register", fail)
    for name, value in {"_registered": False, "_disabled": None, "_vllm_methods": None}.items():
        monkeypatch.setattr(vllm_plugin, name, value)
    vllm_plugin.register()
    assert "smoothquant_plus" in methods  # registered before the failure
    assert vllm_plugin.why_disabled() == "AttributeError: a seam moved"
    with pytest.raises(RuntimeError, match="--quantization smoothquant_plus needs .* a seam moved"):
        EngineArgs(model=str(demo_model), quantization="smoothquant_plus").create_engine_config()


@pytest.mark.parametrize(
    ("model", "engine", "expected"),
    [
        ("{}", {"quantization": "smoothquant"}, "did you mean 'smoothquant_plus'?"),
        ("{} ", {"additional_config": SNAP}, "has spaces around its name"),
        ("{}/model.gguf", {"additional_config": SNAP}, "is a file; give the folder"),
        ("{}/model.gguf", {"quantization": "rtn"}, "is a file; give the folder"),
        ("{}", {"additional_config": {"kv": SNAP["compress"]["kv"]}}, "put it into 'compress'"),
        ("{}/absent", {"quantization": "rtn"}, "absent' does not exist; give a folder or a hub id"),
    ],
)
def test_a_wrong_name_is_one_line(
    tmp_path: Path, model: str, engine: dict[str, Any], expected: str
) -> None:
    (tmp_path / "model.gguf").touch()
    vllm_plugin.register()
    args = EngineArgs(model=str(tmp_path), **engine)
    args.model = model.format(tmp_path)  # offline, vLLM itself looks for it before that
    with pytest.raises(CompressError) as caught:
        args.create_engine_config()
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_json_beside_dotted_flags_is_refused(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM drops the JSON without a word, and with it what was to be compressed."""
    dotted = ["--additional-config.compress.weights.group_size", "64"]
    arguments = ["script", "serve", "m", f"--additional_config={json.dumps(SNAP)}", *dotted]
    monkeypatch.setattr(sys, "argv", arguments)
    config: dict[str, Any] = {"compress": {"weights": {"group_size": 64}}}
    with pytest.raises(CompressError, match="as JSON and with dotted flags"):
        configure(demo_model, quantization="rtn", additional_config=config)
    partial = {"compress": {"kv": {"keep": 0.5}}}  # the policy is in the JSON
    with pytest.raises(CompressError) as caught:
        configure(demo_model, additional_config=partial)
    assert len(caught.value.problems) == 1 and "dotted" in str(caught.value)
    others = ["vllm", "serve", "llama-compress", "--additional-config", '{"a": 1}']
    monkeypatch.setattr(sys, "argv", [*others, "--additional-config.b", "2"])
    configure(demo_model)  # nothing of ours is dropped
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "m", *dotted])
    configure(demo_model, quantization="rtn", additional_config=config)


def test_all_problems_of_all_sections_are_listed(demo_model: Path) -> None:
    section = {"kv": {"polici": "snap_kv", "keep": 25}, "weights": {"groupsize": 64}}
    with pytest.raises(CompressError) as caught:
        configure(demo_model, quantization="smothquant_plus", additional_config={KEY: section})
    assert "unknown" in str(caught.value) and "smoothquant_plus'" in str(caught.value)
    with pytest.raises(CompressError) as caught:
        configure(demo_model, quantization="smoothquant_plus", additional_config={KEY: section})
    for part in ("'polici'; did you mean 'policy'?", "compress.kv.keep", "'groupsize'; did you"):
        assert part in str(caught.value), part


def test_a_refusal_ends_the_vllm_command_and_is_raised_elsewhere(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"compress": {"kv": {"policy": "snapkv", "keep": 0.25}}}
    assert not is_vllm_command()
    with pytest.raises(CompressError, match="did you mean 'snap_kv'"):
        configure(demo_model, additional_config=wrong)
    main = types.ModuleType("__main__")
    main.__spec__ = None
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/vllm", "serve"])
    with pytest.raises(SystemExit) as caught:
        configure(demo_model, additional_config=wrong)
    assert str(caught.value.code).startswith("error: unknown KV policy 'snapkv'")


@pytest.mark.slow
def test_the_last_screen_of_vllm_serve_is_ours_alone(demo_model: Path) -> None:
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(demo_model)]
    command += ["--additional-config.compress.kv.policy", "snapkv"]
    command += ["--additional-config.compress.kv.keep", "0.25"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: unknown KV policy 'snapkv'")


def test_a_refusal_inside_a_pydantic_error_is_ours(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """vLLM asks our quantization config while it validates its own."""
    from quant_methods.formats.writing import quantize_checkpoint
    from quant_methods.plan_request import PlanRequest

    request = PlanRequest(method="rtn", settings={"group_size": 32})
    quantize_checkpoint(tiny_model("llama"), tmp_path / "int4", request)
    with pytest.raises(CompressError) as caught:
        configure(tmp_path / "int4", quantization="smoothquant_plus")
    assert "remove the flag to serve it as is" in str(caught.value)
    assert "validation error" not in str(caught.value)


def test_an_empty_section_says_that_nothing_is_compressed(
    demo_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with logged(caplog, "vllm_plugin.self_check"):
        configure(demo_model, additional_config={"compress": {}})
        assert "nothing: the section 'compress' of --additional-config is empty" in caplog.text
        caplog.clear()
        configure(demo_model)
        configure(demo_model, additional_config={"of_another_plugin": {"enabled": True}})
        configure(demo_model, additional_config=SNAP)  # its scheduler logs the table
        assert "compress" not in caplog.text


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_bytes_that_are_not_known_keep_no_engine_from_starting(
    pickled: Path, load_format: str
) -> None:
    config = configure(pickled, additional_config=SNAP, load_format=load_format)
    facts = facts_of(config)
    assert facts.info["policy"] == "snap_kv" and facts.info["keep"] == "0.25"
    assert facts.gauges["kv_bytes_per_token", "original"] == 2 * 2 * 2 * 32 * 2
    assert not any(name == "weight_bytes" for name, _ in facts.gauges)
    rows = dict(table(config, parse_settings(config.additional_config), 1000))
    assert rows["weights"] == "not compressed, bytes not known"
    assert rows["KV bytes a token"].endswith("(0.250)")


def test_facts_name_the_prompt_window(demo_model: Path) -> None:
    kv = {"policy": "snap_kv", "budget": 256, "decode_window": 64, "prompt_window": 320}
    found = facts_of(configure(demo_model, additional_config={"compress": {"kv": kv}}))
    assert (found.info["budget"], found.info["prompt_window"]) == ("256", "320")
    assert facts_of(configure(demo_model, additional_config=SNAP)).info["prompt_window"] == "none"


def test_the_table_says_what_the_engine_keeps_free(demo_model: Path) -> None:
    """Of the stage that keeps most, and with an FP8 cache a step's queries too."""
    kv = {"policy": "h2o", "budget": 256, "decode_window": 64}
    config = configure(demo_model, additional_config={"compress": {"kv": kv}}, max_model_len=8192)
    settings = parse_settings(config.additional_config).kv
    assert settings is not None
    policy: Any = settings.build()
    # One layer observes long prompts whole; those of the other stage store more queries.
    cut = BoundedLayout(32, 256, 64, prompt_window=320)
    layouts = {0: BoundedLayout(32, 256, 64), **dict.fromkeys(range(15, 30), cut)}
    config.parallel_config.pipeline_parallel_size = 2
    first, second = (
        beside_of(config, policy, layouts, stage) for stage in (range(15), range(15, 30))
    )
    assert first.observed > second.observed and first.total < second.total
    config.cache_config.cache_dtype = "fp8"
    fp8 = beside_of(config, policy, layouts, range(15, 30))
    itemsize = config.model_config.dtype.itemsize
    assert fp8.step == config.scheduler_config.max_num_batched_tokens * 9 * 64 * itemsize
    ((_, told),) = _beside(config, settings, layouts)
    assert told.startswith(f"{fp8.total / 2**20:.1f} MiB on each rank")


@pytest.mark.slow
def test_engines_on_pickled_and_on_dummy_weights(pickled: Path) -> None:
    kv = {"policy": "snap_kv", "keep": 0.25, "min_prompt": 64}
    prompt = [[3 + at % 400 for at in range(200)]]
    cases = [
        {"kv": kv, "prompts": prompt, "engine": {"load_format": load_format}}
        for load_format in ("auto", "dummy")
    ]
    for said in kv_engine.run(pickled, cases):
        assert sum(said["freed"]) > 0 and said["free_after"] == said["free_before"]


def test_bases_are_refused_where_weights_cannot_be_checked(
    pickled: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from fractions import Fraction

    bases = save_bases(tiny_model("llama"), tmp_path / "kv.safetensors", Fraction(1, 2))
    section = {"compress": {"kv": {"policy": "cskv", "bases": str(bases)}}}
    with pytest.raises(CompressError, match="bases cannot be checked against these weights"):
        configure(pickled, additional_config=section)
    (pickled / "pytorch_model.bin").unlink()  # as with --load-format dummy
    configure(pickled, additional_config=section, load_format="dummy")
