# SPDX-License-Identifier: Apache-2.0
"""Int4 models that embed or classify, against transformers with the same rounded weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.transformers_utils.config import get_pooling_config

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from quant_methods.formats.writing import quantize_checkpoint
from quant_methods.plan_request import PlanRequest
from quant_methods.planning import obtain_plan
from tests.support import pooling
from tests.support.child import ROOT
from vllm_plugin.settings import WeightSettings

RTN: dict[str, Any] = {"group_size": 32}


# smoothquant_plus as it is by default, on a given text
GPTQ = RTN | {"calibration": {"source": "text.txt", "samples": 8, "length": 32}}


# model, method, whether it is quantized when an engine loads it
FAST = [("embeds", "smoothquant_plus", True), ("classifies", "smoothquant_plus", False)]
SLOW = [("embeds", "rtn", False), ("classifies", "rtn", True)]


@pytest.mark.parametrize(
    ("name", "method", "at_load"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_an_engine_gives_what_transformers_does_with_the_plan(
    tmp_path: Path,
    demo_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    method: str,
    at_load: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text((ROOT / "LICENSE").read_text(encoding="utf-8"))
    folder = pooling.make(name, tmp_path / "model", demo_model, pooling="mean_tokens")
    settings = RTN if method == "rtn" else GPTQ
    request = WeightSettings(**settings).request(method, 1)
    section: dict[str, Any] = {"activations": "bf16"} | (settings if at_load else {})
    engine: dict[str, Any] = {"additional_config": {"compress": {"weights": section}}}
    source = folder
    if at_load:
        engine["quantization"] = method
    else:
        source = tmp_path / "int4"
        quantize_checkpoint(folder, source, request)
        check_written(Checkpoint(folder), Checkpoint(source))
    found = pooling.served(source, **engine)

    plan, _ = obtain_plan(Checkpoint(folder), request)
    assert len(plan.grids) == 14
    mean = name == "embeds"
    wanted = pooling.expected(folder, plan, tmp_path / "rounded", mean=mean)
    plain = pooling.expected(folder, None, tmp_path, mean=mean)
    if name == "embeds":
        close, far = ((found * other).sum(-1) for other in (wanted, plain))
        assert close.min() > 0.999
        assert 1 - close.mean() < 0.5 * (1 - far.mean())  # 4 bits are far from 16
    else:
        close, far = ((found - other).abs().mean() for other in (wanted, plain))
        assert close < 0.02 and close < 0.5 * far


def check_written(source: Checkpoint, written: Checkpoint) -> None:
    """The head that scores, norms and embeddings are bit-equal, and names begin as they did."""
    before, after = dict(source.tensors()), dict(written.tensors())
    kept = before.keys() & after.keys()
    assert all(torch.equal(before[name], after[name]) for name in kept)
    packed = {name for name in after if name.endswith(".weight_packed")}
    assert {name.replace("weight_packed", "weight") for name in packed} == before.keys() - kept
    if "score.weight" in before:
        config = written.config["quantization_config"]
        targets = [
            target for group in config["config_groups"].values() for target in group["targets"]
        ]
        assert "score.weight" in kept and "Linear" not in targets


def test_pooling_and_projections_are_copied(tmp_path: Path, demo_model: Path) -> None:
    """Without them vLLM would take the last token, and only log it."""
    folder = pooling.make("embeds", tmp_path / "model", demo_model, pooling="mean_tokens")
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules, dense]))
    (folder / "3_Dense").mkdir()
    (folder / "3_Dense" / "config.json").write_text("{}")
    pickled = folder / "3_Dense" / "pytorch_model.bin"
    pickled.touch()
    request = PlanRequest(method="rtn", settings=RTN)
    with pytest.raises(CompressError, match=r"pytorch_model.bin is pickled.*model.safetensors"):
        quantize_checkpoint(folder, tmp_path / "out", request)
    (folder / "3_Dense" / "model.safetensors").write_bytes(b"weights")
    quantize_checkpoint(folder, tmp_path / "out", request)
    written = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*")}
    assert {"1_Pooling/config.json", "3_Dense/model.safetensors", "modules.json"} <= written
    assert not any("pytorch_model" in name for name in written)
    found = get_pooling_config(str(tmp_path / "out"))
    assert found == {"use_activation": True, "seq_pooling_type": "MEAN"}
    (folder / "modules.json").write_text(json.dumps([{"path": "../secrets"}]))
    with pytest.raises(CompressError, match=r"'../secrets' outside the model"):
        quantize_checkpoint(folder, tmp_path / "again", request)
    (folder / "modules.json").write_text("{")
    with pytest.raises(CompressError, match=r"modules.json is damaged"):
        quantize_checkpoint(folder, tmp_path / "again", request)
