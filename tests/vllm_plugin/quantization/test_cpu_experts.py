# SPDX-License-Identifier: Apache-2.0
"""int4 routed experts: our CPU method against float64, and what vLLM makes of the config."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonWNA16Experts
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.utils.marlin_utils import (
    check_moe_marlin_supports_config,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    QuantKey,
    kInt4Static32GroupScale,
    kInt4StaticGroupScale,
)
from vllm.scalar_type import scalar_types

import vllm_plugin
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from compress_common.structure.derive import structure_of
from quant_methods.formats.checkpoint_formats import compressed_tensors_config
from quant_methods.formats.packing import to_compressed_tensors
from quant_methods.formats.writing import quantize_checkpoint
from quant_methods.grid import Grid, QuantizedWeight, quantize
from quant_methods.plan_request import PlanRequest
from tests.support.generate import generate
from vllm_plugin.quantization import cpu_int4
from vllm_plugin.quantization.cpu_experts import (
    CompressedTensorsCpuExperts,
    _packed,
    experts_problem,
)

PROMPTS = ["The capital of France is", "Water boils at"]
EXPERTS, CHOSEN, HIDDEN, INNER = 8, 2, 128, 64


def _stacked(weights: list[QuantizedWeight]) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [to_compressed_tensors(weight, torch.bfloat16) for weight in weights]
    zeros = [part["weight_zero_point"] for part in parts if "weight_zero_point" in part]
    return _packed(
        torch.stack([part["weight_packed"] for part in parts]),
        torch.stack([part["weight_scale"] for part in parts]),
        torch.stack(zeros) if zeros else None,
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 5, 200])
def test_experts_are_those_of_a_float64_reference(rows: int, symmetric: bool) -> None:
    random = torch.Generator().manual_seed(rows)
    grid = Grid(32, symmetric)

    def made(outputs: int, inputs: int) -> list[QuantizedWeight]:
        return [
            quantize(torch.randn(outputs, inputs, generator=random) / inputs**0.5, grid)
            for _ in range(EXPERTS)
        ]

    gate_up, down = made(2 * INNER, HIDDEN), made(HIDDEN, INNER)
    x = torch.randn(rows, HIDDEN, generator=random).bfloat16()
    ids = torch.rand(rows, EXPERTS, generator=random).argsort(-1)[:, :CHOSEN].int()
    ids[::3, 1] = -1  # an expert of another rank
    share = torch.rand(rows, CHOSEN, generator=random)
    got = torch.ops.vllm.cpu_int4_experts(
        x, *_stacked(gate_up), *_stacked(down), share, ids, "silu", 32
    )
    wanted = torch.zeros(rows, HIDDEN, dtype=torch.float64)
    for token in range(rows):
        for place, expert in enumerate(ids[token].tolist()):
            if expert >= 0:
                both = gate_up[expert].dequantize().double() @ x[token].double()
                inner = torch.nn.functional.silu(both[:INNER]) * both[INNER:]
                out = down[expert].dequantize().double() @ inner
                wanted[token] += share[token, place].double() * out
    assert got.dtype == torch.bfloat16 and got.shape == wanted.shape
    assert (got.double() - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.parametrize("arch", ["glm4_moe", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_stock_vllm_finds_the_scheme_of_experts_and_none_of_gates(
    tiny_model: Callable[..., Path], arch: str, symmetric: bool
) -> None:
    hf_config = Checkpoint(tiny_model(arch)).hf_config
    structure = structure_of(hf_config)
    grids = {n: Grid(32, symmetric) for unit in structure.all_units.values() for n in unit}
    written = compressed_tensors_config(grids, hf_config, {})
    config = CompressedTensorsConfig.from_config(written)
    config._add_fused_moe_to_target_scheme_map()
    experts = type("RoutedExperts", (torch.nn.Module,), {})()
    linear = type("ReplicatedLinear", (torch.nn.Linear,), {})(4, 4)
    kind = structure.layer(1)
    for name in sorted(kind.routed):
        scheme = config.get_scheme_dict(experts, f"model.layers.1.{name}")
        assert scheme is not None
        weights = scheme["weights"]
        assert isinstance(weights, QuantizationArgs)
        assert (weights.num_bits, weights.group_size, weights.symmetric) == (4, 32, symmetric)
        assert scheme["format"] == "pack-quantized"
    for gate in kind.kept:
        assert config.get_scheme_dict(linear, f"model.layers.1.{gate}") is None


def test_cuda_kernels_of_vllm_take_what_is_written() -> None:
    """By their own tables: nothing here runs on a GPU."""
    for symmetric, kind in ((True, scalar_types.uint4b8), (False, scalar_types.uint4)):
        for scale in (kInt4Static32GroupScale, kInt4StaticGroupScale):
            key = QuantKey(kind, scale, symmetric=symmetric)
            assert MarlinExperts._supports_quant_scheme(key, None)
            assert TritonWNA16Experts._supports_quant_scheme(key, None)
    real = SimpleNamespace(hidden_dim=2048, intermediate_size_per_partition_unpadded=768)
    for size in (32, 64, 128):
        assert check_moe_marlin_supports_config(real, size, True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bits", "group", "dtype", "shapes", "said"),
    [
        (8, 32, torch.bfloat16, [(128, 128)], "4 bits on a CPU, not 8"),
        (4, 16, torch.bfloat16, [(128, 128)], "groups of .* on a CPU, not 16"),
        (4, 32, torch.float16, [(128, 128)], "not torch.float16"),
        (4, 32, torch.bfloat16, [(128, 128), (40, 128)], "not 40 and 128"),
        (4, 128, torch.bfloat16, [(128, 64)], "not 128 and 64"),
        (4, 32, torch.bfloat16, [(128, 64)], None),
    ],
)
def test_what_a_cpu_does_not_serve_is_said(
    bits: int,
    group: int,
    dtype: torch.dtype,
    shapes: list[tuple[int, int]],
    said: str | None,
) -> None:
    import re

    problem = experts_problem(bits, group, dtype, shapes)
    assert problem is None if said is None else re.search(said, str(problem))


def test_vllm_loads_by_the_name_of_the_class() -> None:
    # RoutedExperts.weight_loader treats classes with this word as compressed-tensors.
    assert "compressed" in CompressedTensorsCpuExperts.__name__.lower()


@pytest.mark.slow
def test_a_written_mixture_is_served_as_one_quantized_at_load(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder, text = tiny_model("qwen2_moe"), {"samples": 2, "length": 32}
    settings = {"group_size": 32, "rounding": "nearest", "alpha": 0.5, "clip": False}
    request = PlanRequest(method="smoothquant_plus", settings=settings, calibration=text)
    report = quantize_checkpoint(folder, tmp_path / "out", request)
    assert report["routing"]["tokens"] == 64
    options = {"max_tokens": 8, "env": {"COMPRESS_INT4_ROWS": "16"}}
    config = {"compress": {"weights": settings | {"calibration": text, "activations": "bf16"}}}
    at_load = generate(
        folder, PROMPTS, quantization="smoothquant_plus", additional_config=config, **options
    )
    written = generate(tmp_path / "out", PROMPTS, enforce_eager=False, **options)
    assert written["quantization"] == at_load["quantization"] == "smoothquant_plus"
    assert written["tokens"] == at_load["tokens"]


def test_int8_is_refused_for_experts_that_no_kernel_takes_so(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is calibrated. Layers without experts are asked by their own kernel."""
    vllm_plugin.register()
    monkeypatch.setattr(cpu_int4, "_has_amx", lambda: True)
    for dtype, said in (
        ("bfloat16", "kernel of experts takes with symmetric weights in groups other than 32"),
        ("float16", "takes activations of torch.bfloat16, not torch.float16; use 'auto'"),
    ):
        with pytest.raises(CompressError, match=said):
            EngineArgs(
                model=str(tiny_model("mixtral")),
                quantization="rtn",
                dtype=dtype,
                additional_config={
                    "compress": {"weights": {"group_size": 32, "activations": "int8"}}
                },
            ).create_engine_config()


def test_what_experts_need_is_refused_at_start(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("mixtral")
    for settings, said in (
        ({"bits": 8}, r"routed experts with rounded activations \(w8a8\) are not served on a CPU"),
        ({"bits": 2}, "routed experts have 4 bits on a CPU, not 2"),
    ):
        vllm_plugin.register()
        with pytest.raises(CompressError, match=said):
            EngineArgs(
                model=str(folder),
                quantization="rtn",
                additional_config={"compress": {"weights": {"group_size": 32} | settings}},
            ).create_engine_config()
