# SPDX-License-Identifier: Apache-2.0
"""Checkpoints written and read back; bad input; interruption."""

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress_common.calibration import memory, texts
from compress_common.calibration.text import CalibrationSettings
from compress_common.checkpoints import shards
from compress_common.checkpoints.checkpoint import Checkpoint, resolve
from compress_common.errors import CompressError
from quant_methods import planning
from quant_methods.base import GridSettings
from quant_methods.formats import writing
from quant_methods.formats.packing import from_awq, from_compressed_tensors
from quant_methods.formats.plan_file import plan_digest
from quant_methods.formats.writing import estimate, quantize_checkpoint
from quant_methods.grid import Grid
from quant_methods.plan_request import PlanRequest
from quant_methods.planning import obtain_plan
from tests.support.interrupting import random_numbers

QUICK = CalibrationSettings(samples=2, length=16)


def request_for(**settings: object) -> PlanRequest:
    return PlanRequest(settings={"group_size": 64, "alpha": 0.5} | settings, calibration=QUICK)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("format_name", ["compressed-tensors", "awq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_written_weights_are_the_plans(
    tiny_model: Callable[..., Path], tmp_path: Path, format_name: str, symmetric: bool
) -> None:
    source, target = tiny_model("qwen2"), tmp_path / "out"
    request = request_for(symmetric=symmetric)
    report = quantize_checkpoint(source, target, request, format_name=format_name)
    checkpoint = Checkpoint(source)
    if format_name == "awq":
        request = request_for(symmetric=symmetric, uniform=True)
    plan, cached = obtain_plan(checkpoint, request)
    assert cached
    written = Checkpoint(target)
    tensors = dict(written.tensors(written.files))
    read = from_awq if format_name == "awq" else from_compressed_tensors
    for name, weight in checkpoint.tensors(f"{n}.weight" for n in plan.grids):
        linear = name.removesuffix(".weight")
        parts = {k.rpartition(".")[2]: t for k, t in tensors.items() if k.startswith(linear + ".")}
        back = read(parts, Grid(64, symmetric))
        assert torch.equal(
            back.dequantize(), plan.quantized(linear, weight, torch.bfloat16).dequantize()
        )
    assert report["weight_bytes_after"] < report["weight_bytes_before"]
    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == format_name
    assert config["quantization_config"]["vllm_compress"]["method"] == "smoothquant_plus"
    assert json.loads((target / "report.json").read_text()) == report
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "out"]


def test_vectors_keep_their_type(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """As a router's bias must: its experts differ by less than 16 bits tell apart."""
    source, target = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_model("qwen2"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-4
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantize_checkpoint(source, target, PlanRequest(method="rtn", settings={"group_size": 64}))
    written = Checkpoint(target)
    ((_, norm),) = written.tensors(["model.norm.weight"])
    assert norm.dtype == torch.float32
    assert torch.equal(norm, tensors["model.norm.weight"])


def test_an_interrupted_run_goes_on(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, whole = tiny_model("llama"), tmp_path / "out", tmp_path / "whole"
    monkeypatch.setattr(shards, "SHARD_BYTES", 200_000)
    quantize_checkpoint(source, whole, request_for())
    count = len(list(whole.glob("*.safetensors")))
    assert count > 3
    stop, written = random_numbers().randrange(1, count), list[str]()
    save = shards.save_tensors

    def save_some(tensors: dict, file: Path, **kwargs: object) -> None:
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(file.name)
        save(tensors, file, **kwargs)

    monkeypatch.setattr(shards, "save_tensors", save_some)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, target, request_for())
    assert not target.exists()
    written.clear()

    def save_rest(tensors: dict, file: Path, **kwargs: object) -> None:
        written.append(file.name)
        save(tensors, file, **kwargs)

    monkeypatch.setattr(shards, "save_tensors", save_rest)
    quantize_checkpoint(source, target, request_for())
    assert len(written) == count - stop
    for file in whole.glob("*.safetensors"):
        first, second = load_file(file), load_file(target / file.name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[k], second[k]) for k in first)


def test_shards_of_a_plan_that_is_lost_are_not_kept(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is deleted between the runs, and the same request gives another plan."""
    source, target, whole = tiny_model("qwen2"), tmp_path / "out", tmp_path / "whole"
    monkeypatch.setattr(shards, "SHARD_BYTES", 200_000)
    save, saved = shards.save_tensors, []

    def save_three(*args: object, **kwargs: object) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(args)
        save(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "save_tensors", save_three)
        quantize_checkpoint(source, target, request_for())
    first, _ = obtain_plan(Checkpoint(source), request_for())
    shutil.rmtree(tmp_path / "cache")
    sampled = texts.sampled_tokens
    monkeypatch.setattr(texts, "sampled_tokens", lambda *args: (sampled(*args) + 1) % 1000)
    second, stored = obtain_plan(Checkpoint(source), request_for())
    assert not stored and plan_digest(first) != plan_digest(second)
    assert plan_digest(obtain_plan(Checkpoint(source), request_for())[0]) == plan_digest(second)
    quantize_checkpoint(source, target, request_for())
    quantize_checkpoint(source, whole, request_for())
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (target / file.name).read_bytes()


def test_another_request_does_not_reuse_shards(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tiny_model("llama"), tmp_path / "out"
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "state.json").write_text("{}")
    (stale / "model-00001-of-00001.safetensors").write_bytes(b"old")
    quantize_checkpoint(source, target, request_for())
    Checkpoint(target)


def test_a_full_disk_names_the_folder(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_tensors", full)
    with pytest.raises(CompressError, match="No space left.*same command"):
        quantize_checkpoint(tiny_model("llama"), tmp_path / "out", request_for())
    assert not (tmp_path / "out").exists()


def test_unwritable_and_existing_targets(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CompressError, match="cannot write"):
        quantize_checkpoint(tiny_model("llama"), tmp_path / "file" / "out", request_for())
    (tmp_path / "there").mkdir()
    with pytest.raises(CompressError, match="exists"):
        quantize_checkpoint(tiny_model("llama"), tmp_path / "there", request_for())


def damaged(kind: str, folder: Path) -> None:
    weights = folder / "model.safetensors"
    if kind == "no config.json":
        (folder / "config.json").unlink()
    elif kind == "is not JSON":
        (folder / "config.json").write_text("{")
    elif kind == r"no \*.safetensors files":
        weights.unlink()
    elif kind == "pickled weights are not read":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "damaged or incomplete":
        weights.write_bytes(weights.read_bytes()[:10_000])
    elif kind == "not supported":
        config = json.loads((folder / "config.json").read_text())
        config.pop("layer_types", None)  # which some versions of mamba's config cannot take
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    elif kind == "holds NaN or infinity":  # in a row that no calibration token reads
        state = load_file(weights)
        state["model.embed_tokens.weight"][-1, 3] = float("nan")
        save_file(state, weights, metadata={"format": "pt"})
    elif kind == "has the shape":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    elif kind == "transformers cannot read .*expected int":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "two"}))
    elif kind == "no tokenizer that knows any text":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif kind == "already quantized":
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq"}
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "kind",
    [
        "no config.json",
        "is not JSON",
        r"no \*.safetensors files",
        "pickled weights are not read",
        "damaged or incomplete",
        "not supported",
        "already quantized",
        "holds NaN or infinity",
        "has the shape",
        "transformers cannot read .*expected int",
        "no tokenizer that knows any text",
    ],
)
def test_bad_checkpoints(tiny_model: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("qwen2"), folder)
    damaged(kind, folder)
    with pytest.raises(CompressError, match=kind):
        quantize_checkpoint(folder, tmp_path / "out", request_for())
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("name", ["self_attn.q_proj.bias", "mlp.down_proj.weight"])
def test_a_tensor_that_is_not_finite_is_named(
    tiny_model: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """With and without calibration: each reads the weights on its own."""
    folder, tensor = tmp_path / "model", f"model.layers.1.{name}"
    shutil.copytree(tiny_model("qwen2"), folder)
    state = load_file(folder / "model.safetensors")
    state[tensor].view(-1)[3] = -torch.inf
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for request in (request_for(), PlanRequest(method="rtn")):
        with pytest.raises(CompressError, match=f"^{tensor} holds NaN or infinity"):
            quantize_checkpoint(folder, tmp_path / "out", request)
        assert not (tmp_path / ".out.partial").exists()


def test_no_room_is_told_before_the_work(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tiny_model("qwen2"), tmp_path / "out"
    request = request_for(rounding="gptq", alpha=0.5)

    def with_free(free: int) -> None:
        usage = type("Usage", (), {"total": free + 1, "free": free})
        monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "obtain_plan", lambda *args, **kwargs: pytest.fail("calibrated"))
        with_free(1000)
        told = r"for the checkpoint in .* \(--out\) and .* for the rounded weights in .*VLLM_COMP"
        with pytest.raises(CompressError, match=told):
            quantize_checkpoint(source, target, request)
        monkeypatch.setattr(memory, "total_memory", lambda: 1 << 20)
        with pytest.raises(CompressError, match="not enough memory: about 0.7 GiB"):
            quantize_checkpoint(source, target, request)
    assert not list(tmp_path.glob(".out*"))
    monkeypatch.undo()
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    obtain_plan(Checkpoint(source), request)
    with_free(estimate(Checkpoint(source), request).disk + 1)  # enough: the plan is there already
    quantize_checkpoint(source, target, request)
    calibrated = tmp_path / "other"
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(planning, "load_model", lambda *args: pytest.fail("loaded"))
    with pytest.raises(CompressError, match="for the rounded weights"):
        quantize_checkpoint(source, calibrated, request)
    monkeypatch.setattr(memory, "total_memory", lambda: 1 << 20)
    with pytest.raises(CompressError, match="not enough memory"):
        obtain_plan(Checkpoint(source), request)  # as a server does


def test_room_is_asked_for_where_the_plan_is_built(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that cannot be written is not asked: the store builds in a temporary folder."""
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    for folder in (cache, temporary):
        folder.mkdir()
    cache.chmod(0o777)  # refused, also when root runs this
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(cache))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(planning, "load_model", lambda *args: pytest.fail("loaded"))
    source, request = tiny_model("qwen2"), request_for(rounding="gptq", alpha=0.5)
    full: list[Path] = []

    def usage(folder: Path) -> object:
        free = 0 if any(folder.is_relative_to(path) for path in full) else 1 << 40
        return type("Usage", (), {"total": 1 << 40, "free": free})

    monkeypatch.setattr("shutil.disk_usage", usage)
    full[:] = [cache]
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        obtain_plan(Checkpoint(source), request)
    full[:] = [temporary]
    told = f"for the rounded weights in {temporary}"
    with pytest.raises(CompressError, match=told):
        obtain_plan(Checkpoint(source), request)
    full[:] = [temporary, tmp_path]  # what the output and the plan are added up for
    with pytest.raises(CompressError, match=told):
        quantize_checkpoint(source, tmp_path / "out", request)


def test_missing_model() -> None:
    with pytest.raises(CompressError, match="does not exist"):
        resolve("/no/such/folder")
    with pytest.raises(CompressError, match="neither a local folder nor available"):
        resolve("no-such-owner/no-such-model")


def test_a_refusal_leaves_nothing(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    request = PlanRequest(calibration=CalibrationSettings(source=str(tmp_path / "none.txt")))
    with pytest.raises(CompressError, match="is not a file"):
        quantize_checkpoint(tiny_model("llama"), tmp_path / "out", request)
    assert not (tmp_path / ".out.partial").exists()


def test_what_a_format_cannot_hold_is_refused_before_the_work(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "obtain_plan", lambda *args, **kwargs: pytest.fail("calibrated"))
    for bits, told in ((3, "not 3 bits in groups of 64"), (8, "not 8 bits per channel")):
        with pytest.raises(CompressError, match=told):
            quantize_checkpoint(
                tiny_model("llama"), tmp_path / "out", request_for(bits=bits), format_name="awq"
            )
    split = PlanRequest(settings={"group_size": 64})
    grids = {"model.layers.0.mlp.up_proj": Grid(64)}
    monkeypatch.setattr(GridSettings, "grids", lambda self, config: grids)
    with pytest.raises(CompressError, match=r"model\.layers\.0\.gate_up.*vLLM fuses"):
        quantize_checkpoint(tiny_model("llama"), tmp_path / "out", split)
    assert not (tmp_path / ".out.partial").exists()


def test_files_are_as_readable_as_the_umask_says(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    before = os.umask(0o027)
    try:
        quantize_checkpoint(tiny_model("llama"), tmp_path / "out", PlanRequest(method="rtn"))
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o640}, modes


def test_an_embedding_model_is_refused_before_calibration(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("qwen3"), folder)
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(planning, "_calibrate", lambda *args: pytest.fail("calibrated"))
    with pytest.raises(CompressError, match="embeds or classifies; it samples no calibration text"):
        quantize_checkpoint(folder, tmp_path / "out", request_for())


def test_a_config_with_fewer_layers_than_the_weights_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(CompressError, match="linears that its config of 1 layers does not name"):
        quantize_checkpoint(folder, tmp_path / "out", request_for())


@pytest.mark.parametrize("format_name", ["compressed-tensors", "awq"])
def test_linears_that_no_group_divides_are_written_at_16_bits(
    tiny_model: Callable[..., Path], tmp_path: Path, format_name: str
) -> None:
    source = tiny_model("llama", intermediate_size=272)
    request = request_for(folds="all", group_size=32)
    report = quantize_checkpoint(source, tmp_path / "out", request, format_name=format_name)
    assert report["left_at_16_bit"] == ["mlp.down_proj"]
    written, original = Checkpoint(tmp_path / "out"), Checkpoint(source)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(dict(written.tensors([name]))[name], dict(original.tensors([name]))[name])
    assert "model.layers.1.mlp.up_proj.weight" not in written.files
    config = written.config["quantization_config"]
    ignored = config.get("ignore") or config["modules_to_not_convert"]
    assert any(entry.rstrip("$").endswith("down_proj") for entry in ignored)


def test_estimate_brackets_the_result(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("llama")
    need = estimate(Checkpoint(source), request_for())
    report = quantize_checkpoint(source, tmp_path / "out", request_for())
    assert 0.9 < report["weight_bytes_after"] / need.disk < 1.1
    assert need.memory > report["weight_bytes_before"]
