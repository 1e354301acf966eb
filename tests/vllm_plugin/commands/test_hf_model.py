# SPDX-License-Identifier: Apache-2.0
"""What the measuring commands load is what they write into their files."""

import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from compress_common.calibration.text import CalibrationSettings
from compress_common.errors import CompressError
from compress_common.progress import silent
from vllm_plugin.commands.profiling.hf_model import HFModel

LENGTHS = {"samples": 2, "length": 16}


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_model("qwen2"), tmp_path / "model")
    return tmp_path / "model"


def test_the_text_may_be_in_the_home_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One sentence after another. " * 40)
    digest = sha256(text.read_bytes()).hexdigest()
    monkeypatch.setenv("HOME", str(tmp_path))
    subject = HFModel(str(model), CalibrationSettings(source="~/text.txt", **LENGTHS))
    text.write_text("Later, the file may hold other text.")
    origin = subject.origin()
    assert (origin["text"], origin["text_sha256"]) == ("text.txt", digest)


def test_weights_replaced_before_they_are_loaded_are_refused(model: Path) -> None:
    subject, file = HFModel(str(model), CalibrationSettings(**LENGTHS)), model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"].neg_()
    save_file(tensors, model / "new", metadata={"format": "pt"})
    os.replace(model / "new", file)
    with pytest.raises(CompressError, match="changed while it was in use"):
        subject.network(silent)
