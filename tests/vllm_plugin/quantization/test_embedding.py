# SPDX-License-Identifier: Apache-2.0
"""Quantized token embeddings and lm_heads: rows, products, shards, engines and refusals."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.plugins import load_general_plugins

from compress_common.calibration.text import CalibrationSettings
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from compress_common.structure.structure import EMBEDDINGS
from quant_methods.base import GridSettings
from quant_methods.formats.checkpoint_formats import NEEDS_PLUGIN, compressed_tensors_config
from quant_methods.formats.packing import from_compressed_tensors, to_compressed_tensors
from quant_methods.formats.writing import quantize_checkpoint
from quant_methods.grid import PER_CHANNEL, Grid, QuantizedWeight, quantize
from quant_methods.plan_request import PlanRequest
from quant_methods.planning import obtain_plan
from tests.support.generate import generate
from vllm_plugin.capacity.footprint import weight_footprint
from vllm_plugin.commands.checks import model_checks
from vllm_plugin.quantization.config import CONFIGS
from vllm_plugin.quantization.embedding import QuantizedEmbedding
from vllm_plugin.settings import WeightSettings

GRIDS = {"int8": Grid(PER_CHANNEL, True, 8), "int4": Grid(32, True)}
LLAMA = LlamaConfig(
    num_hidden_layers=1,
    hidden_size=32,
    intermediate_size=32,
    num_attention_heads=1,
    num_key_value_heads=1,
    vocab_size=32,
)
PROMPTS = ["The capital of France is", "Water boils at"]
SAME = {"COMPRESS_INT4_ROWS": "16"}  # where to change over is measured


@dataclass(frozen=True)
class Rank:
    """A rank of a group. What it would get from the others is left out."""

    rank_in_group: int
    world_size: int

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.fixture(scope="module", autouse=True)
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's own state of a worker, for its parameters."""
    load_general_plugins()
    rendezvous = f"file://{tmp_path_factory.mktemp('group')}/file"
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(VllmConfig()):
        patch.setenv("COMPRESS_INT4_ROWS", "16")
        init_distributed_environment(1, 0, rendezvous, 0, "gloo")
        initialize_model_parallel(1)
        yield
        destroy_model_parallel()
        destroy_distributed_environment()


def shard(kind: str, weight: QuantizedWeight, rank: int = 0, ranks: int = 1) -> Any:
    """vLLM's embedding layer of one rank, loaded by its code."""
    config = next(c for c in CONFIGS if c.method == "rtn")()
    config.target_scheme_map = config._quantization_scheme_map_from_config(
        compressed_tensors_config({}, LLAMA, {}, GRIDS[kind])
    )
    layer = VocabParallelEmbedding(
        *weight.q.shape,
        params_dtype=torch.bfloat16,
        quant_config=config,
        parallel_group=Rank(rank, ranks),
    )
    assert isinstance(layer.quant_method, QuantizedEmbedding)
    for name, tensor in to_compressed_tensors(weight).items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor)
    for _ in range(2):  # a second time changes nothing
        layer.quant_method.process_weights_after_loading(layer)
    return layer


@settings(max_examples=30, deadline=None)  # the first lookup of a shard compiles
@given(
    kind=st.sampled_from(sorted(GRIDS)),
    vocab=st.integers(1, 300),
    groups=st.sampled_from([1, 2, 3]),
    ranks=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 99),
)
def test_shards_look_up_and_multiply_their_rows(
    kind: str, vocab: int, groups: int, ranks: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, 32 * groups, generator=draw)
    rounded = quantize(weight, GRIDS[kind])
    x = torch.randn(3, weight.shape[1], generator=draw).bfloat16()
    layers = [shard(kind, rounded, rank, ranks) for rank in range(ranks)]
    found = torch.stack([layer(torch.arange(vocab)[None]) for layer in layers]).sum(0)[0]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rounded.dequantize().bfloat16())
    logits = torch.cat([layer.quant_method.apply(layer, x) for layer in layers], dim=1)
    assert logits.shape == (3, layers[0].num_embeddings_padded)
    assert not logits[:, vocab:].any()  # what pads the vocabulary
    expected = x.float() @ rounded.dequantize().t()
    torch.testing.assert_close(logits[:, :vocab].float(), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("kind", sorted(GRIDS))
def test_no_rows_biases_and_strides(kind: str) -> None:
    layer = shard(kind, quantize(torch.randn(100, 64), GRIDS[kind]))
    apply = layer.quant_method.apply
    assert apply(layer, torch.empty(0, 64, dtype=torch.bfloat16)).shape == (0, 128)
    assert layer(torch.empty(0, dtype=torch.long)).shape == (0, 64)
    x, bias = torch.randn(64, 5).bfloat16().t(), torch.randn(128).bfloat16()
    assert torch.equal(apply(layer, x, bias), apply(layer, x.contiguous()) + bias)
    assert layer.quant_method.tie_weights(torch.nn.Module(), layer) is layer


@given(kind=st.sampled_from(sorted(GRIDS)), seed=st.integers(0, 99))
def test_error_is_within_half_a_step(kind: str, seed: int) -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(seed))
    rounded = quantize(weight, GRIDS[kind])
    back = from_compressed_tensors(to_compressed_tensors(rounded), GRIDS[kind])
    assert torch.equal(back.dequantize(), rounded.dequantize())
    step = rounded.scale.repeat_interleave(64 // rounded.scale.shape[1], dim=1)
    # A scale in bfloat16 can be too small for the largest weight by 2^-9 of the range.
    slack = 0.5 + GRIDS[kind].levels * 2**-9
    assert ((rounded.dequantize() - weight).abs() <= slack * step).all()


def written(model: Path, folder: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    request = PlanRequest(
        method="rtn",
        settings={"group_size": 32, "embeddings": kind},
        calibration=CalibrationSettings(),
    )
    report = quantize_checkpoint(model, folder, request)
    return folder, report


@pytest.mark.parametrize(("arch", "kind"), [("llama", "int4"), ("qwen2", "int8")])
def test_raw_and_written_models_answer_as_the_reference(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arch: str,
    kind: str,
) -> None:
    """llama is tied, qwen2 is not. The reference has all weights dequantized."""
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    model = tiny_model(arch)
    folder, report = written(model, tmp_path / "out", kind)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == NEEDS_PLUGIN
    assert report["embedding_bits_per_weight"] == (8 + 16 / 128 if kind == "int8" else 4.5)
    section = {"compress": {"weights": {"group_size": 32, "embeddings": kind}}}
    environment = SAME | {"VLLM_COMPRESS_CACHE": str(tmp_path / "cache")}
    # One of them compiled, so that the lookup is traced too.
    same: dict[str, Any] = {"env": environment, "enforce_eager": arch != "llama"}
    raw = generate(model, PROMPTS, quantization="rtn", additional_config=section, **same)
    served = generate(folder, PROMPTS, **same)
    assert raw["quantization"] == served["quantization"] == "rtn"
    assert raw["tokens"] == served["tokens"]

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    request = PlanRequest(method="rtn", settings=section["compress"]["weights"])
    plan, _ = obtain_plan(Checkpoint(model), request)
    names = set()
    for name, value in plan.transform(Checkpoint(model).tensors(), torch.bfloat16):
        if isinstance(value, QuantizedWeight):
            names.add(name)
            reference.get_submodule(name).weight.data.copy_(value.dequantize())
    assert names & set(EMBEDDINGS) == set(EMBEDDINGS[: 1 if arch == "llama" else 2])
    tokenizer = AutoTokenizer.from_pretrained(model)
    for prompt, nats in zip(PROMPTS, raw["prompt_nats"], strict=True):
        ids = torch.tensor(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logits = reference(ids[None]).logits[0, :-1].log_softmax(-1)
        expected = -logits[torch.arange(len(ids) - 1), ids[1:]]
        torch.testing.assert_close(torch.tensor(nats), expected, rtol=0, atol=0.08)


def test_bytes_of_an_allocation_are_those_of_its_ranks(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """``plan`` is not told the ranks, and the file is."""
    model, searched = tiny_model("llama"), tmp_path / "bits.json"
    content = {"bits": {"model.layers.0.qkv": 4}, "grid": {"tensor_parallel": 2}}
    searched.write_text(json.dumps(content))
    settings = WeightSettings(group_size=32, allocation=str(searched))
    assert weight_footprint(model, "rtn", settings) is not None
    with pytest.raises(CompressError, match="searched with tensor_parallel 2, not 1"):
        weight_footprint(model, "rtn", settings, tensor_parallel=1)


@pytest.mark.parametrize("kind", sorted(GRIDS))
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_bytes_are_those_of_the_files(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arch: str,
    kind: str,
) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    model = tiny_model(arch)
    folder, _ = written(model, tmp_path / "out", kind)
    planned = weight_footprint(model, "rtn", WeightSettings(group_size=32, embeddings=kind))
    found = weight_footprint(folder, None)
    assert planned is not None and planned == found
    files = sum(size for _, size in Checkpoint(folder).shapes().values())
    assert found.compressed == files
    for packing in ("cpu-bf16", "cpu-int8"):
        plain = weight_footprint(model, "rtn", WeightSettings(group_size=32), packing=packing)
        less = weight_footprint(folder, None, packing=packing)
        assert plain is not None and less is not None
        assert less.original == plain.original and less.compressed < 0.6 * plain.compressed


@pytest.mark.parametrize("sign", [1, -1])
def test_a_tied_config_beside_a_head(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sign: int
) -> None:
    """A head that differs is served. An equal one is written once, and refused at load."""
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    source, model = tiny_model("llama"), tmp_path / "model"
    shutil.copytree(source, model)
    tensors = dict(Checkpoint(source).tensors())
    head = sign * tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": head}, model / "model.safetensors")
    own = sign < 0
    folder, _ = written(model, tmp_path / "out", "int8")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is not own
    heads = {name for name in Checkpoint(folder).files if name.startswith("lm_head.")}
    assert bool(heads) == own

    settings = WeightSettings(group_size=32, embeddings="int8")
    planned, once = (weight_footprint(each, "rtn", settings) for each in (model, source))
    assert planned == weight_footprint(folder, None)
    assert (planned == once) is not own

    section = {"compress": {"weights": settings.model_dump(exclude_unset=True)}}
    args: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 256}
    assert all(check.ok for check in model_checks(EngineArgs(str(folder), **args)))
    args |= {"quantization": "rtn", "additional_config": section}
    check = model_checks(EngineArgs(str(model), **args))[0]
    assert check.ok == own
    assert own or "`vllm-compress quantize` with the same settings" in check.found


def test_the_plan_does_not_depend_on_embeddings(tiny_model: Callable[..., Path]) -> None:
    source = Checkpoint(tiny_model("llama"))
    keys = {
        PlanRequest(settings={"embeddings": kind}).key(source) for kind in ("none", "int8", "int4")
    }
    assert keys == {PlanRequest().key(source)}


def test_off_is_as_before(tiny_model: Callable[..., Path]) -> None:
    config = Checkpoint(tiny_model("llama")).hf_config
    assert GridSettings().embedding_grid(config) is None
    made = compressed_tensors_config(GridSettings().grids(config), config, {})
    assert made["quant_method"] == "compressed-tensors" and list(made["config_groups"]) == [
        "group_0"
    ]
    assert "lm_head" in made["ignore"]


@pytest.mark.parametrize(
    ("arch", "weights", "engine", "told"),
    [
        ("llama", {"embeddings": "int2"}, {}, "embeddings"),
        ("llama", {"embeddings": "int8"}, {"dtype": "float32"}, "they run in bfloat16"),
        ("llama", {"embeddings": "int8"}, {"enable_lora": True}, "remove --enable-lora"),
        (
            "llama",
            {"embeddings": "int8"},
            {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
            "never tested with --pipeline-parallel-size",
        ),
        (
            "llama",
            {"embeddings": "int4"},
            {"hf_overrides": {"head_dtype": "float32"}},
            "remove head_dtype",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(
    tiny_model: Callable[..., Path],
    arch: str,
    weights: dict[str, Any],
    engine: dict[str, Any],
    told: str,
) -> None:
    section = {"compress": {"weights": weights | {"group_size": 32}}}
    given = {"dtype": "bfloat16", "max_model_len": 256} | engine
    args = EngineArgs(str(tiny_model(arch)), quantization="rtn", additional_config=section, **given)
    [check] = model_checks(args)
    assert not check.ok and told in check.found, check.found


def test_doctor_names_the_kernel(tiny_model: Callable[..., Path]) -> None:
    section = {"compress": {"weights": {"group_size": 32, "embeddings": "int4"}}}
    args = EngineArgs(
        str(tiny_model("llama")),
        quantization="rtn",
        additional_config=section,
        dtype="bfloat16",
        max_model_len=256,
    )
    found = {check.name: check.found for check in model_checks(args)}
    assert "4 bits, groups of 32; tied, one copy" in found["kernel of embeddings"]
    assert found["embeddings, lm_head"].startswith("int4")


def test_models_and_formats_without_them() -> None:
    from compress_common.errors import CompressError
    from quant_methods.formats.checkpoint_formats import FORMATS

    chosen = GridSettings(embeddings="int8")

    class Gemma:
        model_type, hidden_size = "gemma2", 100

    with pytest.raises(CompressError) as error:
        chosen.embedding_grid(Gemma())
    assert "gemma2 model takes no quantized embedding" in str(error.value)
    assert "a multiple of 32, not 100" in str(error.value)
    with pytest.raises(CompressError, match="awq format has no quantized embeddings"):
        FORMATS["awq"].config({}, LLAMA, {}, GRIDS["int8"])
