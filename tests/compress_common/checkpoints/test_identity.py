# SPDX-License-Identifier: Apache-2.0
"""A plan, a stored digest or a finished shard is never used for other weights."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress_common.checkpoints import identity, shards
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.identity import TensorDigests, hashed, tensor_digest
from compress_common.errors import CompressError
from quant_methods.formats.writing import quantize_checkpoint
from quant_methods.grid import QuantizedWeight
from quant_methods.plan_request import PlanRequest
from quant_methods.planning import obtain_plan

RTN = PlanRequest(method="rtn", settings={"group_size": 32})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "_SETTLED_NS", 0)  # the files of a test are new


@pytest.fixture(scope="module")
def base(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tiny_model("qwen2"), folder)
    return folder


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path / "copy")
    return tmp_path / "copy"


def flip(file: Path, offset: int) -> None:
    """Change one bit and leave size, header and mtime as they were."""
    before = file.stat()
    with file.open("r+b") as raw:
        raw.seek(offset)
        byte = raw.read(1)[0]
        raw.seek(offset)
        raw.write(bytes([byte ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def header_of(file: Path) -> tuple[int, dict[str, dict]]:
    """Where the tensors begin, and the entries of the header."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return 8 + length, {k: v for k, v in json.loads(raw[8 : 8 + length]).items() if k[0] != "_"}


@given(st.data())
@settings(deadline=None, max_examples=15)
def test_any_bit_of_any_tensor_changes_the_digest(base: Path, data: st.DataObject) -> None:
    file = base / "model.safetensors"
    start, header = header_of(file)
    name = data.draw(st.sampled_from(sorted(header)))
    begin, end = header[name]["data_offsets"]
    offset = start + data.draw(st.integers(begin, end - 1))
    before = Checkpoint(base)
    assert before.digest == Checkpoint(base).digest
    flip(file, offset)
    after = Checkpoint(base)
    changed = {k for k, v in before.tensor_digests.items() if after.tensor_digests[k] != v}
    flip(file, offset)
    assert changed == {name}
    assert before.digest != after.digest
    assert Checkpoint(base).digest == before.digest


def test_the_config_is_part_of_the_digest(copy: Path) -> None:
    before = Checkpoint(copy)
    digest = before.digest
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    after = Checkpoint(copy)
    assert before.weights_digest == after.weights_digest
    assert digest != after.digest


def test_digests_are_computed_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Checkpoint(copy).tensor_digests
    monkeypatch.setattr(TensorDigests, "_compute", lambda self: pytest.fail("read again"))
    assert Checkpoint(copy).tensor_digests == first
    monkeypatch.undo()


def test_a_file_of_this_moment_is_not_remembered(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_SETTLED_NS", 10**12)
    assert Checkpoint(copy).tensor_digests
    assert not (tmp_path / "cache").exists()


def test_digests_do_not_depend_on_how_the_weights_are_sharded(copy: Path) -> None:
    before = Checkpoint(copy).digest
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    (copy / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({n: tensors[n] for n in part}, copy / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert Checkpoint(copy).digest == before


@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool])
def test_every_dtype_and_shape_has_a_digest(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.ones(shape).to(dtype)
    assert tensor_digest(tensor) == tensor_digest(tensor.clone())
    assert tensor_digest(tensor) != tensor_digest(tensor.to(torch.float32))
    assert tensor_digest(tensor) != tensor_digest(tensor[None])


def test_hashing_ahead_keeps_the_order() -> None:
    stream = [(str(i), torch.full((4,), i)) for i in range(7)]
    got = list(hashed(iter(stream)))
    assert [name for name, _, _ in got] == [name for name, _ in stream]
    assert all(found == tensor_digest(tensor) for _, tensor, found in got)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_an_edited_checkpoint_gets_its_own_codes(copy: Path, rounding: str) -> None:
    """The first layer's up_proj negated in place: size, header and mtime are as before."""
    request = PlanRequest(
        settings={"group_size": 32, "alpha": 0.5, "clip": False, "rounding": rounding},
        calibration={"samples": 2, "length": 16},
    )
    obtain_plan(Checkpoint(copy), request)
    file, name = copy / "model.safetensors", "model.layers.0.mlp.up_proj"
    start, header = header_of(file)
    before, raw = file.stat(), bytearray(file.read_bytes())
    begin, end = header[f"{name}.weight"]["data_offsets"]
    for offset in range(start + begin + 1, start + end, 2):  # the sign bits of bfloat16
        raw[offset] ^= 0x80
    with file.open("r+b") as opened:
        opened.write(raw)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    edited = Checkpoint(copy)
    plan, stored = obtain_plan(edited, request)
    assert not stored
    served = dict(plan.transform(edited.tensors(), torch.bfloat16))[name]
    assert isinstance(served, QuantizedWeight)
    weight = plan.smoothed(name, dict(edited.tensors())[f"{name}.weight"])
    assert (served.dequantize() - weight).norm() / weight.norm() < 0.2


@pytest.mark.parametrize("vanished", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_checkpoint_replaced_during_calibration_is_refused(
    copy: Path, tmp_path: Path, rounding: str, vanished: bool
) -> None:
    """Its codes must not be stored as the plan of the weights that were hashed."""
    request = PlanRequest(
        settings={"group_size": 32, "alpha": 0.5, "clip": False, "rounding": rounding},
        calibration={"samples": 2, "length": 16},
    )
    checkpoint, file = Checkpoint(copy), copy / "model.safetensors"
    assert checkpoint.digest
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"].neg_()
    save_file(tensors, copy / "new", metadata={"format": "pt"})
    os.replace(copy / "new", file)
    if vanished:
        file.unlink()
    with pytest.raises(CompressError, match="changed while it was in use"):
        obtain_plan(checkpoint, request)
    kept = {path.parent.name for path in (tmp_path / "cache").glob("*/*") if path.is_dir()}
    assert kept == {"tensor-digests"}


def test_a_change_after_hashing_is_noticed(copy: Path) -> None:
    checkpoint, file = Checkpoint(copy), copy / "model.safetensors"
    checkpoint.check_unchanged()
    flip(file, file.stat().st_size - 1)
    with pytest.raises(CompressError, match="changed while it was in use"):
        checkpoint.check_unchanged()


def test_a_vanished_file_is_a_plain_error(copy: Path) -> None:
    checkpoint = Checkpoint(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(CompressError, match="model.safetensors cannot be read"):
        checkpoint.digest  # noqa: B018
    checkpoint.forget_digests()


@pytest.mark.parametrize("damage", ["other", "missing", "extra"])
def test_the_stream_that_is_loaded_is_checked(copy: Path, damage: str) -> None:
    checkpoint = Checkpoint(copy)
    plan, _ = obtain_plan(checkpoint, RTN)
    stream = dict(checkpoint.tensors())
    name = "model.layers.1.self_attn.k_proj.weight"
    if damage == "other":
        stream[name] = stream[name].clone()
        stream[name][0, 0] += 1
    elif damage == "missing":
        del stream[name]
    else:
        stream["model.layers.2.mlp.up_proj.weight"] = torch.zeros(256, 128)
    given = []
    with pytest.raises(CompressError, match="not of the weights that are loaded.*layers"):
        for out, _ in plan.transform(stream.items(), torch.bfloat16):
            given.append(out)
    assert damage == "missing" or name.removesuffix(".weight") not in given[-1:]
    assert obtain_plan(Checkpoint(copy), RTN)[1] is False  # evicted, with the digests
    assert obtain_plan(Checkpoint(copy), RTN)[1] is True


def test_shards_of_other_weights_are_not_kept(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 200_000)
    save, saved = shards.save_tensors, []

    def interrupted(*args: object, **kwargs: object) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(args)
        save(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "save_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(copy, tmp_path / "out", RTN)
    monkeypatch.setattr(shards, "save_tensors", save)
    file = copy / "model.safetensors"
    start, header = header_of(file)
    flip(file, start + header["model.embed_tokens.weight"]["data_offsets"][0])
    quantize_checkpoint(copy, tmp_path / "out", RTN)
    quantize_checkpoint(copy, tmp_path / "whole", RTN)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        first, second = load_file(path), load_file(tmp_path / "out" / path.name)
        assert all(torch.equal(first[k], second[k]) for k in first)
