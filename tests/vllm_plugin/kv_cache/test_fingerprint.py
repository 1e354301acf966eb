# SPDX-License-Identifier: Apache-2.0
"""A profile serves the weights that it was measured on, at 16 bits and as the int4 we write."""

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from compress_common.checkpoints import identity
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.local import local_folder
from compress_common.errors import CompressError
from kv_policies.budget.profile import Profile, Provenance
from quant_methods.formats.writing import quantize_checkpoint
from quant_methods.plan_request import PlanRequest
from vllm_plugin.kv_cache.budget import layouts_of
from vllm_plugin.kv_fingerprint import fingerprint_of, published_weights
from vllm_plugin.settings import KVSettings


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "_SETTLED_NS", 0)
    shutil.copytree(tiny_model("qwen2"), tmp_path / "model")
    return tmp_path / "model"


def served(profile: Path, folder: Path) -> Any:
    settings = KVSettings(policy="prefix_kv", profile=profile)
    return layouts_of(settings, 16, str(folder), AutoConfig.from_pretrained(folder))


def test_a_profile_is_tied_to_every_tensor(model: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(model)
    profile = Profile(
        model=fingerprint_of("model", config, published_weights(str(model), config)),
        keep=Fraction(1, 2),
        levels=1,
        layers=(0, 1),
        fractions=(Fraction(1, 2), Fraction(1, 2)),
        provenance=Provenance(tool_version="0", created="", text="", samples=1, sample_tokens=1),
    )
    file = tmp_path / "profile.json"
    file.write_text(profile.text())
    assert len(served(file, model)) == 2
    quantize_checkpoint(model, tmp_path / "int4", PlanRequest(method="rtn"))
    assert len(served(file, tmp_path / "int4")) == 2

    weights = model / "model.safetensors"
    raw = weights.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        offset = start + header[name]["data_offsets"][0] + 5
        edited = bytearray(raw)
        edited[offset] ^= 1
        weights.write_bytes(edited)
        with pytest.raises(CompressError, match="the weights differ: it is another fine-tune"):
            served(file, model)
    shutil.rmtree(tmp_path / "int4")
    quantize_checkpoint(model, tmp_path / "int4", PlanRequest(method="rtn"))
    with pytest.raises(CompressError, match="the weights differ"):
        served(file, tmp_path / "int4")


def test_only_a_model_without_weights_has_no_digest(model: Path) -> None:
    config, weights = AutoConfig.from_pretrained(model), model / "model.safetensors"
    raw = weights.read_bytes()
    for file, content in (("model.safetensors", raw[:-9]), ("pytorch_model.bin", b"pickle")):
        weights.unlink()
        (model / file).write_bytes(content)
        with pytest.raises(CompressError, match="cannot be checked against these weights"):
            published_weights(str(model), config)
    (model / "pytorch_model.bin").unlink()
    assert published_weights(str(model), config) is None


def test_a_config_without_sizes_has_no_fingerprint() -> None:
    missing = "num_hidden_layers is None, hidden_size is None, num_attention_heads is None"
    with pytest.raises(CompressError, match=missing):
        fingerprint_of("some/model", PretrainedConfig())


@pytest.mark.parametrize(("length", "known"), [(64, True), (16, False), (0, False)])
def test_only_whole_digests_of_int4_weights_count(model: Path, length: int, known: bool) -> None:
    config = AutoConfig.from_pretrained(model)
    config.quantization_config = {"vllm_compress": {"source": "a" * length}}
    assert published_weights(str(model), config) == ("a" * length if known else None)


def test_the_revision_that_is_served_is_hashed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub cache has two revisions of a model; ``main`` is not the one that is served."""
    repository = tmp_path / "hub" / "models--some--model"
    for commit in ("1" * 40, "2" * 40):
        shutil.copytree(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    served_file = repository / "snapshots" / ("2" * 40) / "model.safetensors"
    raw = bytearray(served_file.read_bytes())
    raw[-1] ^= 1
    served_file.write_bytes(raw)
    config = AutoConfig.from_pretrained(model)
    config._commit_hash = "2" * 40
    monkeypatch.setattr(
        "vllm_plugin.kv_fingerprint.local_folder",
        partial(local_folder, download_dir=str(tmp_path / "hub")),
    )
    want = Checkpoint(served_file.parent).weights_digest
    assert published_weights("some/model", config) == want != published_weights(str(model), config)
