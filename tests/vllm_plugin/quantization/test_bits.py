# SPDX-License-Identifier: Apache-2.0
"""Weights of other widths than 4 bits on the real engine: 2 and 3 bits, and 4 and 8 mixed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress_common.calibration.text import CalibrationSettings
from compress_common.errors import CompressError
from quant_methods.formats.checkpoint_formats import NEEDS_PLUGIN, compressed_tensors_config
from quant_methods.formats.packing import pack, unpack
from quant_methods.formats.writing import quantize_checkpoint
from quant_methods.grid import SIXTEEN, Grid
from quant_methods.plan_request import PlanRequest
from tests.support.child import EngineFailed
from tests.support.generate import generate
from vllm_plugin.commands.checks import model_checks
from vllm_plugin.quantization.cpu_int4_packing import widen

PROMPTS = ["The capital of France is", "Water boils at"]
CALIBRATION = {"samples": 2, "length": 16}
# Where to change over is measured, and a busy machine may give another number.
SAME = {"COMPRESS_INT4_ROWS": "16"}
MIXED = {
    "model.layers.0.qkv": 8,
    "model.layers.0.gate_up": 8,
    "model.layers.1.down": SIXTEEN,
}


@given(
    bits=st.sampled_from([2, 3]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_narrow_codes_are_int4_codes(bits: int, symmetric: bool, seed: int) -> None:
    rows, columns, groups = 32, 64, 2
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=draw)
    zeros = torch.randint(0, 1 << bits, (rows, groups), generator=draw)
    if symmetric:
        zeros = torch.full_like(zeros, 1 << bits >> 1)
    packed = None if symmetric else pack(zeros, packed_dim=0, bits=bits)
    wide, wide_zeros = widen(pack(codes, bits=bits), packed, bits, columns)
    expected = 8 if wide_zeros is None else unpack(wide_zeros, packed_dim=0).long()
    per_group = (rows, groups, -1)
    before = codes.view(per_group) - zeros[..., None]
    zero = torch.as_tensor(expected).expand(rows, groups)[..., None]
    assert torch.equal(unpack(wide).long().view(per_group) - zero, before)


def written(model: Path, folder: Path, method: str, settings: dict) -> tuple[Path, dict]:
    """The checkpoint and its ``quantization_config``."""
    request = PlanRequest(
        method=method, settings=settings, calibration=CalibrationSettings(**CALIBRATION)
    )
    quantize_checkpoint(model, folder / "out", request)
    config = json.loads((folder / "out" / "config.json").read_text())
    return folder / "out", config["quantization_config"]


def both(model: Path, out: Path, method: str, settings: dict, cache: Path) -> list[dict]:
    """What the raw and the written checkpoint answer."""
    section = {"compress": {"weights": settings | {"calibration": CALIBRATION}}}
    env = SAME | {"VLLM_COMPRESS_CACHE": str(cache)}
    raw = generate(model, PROMPTS, quantization=method, additional_config=section, env=env)
    return [raw, generate(out, PROMPTS, env=env)]


def test_a_3_bit_checkpoint_answers_as_at_load(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    model = tiny_model("qwen2")
    settings = {"bits": 3, "group_size": 32}
    out, config = written(model, tmp_path, "rtn", settings)
    assert config["quant_method"] == NEEDS_PLUGIN
    raw, served = both(model, out, "rtn", settings, tmp_path / "cache")
    assert raw["quantization"] == served["quantization"] == "rtn"
    assert raw["tokens"] == served["tokens"]
    with pytest.raises(EngineFailed, match=f"Unknown quantization method: {NEEDS_PLUGIN}"):
        generate(out, PROMPTS, env={"VLLM_PLUGINS": ""})


def test_a_mixed_checkpoint_answers_as_at_load(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    model, allocation = tiny_model("qwen2"), tmp_path / "bits.json"
    allocation.write_text(json.dumps({"bits": MIXED}))
    settings = {"group_size": 32, "allocation": str(allocation), "alpha": 0.5}
    out, config = written(model, tmp_path, "smoothquant_plus", settings)
    assert config["quant_method"] == "compressed-tensors"  # stock vLLM reads it
    raw, served = both(model, out, "smoothquant_plus", settings, tmp_path / "cache")
    assert raw["quantization"] == served["quantization"] == "smoothquant_plus"
    assert raw["tokens"] == served["tokens"]
    checks = model_checks(EngineArgs(str(out), max_model_len=256))
    (told,) = (check.found for check in checks if check.name == "weights")
    assert told.startswith("smoothquant_plus of 4 and 8 bits, ")
    found = [f"{each.name}: {each.found}" for each in checks if each.name.startswith("kernel of")]
    assert len(found) == 7, found  # qkv, gate+up and down have two kinds each
    assert any(f.startswith("kernel of q+k+v: vLLM's own") and "layers 0" in f for f in found)
    assert "kernel of down: vLLM's own, 16 bits; layers 1" in found


def test_a_unit_with_two_grids_is_not_written(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from compress_common.checkpoints.checkpoint import Checkpoint

    config = Checkpoint(tiny_model("llama")).hf_config
    grids = PlanRequest(method="rtn").build().settings.grids(config)
    grids["model.layers.1.mlp.gate_proj"] = Grid(-1, True, 8, "int8")
    with pytest.raises(CompressError, match=r"model\.layers\.1\.gate_up.*one number of bits"):
        compressed_tensors_config(grids, config, {})


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({"bits": 6}, "q+k+v, o, gate+up, down: no kernel here serves weights of 6 bits with zero"),
        ({"bits": 8, "eight_bit": "w8a16", "symmetric": True}, "8 bits without zero points"),
        ({"allocation": {"model.layers.1.o": 5}}, "o of layers 1: no kernel here serves weights"),
    ],
)
def test_bits_that_a_cpu_has_no_kernel_for(
    tiny_model: Callable[..., Path], tmp_path: Path, weights: dict, told: str
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    if bits := weights.get("allocation"):
        (tmp_path / "bits.json").write_text(json.dumps({"bits": bits}))
        weights = {"allocation": str(tmp_path / "bits.json")}
    section = {"compress": {"weights": weights | {"group_size": 32}}}
    args = EngineArgs(str(tiny_model("llama")), quantization="rtn", additional_config=section)
    [check] = model_checks(args)
    assert not check.ok and told in check.found
    assert "CPU kernels serve weights of 2, 3 and 4 bits" in check.found


@pytest.mark.skipif(
    hasattr(torch.ops._C, "cpu_gemm_wna16"), reason="vLLM's own int4 kernel runs on this processor"
)
def test_activations_that_a_cpu_has_no_kernel_for(tiny_model: Callable[..., Path]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    section = {"compress": {"weights": {"group_size": 32}}}
    args = EngineArgs(
        str(tiny_model("llama")),
        quantization="rtn",
        dtype="float32",
        additional_config=section,
    )
    [check] = model_checks(args)
    assert not check.ok and "use --dtype bfloat16" in check.found
