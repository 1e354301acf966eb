# SPDX-License-Identifier: Apache-2.0
"""Embedding models that keep their first blocks, and the first numbers of their vectors."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from depth_pruning.embedding import CutRequest, cut_embedding_model
from tests.support import pooling, wrapped
from tests.support.child import SINGLE_PROCESS, in_child


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))


@torch.no_grad()
def embedded(folder: Path) -> torch.Tensor:
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.arange(20)[None]).last_hidden_state


def test_a_decoder_keeps_its_first_blocks(
    tmp_path: Path, demo_model: Path, own_cache: None
) -> None:
    source = pooling.make("embeds", tmp_path / "model", demo_model)
    report = cut_embedding_model(source, tmp_path / "cut", CutRequest(keep_first=1, dimensions=64))
    assert report["layers_before"] == 2 and report["layers_after"] == 1
    model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    model.layers = model.layers[:1]
    with torch.no_grad():
        wanted = model(torch.arange(20)[None], use_cache=False).last_hidden_state
    torch.testing.assert_close(embedded(tmp_path / "cut"), wanted)
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config["matryoshka_dimensions"] == [64]
    assert (tmp_path / "cut" / "1_Pooling" / "config.json").is_file()


def test_an_encoder_keeps_its_first_blocks(
    tmp_path: Path, demo_model: Path, own_cache: None
) -> None:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=2,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path / "model")
    cut_embedding_model(tmp_path / "model", tmp_path / "cut", CutRequest(keep_first=3))
    with torch.no_grad():
        wanted = model(torch.arange(20)[None], output_hidden_states=True).hidden_states[3]
    torch.testing.assert_close(embedded(tmp_path / "cut"), wanted)


def test_all_problems_of_a_cut_are_told(tmp_path: Path, demo_model: Path) -> None:
    source = pooling.make("embeds", tmp_path / "model", demo_model)
    request = CutRequest(keep_first=3, dimensions=129)
    with pytest.raises(CompressError, match="(?s)it has 2 blocks.*its vectors have 128 numbers"):
        cut_embedding_model(source, tmp_path / "cut", request)
    assert not (tmp_path / "cut").exists()


def test_models_with_two_stacks_of_blocks_are_refused(tmp_path: Path, demo_model: Path) -> None:
    """Only one of them would be cut."""
    sizes = {"d_model": 32, "vocab_size": 100, "encoder_layers": 2, "decoder_layers": 2}
    transformers.BartModel(transformers.BartConfig(**sizes)).save_pretrained(tmp_path / "two")
    pictures = wrapped.make("llava", tmp_path / "pictures", demo_model)
    for source, told in (tmp_path / "two", "an encoder and a decoder"), (pictures, "images"):
        with pytest.raises(CompressError, match=told):
            cut_embedding_model(source, tmp_path / "cut", CutRequest(keep_first=1))
    assert not (tmp_path / "cut").exists()


def test_keeping_everything_changes_no_tensor(
    tmp_path: Path, demo_model: Path, own_cache: None
) -> None:
    source = pooling.make("embeds", tmp_path / "model", demo_model)
    cut_embedding_model(source, tmp_path / "cut", CutRequest(keep_first=2))
    assert Checkpoint(tmp_path / "cut").digest == Checkpoint(source).digest


def _embedded(model: str) -> list[Any]:
    """In a child: with and without the dimensions, and what another number of them gives."""
    from vllm import LLM, PoolingParams
    from vllm.exceptions import VLLMValidationError

    llm = LLM(
        model,
        runner="pooling",
        max_model_len=256,
        enforce_eager=True,
        dtype="float32",
        gpu_memory_utilization=0.2,
    )
    found: list[Any] = []
    for dimensions in (None, 64, 32):
        try:
            params = PoolingParams(dimensions=dimensions)
            out = llm.embed(pooling.PROMPTS, pooling_params=params, use_tqdm=False)
            found.append([list(each.outputs.embedding) for each in out])
        except VLLMValidationError as error:
            found.append(str(error))
    llm.llm_engine.engine_core.shutdown()
    return found


@pytest.mark.slow
def test_stock_vllm_serves_the_dimensions(
    tmp_path: Path, demo_model: Path, own_cache: None
) -> None:
    source = pooling.make("embeds", tmp_path / "model", demo_model)
    cut = tmp_path / "cut"
    cut_embedding_model(source, cut, CutRequest(keep_first=1, dimensions=64))
    env = os.environ | SINGLE_PROCESS | {"VLLM_PLUGINS": ""}
    whole, short, refused = in_child(_embedded, str(cut), env=env, timeout=600)
    wanted = pooling.expected(cut, None, tmp_path / "unused")
    torch.testing.assert_close(torch.tensor(whole), wanted, atol=1e-3, rtol=0)
    first = torch.tensor(whole)[:, :64]
    first = first / first.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(torch.tensor(short), first, atol=1e-4, rtol=0)
    assert "only supports Matryoshka dimensions" in refused
    shutil.rmtree(cut)
