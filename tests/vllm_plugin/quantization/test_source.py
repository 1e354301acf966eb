# SPDX-License-Identifier: Apache-2.0
"""Calibration sees the files, the config and the tokenizer that vLLM loads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from tests.support.generate import generate

COMMIT = "a" * 40
# Mistral's names of the tensors of a layer.
NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "model.norm": "norm",
    "model.": "",
}
PARAMS = {
    "dim": 128,
    "n_layers": 2,
    "head_dim": 32,
    "hidden_dim": 256,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-6,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
}


def published(plain: Path, target: Path, params: bool) -> Path:
    """A repository as Mistral publishes them: its own file beside the Hugging Face files."""
    shutil.copytree(plain, target)
    state = load_file(target / "model.safetensors")
    own = {}
    for name, tensor in state.items():
        for theirs, mistral in NAMES.items():
            name = name.replace(theirs, mistral)
        own[name] = tensor
    names = sorted(state)
    weight_map = {}
    (target / "model.safetensors").unlink()
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({n: state[n] for n in part}, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(own, target / "consolidated.safetensors", metadata={"format": "pt"})
    if params:
        (target / "params.json").write_text(json.dumps(PARAMS))
    return target


def configured(model: Path, **arguments: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"quantization": "rtn", "max_model_len": 256} | arguments
    return EngineArgs(model=str(model), **arguments).create_engine_config()


def source(config: Any, **changes: str) -> Checkpoint:
    """What the loader of an engine with this config calibrates."""
    from vllm_plugin.quantization.loader import QuantizingLoader
    from vllm_plugin.quantization.source import source_of

    for name, value in changes.items():
        setattr(config.model_config, name, value)
    loader = QuantizingLoader(config.load_config)
    checkpoint = source_of(config.model_config, loader._prepare_weights)
    stream = loader._get_weights_iterator(
        loader.Source(config.model_config.model, config.model_config.revision)
    )
    assert {name for name, _ in stream} == set(checkpoint.files)  # what is loaded
    return checkpoint


@pytest.fixture(scope="module")
def mistral(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("mistral")


def test_source_is_the_folder(mistral: Path) -> None:
    checkpoint = source(configured(mistral))
    assert checkpoint.digest == Checkpoint(mistral).digest  # one plan for both
    assert type(checkpoint.hf_config).__name__ == "MistralConfig"


@pytest.mark.parametrize("load_format", ["auto", "hf", "safetensors"])
@pytest.mark.parametrize("index", [True, False])
def test_mistrals_own_file_is_left_out(
    mistral: Path, tmp_path: Path, load_format: str, index: bool
) -> None:
    folder = published(mistral, tmp_path / "model", params=False)
    if not index:
        (folder / "model.safetensors.index.json").unlink()
    checkpoint = source(configured(folder, load_format=load_format))
    assert {file.name[:6] for file in checkpoint.files.values()} == {"model-"}
    assert checkpoint.weights_digest == Checkpoint(mistral).weights_digest
    assert Checkpoint(folder).weights_digest == checkpoint.weights_digest  # offline


def test_a_published_mistral_repository_is_served(mistral: Path, tmp_path: Path) -> None:
    """It died with "'QKVParallelLinear' object has no attribute 'data'"."""
    answer = generate(
        published(mistral, tmp_path / "model", params=False),
        ["The capital of France is"],
        max_tokens=1,
        quantization="rtn",
        env={"TORCH_COMPILE_DISABLE": "1", "COMPRESS_INT4_ROWS": "16"},
    )
    assert all(nats > 0 for nats in answer["prompt_nats"][0])


def test_params_json_is_refused_with_the_flags(mistral: Path, tmp_path: Path) -> None:
    folder = published(mistral, tmp_path / "model", params=True)
    flags = "--config-format hf --load-format hf --tokenizer-mode hf"
    with pytest.raises(CompressError, match=flags):
        configured(folder, tokenizer_mode="hf")
    arguments = {"config_format": "hf", "load_format": "hf", "tokenizer_mode": "hf"}
    checkpoint = source(configured(folder, **arguments))
    assert checkpoint.digest == Checkpoint(mistral).digest


def test_mistrals_own_file_alone_is_refused(mistral: Path, tmp_path: Path) -> None:
    from quant_methods.plan_request import PlanRequest
    from quant_methods.planning import obtain_plan

    folder = published(mistral, tmp_path / "model", params=False)
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(CompressError, match="Mistral's own names.*--load-format hf"):
        obtain_plan(source(configured(folder)), PlanRequest(method="rtn"))


def test_tokenizer(mistral: Path, tmp_path: Path) -> None:
    """``--tokenizer`` names the one that calibration text is split with."""
    other = tmp_path / "tokenizer"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(mistral / name, other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(
        json.dumps(settings | {"bos_token": "<|endoftext|>"})
    )
    own, given = source(configured(mistral)), source(configured(mistral, tokenizer=str(other)))
    assert given.tokenizer.bos_token == "<|endoftext|>" != own.tokenizer.bos_token
    from quant_methods.plan_request import PlanRequest

    assert PlanRequest().key(given) != PlanRequest().key(own)


def test_overrides_and_another_config(mistral: Path, tmp_path: Path) -> None:
    """``--hf-overrides`` and ``--hf-config-path`` reach calibration, and make another plan."""
    own = source(configured(mistral))
    overridden = source(configured(mistral, hf_overrides={"rms_norm_eps": 0.25}))
    config = json.loads((mistral / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    moved = source(configured(mistral, hf_config_path=str(tmp_path)))
    assert [c.hf_config.rms_norm_eps for c in (overridden, moved)] == [0.25, 0.5]
    assert len({c.digest for c in (own, overridden, moved)}) == 3
    assert len({c.weights_digest for c in (own, overridden, moved)}) == 1


def test_revision_and_download_dir(
    mistral: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Weights come from the revision and the folder of downloads that the engine was given."""
    cache = tmp_path / "downloads"
    repository = cache / "models--owner--model"
    for revision, commit, folder in (
        ("main", COMMIT, mistral),
        ("v2", "b" * 40, tiny_model("mistral", seed=1)),
    ):
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    config = configured(mistral, download_dir=str(cache))
    first = source(config, model="owner/model")
    second = source(config, model="owner/model", revision="v2")
    assert first.weights_digest == Checkpoint(mistral).weights_digest
    assert second.weights_digest == Checkpoint(tiny_model("mistral", seed=1)).weights_digest


def test_pickled_weights_are_refused(mistral: Path, tmp_path: Path) -> None:
    shutil.copytree(mistral, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CompressError, match="pickled weights are not read"):
        source(configured(tmp_path / "model"))
