# SPDX-License-Identifier: Apache-2.0
"""int4 weights with FP8 activations: vLLM's conversion, its choice for Hopper, and our refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.model_executor.kernels.linear.mixed_precision.cutlass import CutlassW4A8LinearKernel
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW4A8Fp8,
)
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    convert_bf16_scales_to_fp8,
)
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.plugins import load_general_plugins
from vllm.scalar_type import scalar_types

from compress_common.errors import CompressError
from quant_methods.fp8 import FP8, converted, served_activation, served_scale
from vllm_plugin.commands.checks import model_checks
from vllm_plugin.commands.quantize import quantize


class OnGpu(torch.Tensor):
    """A tensor that passes vLLM's assertion that scales are on a GPU."""

    is_cuda = True


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    load_general_plugins()


@pytest.fixture(scope="module")
def written(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of fireq, from the command line's own function."""
    folder = tmp_path_factory.mktemp("fireq")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_COMPRESS_CACHE", str(folder / "cache"))
        quantize(str(tiny_model("qwen2")), folder / "a", method="fireq", samples=2, length=16)
    return folder / "a"


def by_division(quant_fp8: QuantFP8, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What vLLM's CUDA kernel computes, which divides where the native operator multiplies."""
    _, channel = quant_fp8.forward_native(scales)
    return (scales.float() / channel).clamp(-448, 448).to(FP8), channel


def test_the_conversion_is_that_of_vllm_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    raw = 10 ** (torch.randn(512, 40, generator=generator) * 1.5 - 3)
    raw[0] = 1e-8
    raw[1, 1:] = 1e-8
    stored = served_scale(raw).to(torch.bfloat16)
    with set_current_vllm_config(VllmConfig()):
        operator = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)
    for quant_fp8 in (operator.forward_native, lambda x: by_division(operator, x)):
        groups, channels = convert_bf16_scales_to_fp8(quant_fp8, stored.as_subclass(OnGpu))
        ours, per_channel = converted(stored)
        assert torch.equal(
            ours.view(torch.uint8), groups.view(torch.uint8).as_subclass(torch.Tensor)
        )
        assert torch.equal(per_channel, channels.as_subclass(torch.Tensor))
    x = torch.randn(64, 256, generator=generator, dtype=torch.bfloat16)
    x[0] = 0
    codes, scale = by_division(operator, x)
    assert torch.equal(served_activation(x), codes.float() * scale)


def test_hopper_takes_vllms_own_scheme(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert config["format"] == "pack-quantized"
    assert group["input_activations"]["strategy"] == "token"
    kinds = [get_quantization_config(name) for name in ("compressed-tensors", "fireq")]
    monkeypatch.setattr(
        type(current_platform), "get_device_capability", lambda *_, **__: DeviceCapability(9, 0)
    )
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda _: True)
    for kind in kinds:  # without the plugin, and with it
        served = kind.from_config(config)
        scheme = served._get_scheme_from_parts(
            *(served.target_scheme_map["Linear"][key] for key in ("weights", "input_activations"))
        )
        assert type(scheme) is CompressedTensorsW4A8Fp8
        layer = MPLinearLayerConfig(
            full_weight_shape=(128, 256),
            partition_weight_shape=(128, 256),
            weight_type=scheme.quant_type,
            act_type=FP8,
            group_size=scheme.group_size,
            zero_points=not scheme.symmetric,
            out_type=torch.bfloat16,
        )
        assert scheme.quant_type == scalar_types.int4
        assert CutlassW4A8LinearKernel.can_implement(layer) == (True, None)


def test_what_cannot_serve_it_is_refused_in_one_line(written: Path) -> None:
    arguments: dict[str, Any] = {"model": str(written), "dtype": "float32", "max_model_len": 64}
    with pytest.raises(CompressError) as refused:
        EngineArgs(**arguments).create_engine_config()
    assert len(refused.value.problems) == 2
    assert "only on a Hopper GPU (capability 9.0), and this is a CPU" in refused.value.problems[0]
    assert "--dtype bfloat16" in refused.value.problems[1]
    (check,) = model_checks(EngineArgs(**arguments | {"dtype": "bfloat16"}))
    assert not check.ok
    assert check.found.startswith("fireq: vLLM multiplies int4 weights with FP8 activations only")


def test_at_load_is_refused(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(CompressError, match="Hopper"):
        EngineArgs(
            model=str(tiny_model("qwen2")), quantization="fireq", max_model_len=64
        ).create_engine_config()
