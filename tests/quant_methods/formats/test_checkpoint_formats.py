# SPDX-License-Identifier: Apache-2.0
"""Mixed grids: what the config says of each linear, and what is refused before it is written."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from compress_common.structure.derive import structure_of
from quant_methods.base import GridSettings
from quant_methods.formats.checkpoint_formats import FORMATS, compressed_tensors_config
from quant_methods.formats.packing import from_compressed_tensors
from quant_methods.formats.sizes import bits_per_weight, sizes_of
from quant_methods.formats.writing import quantize_checkpoint
from quant_methods.grid import Grid
from quant_methods.plan_request import PlanRequest

CONFIG = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_attention_heads=4, num_hidden_layers=12
)
MIXED = {"model.layers.1.qkv": 8, "model.layers.11.down": 8, "model.layers.2.o": 16}


def allocation(folder: Path, bits: dict[str, int], **rest: Any) -> str:
    file = folder / "bits.json"
    file.write_text(json.dumps({"bits": bits} | rest))
    return str(file)


def found(config: dict[str, Any], linear: str) -> list[dict[str, Any]]:
    """The groups that a linear is in."""
    return [
        group
        for group in config["config_groups"].values()
        if any(t == "Linear" or re.match(t.removeprefix("re:"), linear) for t in group["targets"])
    ]


def test_each_linear_is_in_its_group_alone(tmp_path: Path) -> None:
    grids = GridSettings(allocation=allocation(tmp_path, MIXED)).grids(CONFIG)
    config = compressed_tensors_config(grids, CONFIG, {})
    assert config["format"] == "mixed-precision"
    for linears in structure_of(CONFIG).all_units.values():
        for linear in linears:
            ignored = any(re.match(e.removeprefix("re:"), linear) for e in config["ignore"])
            assert ignored == (linear not in grids)
            if ignored:
                continue
            groups = found(config, linear)
            assert [group["weights"]["num_bits"] for group in groups] == [grids[linear].bits]
            if grids[linear].bits == 8:
                assert groups[0]["format"] == "int-quantized"
                assert groups[0]["input_activations"]["strategy"] == "token"


def test_a_fused_unit_with_two_grids_is_refused() -> None:
    grids = GridSettings().grids(CONFIG)
    grids["model.layers.3.mlp.up_proj"] = Grid(64)
    for kind in FORMATS.values():
        with pytest.raises(CompressError, match=r"model\.layers\.3\.gate_up.*vLLM fuses"):
            kind.config(grids, CONFIG, {})


@pytest.mark.parametrize(
    ("bits", "error"),
    [
        ({"model.layers.3.mlp.up_proj": 4}, r"unit 'model\.layers\.3\.gate_up'"),
        ({"model.layers.12.qkv": 4}, r"model\.layers\.12\.qkv'.*does not have; did you mean"),
        ({"model.layers.1.qkv": 9}, "9 bits; valid: 2, 3, 4, 5, 6, 7, 8, 16"),
    ],
)
def test_a_wrong_allocation_is_refused(tmp_path: Path, bits: dict[str, int], error: str) -> None:
    with pytest.raises(CompressError, match=error):
        GridSettings(allocation=allocation(tmp_path, bits)).grids(CONFIG)


def test_files_that_are_no_allocation(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="cannot read the allocation"):
        GridSettings(allocation=str(tmp_path / "none.json")).grids(CONFIG)
    with pytest.raises(CompressError, match="unknown setting 'bit'; did you mean 'bits'"):
        GridSettings(allocation=allocation(tmp_path, {}, bit={})).grids(CONFIG)
    (tmp_path / "bits.json").write_text("{")
    with pytest.raises(CompressError, match="is not JSON"):
        GridSettings(allocation=str(tmp_path / "bits.json")).grids(CONFIG)
    everything = dict.fromkeys(structure_of(CONFIG).all_units, 16)
    with pytest.raises(CompressError, match="nothing to quantize"):
        GridSettings(allocation=allocation(tmp_path, everything)).grids(CONFIG)
    with pytest.raises(CompressError, match="awq format has 4 bits"):
        grids = GridSettings(allocation=allocation(tmp_path, MIXED)).grids(CONFIG)
        FORMATS["awq"].config(grids, CONFIG, {})


def test_a_mixed_checkpoint_holds_what_its_plan_says(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    source, bits = Checkpoint(tiny_model("qwen2")), {"model.layers.1.qkv": 8, "model.layers.0.o": 3}
    settings = {"group_size": 32, "allocation": allocation(tmp_path, bits)}
    request = PlanRequest(method="rtn", settings=settings)
    key = request.key(source)
    allocation(tmp_path, bits, report={"searched": "today"})  # decides nothing
    assert request.key(source) == key
    report = quantize_checkpoint(source.folder, tmp_path / "out", request)
    grids = request.build().settings.grids(source.hf_config)
    written = Checkpoint(tmp_path / "out")
    tensors = dict(written.tensors())
    for name, weight in source.tensors(f"{linear}.weight" for linear in grids):
        linear = name.removesuffix(".weight")
        parts = {n.removeprefix(f"{linear}."): t for n, t in tensors.items() if linear in n}
        back = from_compressed_tensors(parts, grids[linear]).dequantize()
        assert (back - weight.float()).abs().max() < weight.float().abs().max() / grids[linear].bits
    sizes = sizes_of(written, {}, tied=False)
    assert sizes == sizes_of(source, grids, tied=False)
    assert sizes.compressed() == sum(size for _, size in written.shapes().values())
    assert report["bits_per_weight"] == round(bits_per_weight(grids, source.hf_config), 4)
    allocation(tmp_path, bits | {"model.layers.0.o": 4})  # the same path with other content
    assert request.key(source) != key
