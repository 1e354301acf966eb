# SPDX-License-Identifier: Apache-2.0
"""int4 linear layers on CPU against float64, for the shapes of SmolLM2-135M and of a 1.1B Llama.

Tolerances: rounding to bfloat16 changes a value by at most BF16 = 2^-8 of it, and adding K products
in float32 by at most K 2^-24 of sum |x| |w|. So an element may be off by that sum times (K 2^-24 +
BF16 for each rounding: the output; the weights if they are dequantized to bfloat16; the sum with a
bias), plus BF16 sum |x| |zero| where zero = (8 - zero point) * scale is rounded. That is the worst
case, which systematic errors could hide in. But a rounding error is evenly spread, so that its root
mean square is 2^-7 / sqrt(12) / mantissa, about 0.42 BF16 over mantissas of 1 to 2, and roundings
are independent. Hence that of all outputs must also be within 0.5 BF16 sqrt(number of roundings).
"""

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
    MPLinearLayerConfig,
)
from vllm.scalar_type import scalar_types

from vllm_plugin.quantization import cpu_int4, cpu_int4_ops
from vllm_plugin.quantization.cpu_int4 import CpuInt4LinearKernel, resolve_activations

BF16 = 2.0**-8
ROWS = (1, 2, 3, 7, 8, 17, 64, 512)
SHAPES = [  # K, N, group size
    (576, 960, 64),
    (576, 576, 64),
    (576, 3072, 64),
    (1536, 576, 128),
]
LARGE_SHAPES = [(2048, 2560, 128), (2048, 2048, 128), (2048, 11264, 128), (5632, 2048, 128)]
ODD_SHAPES = [(576, 192, 32), (512, 208, 256), (256, 16, 64), (128, 2064, 128), (64, 64, 64)]
needs_amx = pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX, which int8 mode needs"
)


@dataclasses.dataclass
class Case:
    """Random weights of one shape in float64, and as compressed-tensors parameters."""

    words: torch.Tensor
    scales: torch.Tensor
    zero_words: torch.Tensor | None
    weight: torch.Tensor  # [N, K]
    zero: torch.Tensor  # [N, K]: (8 - zero point) * scale
    group_size: int

    @property
    def config(self) -> MPLinearLayerConfig:
        n, k = self.weight.shape
        symmetric = self.zero_words is None
        return MPLinearLayerConfig(
            full_weight_shape=(k, n),
            partition_weight_shape=(k, n),
            weight_type=scalar_types.uint4b8 if symmetric else scalar_types.uint4,
            act_type=torch.bfloat16,
            group_size=self.group_size,
            zero_points=not symmetric,
        )

    def layer(self, activations: str) -> tuple[CpuInt4LinearKernel, torch.nn.Module]:
        """A kernel and a layer with the parameters that it has processed."""
        layer = torch.nn.Module()
        shape = torch.tensor(self.weight.shape)
        parameters = {"packed": self.words, "scale": self.scales, "shape": shape}
        if self.zero_words is not None:
            parameters["zero_point"] = self.zero_words
        for name, tensor in parameters.items():
            parameter = torch.nn.Parameter(tensor.clone(), requires_grad=False)
            layer.register_parameter(f"weight_{name}", parameter)
        names = ("weight_packed", "weight_scale", "weight_zero_point")
        kernel = CpuInt4LinearKernel(self.config, *names, activations=activations)
        kernel.process_weights_after_loading(layer)
        return kernel, layer


def pack_words(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0 ... 15 [rows, cols] -> int32 [rows, cols / 8], lowest bits first."""
    nibbles = codes.reshape(codes.shape[0], -1, 8).int() << torch.arange(0, 32, 4).int()
    return nibbles.sum(-1, dtype=torch.int32)  # disjoint bits, so the sum is their union


def make_case(k: int, n: int, group_size: int, symmetric: bool) -> Case:
    generator = torch.Generator().manual_seed(k * n + symmetric)
    weight = torch.randn(n, k // group_size, group_size, generator=generator) * 0.02
    weight += 0.01 * torch.randn(n, k // group_size, 1, generator=generator)
    if symmetric:
        scales = (weight.abs().amax(-1) / 7.5).bfloat16()
        zero_points = torch.full_like(scales, 8, dtype=torch.int32)
    else:
        low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
        scales = ((high - low) / 15).bfloat16()
        zero_points = (-low / scales.float()).round().clamp(0, 15).int()
    codes = (weight / scales.float()[..., None] + zero_points[..., None]).round_().clamp_(0, 15)
    codes = codes.to(torch.uint8)
    scale = scales.double()[..., None]
    exact = (codes.double() - zero_points.double()[..., None]) * scale
    zero = ((8.0 - zero_points.double())[..., None] * scale).expand_as(exact)
    return Case(
        words=pack_words(codes.view(n, k)),
        scales=scales,
        zero_words=None if symmetric else pack_words(zero_points.t().contiguous()).t().contiguous(),
        weight=exact.view(n, k),
        zero=zero.reshape(n, k),
        group_size=group_size,
    )


@functools.cache
def inputs(k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(ROWS[-1], k, generator=generator)
    x[:, ::97] *= 20  # outlier channels
    return x.bfloat16()


def assert_close(
    out: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor, roundings: float
) -> None:
    """`bound` is the worst case per element; `roundings` how many are made (see the top)."""
    assert out.dtype == torch.bfloat16 and out.shape == expected.shape
    error = (out.double() - expected).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.3f} times the bound"
    rms = float(error.square().mean().sqrt() / expected.square().mean().sqrt())
    if expected.numel() > 4096:
        assert rms <= 0.5 * BF16 * roundings**0.5, f"{rms / BF16:.3f} * 2^-8"


def bf16_reference(case: Case, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exact product, worst error for one rounding and exact weights, and the same for two."""
    x64 = x.double()
    total = (x.float().abs() @ case.weight.float().abs().t()).double()
    bound = total * (BF16 + x.shape[1] * 2.0**-24)
    if case.zero_words is not None:
        bound += BF16 * (x.float().abs() @ case.zero.float().abs().t()).double()
    return x64 @ case.weight.t(), bound, bound + BF16 * total


def int8_reference(case: Case, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Product with activations rounded per row to int8 the way vLLM's kernel does, worst error."""
    largest = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-7)
    codes = (x.float() * (127 / largest)).round().double()
    rounded = codes * (largest / 127).double()
    total = (rounded.float().abs() @ case.weight.float().abs().t()).double()
    # Sums within a group are integers, so there are K / g roundings in float32, of three factors.
    groups = x.shape[1] // case.group_size
    return rounded @ case.weight.t(), total * (BF16 + (groups + 3) * 2.0**-23)


@pytest.mark.parametrize(
    ("k", "n", "group_size", "symmetric"),
    [
        pytest.param(
            *shape,
            symmetric,
            id=f"{shape}-{'sym' if symmetric else 'asym'}",
            marks=[pytest.mark.slow] if shape in LARGE_SHAPES else [],
        )
        for shape in SHAPES + ODD_SHAPES + LARGE_SHAPES
        for symmetric in (True, False)
    ],
)
def test_against_float64(
    k: int, n: int, group_size: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every mode and path, for 1 ... 512 rows.

    What large shapes add is several tiles, which ``test_several_tiles`` has in small.
    """
    case, x = make_case(k, n, group_size, symmetric), inputs(k)
    kernel, layer = case.layer("bf16")
    assert kernel.activations == "bf16" and layer.weight_packed.shape == (n, k // 2)
    expected, once, twice = bf16_reference(case, x)
    extra = 0 if symmetric else 1
    for mode, crossover in (("int4pack", 512), ("dequantized", 0), ("auto", None)):
        if crossover is not None:
            monkeypatch.setitem(cpu_int4_ops._crossovers, (k, n, group_size), crossover)
        else:
            monkeypatch.undo()
        bound, roundings = (once, 1) if mode == "int4pack" else (twice, 2)
        for m in ROWS if mode != "auto" else ROWS[::3]:
            out = kernel.apply_weights(layer, x[:m])
            assert_close(out, expected[:m], bound[:m], roundings + extra)
    if n % 32 or not torch.cpu._is_amx_tile_supported():
        return
    kernel, layer = case.layer("int8")
    assert kernel.activations == "int8"
    expected, bound = int8_reference(case, x)
    for m in ROWS:
        assert_close(kernel.apply_weights(layer, x[:m]), expected[:m], bound[:m], 1)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles that a dequantized weight of 576 x 960 does not fit into."""
    monkeypatch.setattr(cpu_int4_ops, "_TILE_BYTES", 1 << 18)
    cpu_int4_ops._tiles.cache_clear()
    yield
    cpu_int4_ops._tiles.cache_clear()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("n", [960, 976])  # equal tiles; a smaller last block
def test_several_tiles(n: int) -> None:
    case, x = make_case(576, n, 64, False), inputs(576)
    _, layer = case.layer("bf16")
    packed, scale_zero = layer.weight_packed.data, layer.weight_scale.data
    assert len(cpu_int4_ops._tiles(n, 576)) > 4
    expected, _, bound = bf16_reference(case, x)
    for m in (1, 17, 64):
        out = cpu_int4_ops.linear_dequantized(x[:m], packed, scale_zero)
        assert_close(out, expected[:m], bound[:m], 3)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("k", "n", "group_size"), [SHAPES[0], *ODD_SHAPES])
def test_dequantized_weights_are_exact(k: int, n: int, group_size: int, symmetric: bool) -> None:
    """The weights that the bfloat16 GEMM sees are those of the checkpoint, rounded once."""
    case = make_case(k, n, group_size, symmetric)
    _, layer = case.layer("bf16")
    packed, scale_zero = layer.weight_packed.data, layer.weight_scale.data
    tiles = [
        cpu_int4_ops.dequantized_tile(packed, scale_zero, tile)
        for tile in cpu_int4_ops._tiles(n, k)
    ]
    scale = case.scales.double().repeat_interleave(group_size, 1)
    codes_less_8 = ((case.weight - case.zero) / scale).round()
    exact = codes_less_8 * scale + case.zero.bfloat16().double()
    assert torch.equal(torch.cat(tiles, 1).t(), exact.float().bfloat16())
    if symmetric:
        assert torch.equal(exact, case.weight)


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_int4pack_layouts(capability: str) -> None:
    """Round trip with the layouts that torch uses on CPUs with smaller vectors."""
    script = """
import torch
from vllm_plugin.quantization import cpu_int4_ops as ops, cpu_int4_packing as packing
words = torch.randint(-2**31, 2**31 - 1, (208, 16), dtype=torch.int32)
packed, scale_zero = packing.pack_int4(words, torch.rand(208, 2).bfloat16() + 1, None)
tiles = [ops.dequantized_tile(packed, scale_zero, tile) for tile in ops._tiles(208, 128)]
scale = scale_zero[..., 0].t().repeat_interleave(64, 1)
assert torch.equal(torch.cat(tiles, 1).t(), (packing.unpack_codes(words).bfloat16() - 8) * scale)
print(torch.backends.cpu.get_cpu_capability(), *ops.int4pack_layout())
"""
    environment = {"ATEN_CPU_CAPABILITY": capability, "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = {"avx2": "AVX2 32 True", "default": "DEFAULT 32 False"}[capability]
    if torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2"):
        assert done.stdout.strip().endswith(expected)


@pytest.mark.parametrize("activations", ["bf16", pytest.param("int8", marks=needs_amx)])
def test_bias_and_shapes_of_x(activations: str) -> None:
    """Bias, three dimensions, strides, and no rows at all."""
    case, x = make_case(576, 960, 64, False), inputs(576)[:12]
    kernel, layer = case.layer(activations)
    bias = torch.randn(960).bfloat16()
    plain = kernel.apply_weights(layer, x)
    with_bias = kernel.apply_weights(layer, x, bias)
    expected = plain.double() + bias.double()
    assert_close(with_bias, expected, 2 * BF16 * (plain.double().abs() + expected.abs()), 2)
    assert torch.equal(kernel.apply_weights(layer, x.view(3, 4, 576)), plain.view(3, 4, 960))
    strided = torch.empty(12, 576 * 2, dtype=torch.bfloat16)[:, ::2].copy_(x)
    transposed = x.t().contiguous().t()
    sliced = torch.cat([x, x], 1)[:, :576]
    for view in (strided, transposed, sliced, x.view(3, 4, 576).transpose(0, 1)):
        same = plain.view(3, 4, 960).transpose(0, 1) if view.dim() == 3 else plain
        assert torch.equal(kernel.apply_weights(layer, view), same)
    assert kernel.apply_weights(layer, x[:0], bias).shape == (0, 960)
    assert kernel.apply_weights(layer, x.view(3, 4, 576)[:0]).shape == (0, 4, 960)


@pytest.mark.parametrize("activations", ["bf16", pytest.param("int8", marks=needs_amx)])
def test_compiled(activations: str) -> None:
    """One graph for any number of rows, on both sides of the crossover."""
    case, x = make_case(576, 192, 64, False), inputs(576)
    kernel, layer = case.layer(activations)
    bias = torch.randn(192).bfloat16()

    def forward(x: torch.Tensor) -> torch.Tensor:
        return kernel.apply_weights(layer, x, bias)

    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for m in (2, 3, 512):
            assert torch.equal(compiled(x[:m]), forward(x[:m]))


@pytest.mark.parametrize("activations", ["bf16", pytest.param("int8", marks=needs_amx)])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_nothing_left_over(symmetric: bool, activations: str) -> None:
    """After processing, the layer holds the packed weights and nothing else; twice is once."""
    k, n, group_size = 1536, 576, 128
    case = make_case(k, n, group_size, symmetric)
    kernel, layer = case.layer(activations)
    groups = n * k // group_size
    # int4pack: a scale and a zero in bfloat16. AMX blocks: a float32 scale, an int8 zero point, and
    # an int32 sum of the weights per group (of at most 128).
    packed = n * k // 2 + groups * (4 if activations == "bf16" else 9)
    tensors = [*layer.parameters(), *layer.buffers()]
    held = sum(t.untyped_storage().nbytes() for t in tensors)
    assert packed <= held <= packed * 1.02
    assert (layer.weight_zero_point is None) == (activations == "bf16")
    assert layer.weight_shape.tolist() == [n, k]
    before = {name: p.data_ptr() for name, p in layer.named_parameters()}
    kernel.process_weights_after_loading(layer)
    assert {name: p.data_ptr() for name, p in layer.named_parameters()} == before


def test_can_implement() -> None:
    """What is refused, and the reason given."""
    config = make_case(576, 192, 64, True).config
    assert CpuInt4LinearKernel.can_implement(config) == (True, None)
    for change, reason in (
        ({"act_type": torch.float16}, "torch.float16"),
        ({"act_type": torch.float32}, "torch.float32"),
        ({"weight_type": scalar_types.uint8b128}, "uint8b128"),
        ({"zero_points": True}, "zero points"),
        ({"group_size": -1}, "group sizes (32, 64, 128, 256), not -1"),
        ({"group_size": 128}, "divisible by the group size, not 576"),
        ({"partition_weight_shape": (576, 200)}, "multiples of 16, not 200"),
    ):
        changed = dataclasses.replace(config, **change)
        possible, why = CpuInt4LinearKernel.can_implement(changed)
        assert not possible and reason in why
        with pytest.raises(ValueError, match="CpuInt4LinearKernel"):
            CpuInt4LinearKernel(changed, "weight_packed", "weight_scale")


def test_choice_of_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 needs AMX and 32 outputs; auto follows vLLM's switch."""
    with pytest.raises(ValueError, match="allowed are 'auto', 'bf16' and 'int8'"):
        resolve_activations("fp8")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert resolve_activations() == resolve_activations("bf16") == "bf16"
    message = r"additional_config\.compress\.weights\.activations is 'int8'.*'auto' or 'bf16'"
    with pytest.raises(ValueError, match=message):
        resolve_activations("int8")
    with pytest.raises(ValueError, match=message):
        make_case(576, 192, 64, True).layer("int8")
    monkeypatch.setattr(cpu_int4, "_has_amx", lambda: True)
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "1")
    assert resolve_activations() == resolve_activations("int8") == "int8"
    config = make_case(512, 208, 256, True).config
    names = ("weight_packed", "weight_scale")
    assert CpuInt4LinearKernel(config, *names).activations == "bf16"
    with pytest.raises(ValueError, match="multiples of 32, and a layer has 208"):
        CpuInt4LinearKernel(config, *names, activations="int8")
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")
    assert resolve_activations() == "bf16"


def test_crossover_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One measurement for all layers of a shape, which leaves the number of threads alone."""
    monkeypatch.setattr(cpu_int4_ops, "_crossovers", {})
    threads = torch.get_num_threads()
    _, layer = make_case(576, 192, 64, True).layer("bf16")
    measured = cpu_int4_ops._crossovers[576, 192, 64]
    assert measured >= 0 and measured % 4 == 0
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(cpu_int4_ops, "_measure_crossover", None)
    args = layer.weight_packed.data, layer.weight_scale.data, 64
    assert cpu_int4_ops.crossover(*args) == measured


def test_without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager dequantizer takes over when torch.compile fails, with the same results."""

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no C++ compiler")

    case, x = make_case(576, 192, 64, False), inputs(576)
    _, layer = case.layer("bf16")
    args = x, layer.weight_packed.data, layer.weight_scale.data
    expected = cpu_int4_ops.linear_dequantized(*args)
    monkeypatch.setattr(torch, "compile", fail)
    cpu_int4_ops._compiled_dequantize.cache_clear()
    try:
        assert torch.equal(cpu_int4_ops.linear_dequantized(*args), expected)
        assert cpu_int4_ops._compiled_dequantize() is cpu_int4_ops._dequantize
    finally:
        cpu_int4_ops._compiled_dequantize.cache_clear()
