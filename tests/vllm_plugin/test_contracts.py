# SPDX-License-Identifier: Apache-2.0
"""What we build on in vLLM, by name and signature: an upgrade that breaks us fails here, and says
where. Each test names the seam and the module of ours that uses it."""

import inspect
from dataclasses import fields
from importlib.metadata import entry_points

import pytest
import torch
import vllm
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import vllm_plugin
from vllm_plugin.seams import SEAMS, broken_seams


@pytest.mark.parametrize("name", SEAMS)
def test_seam(name: str) -> None:
    """The list that doctor goes through for users."""
    assert broken_seams({name: SEAMS[name]}) == []


def test_version_is_the_tested_one() -> None:
    assert Version(vllm.__version__).base_version in SpecifierSet(vllm_plugin.SUPPORTED_VLLM)


def test_entry_point_registers_what_users_name() -> None:
    """`vllm.general_plugins`: observable registration, twice without harm."""
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

    from vllm_plugin.quantization.config import CONFIGS
    from vllm_plugin.quantization.loader import LOAD_FORMAT, QuantizingLoader

    (entry,) = entry_points(group="vllm.general_plugins", name="compress")
    register = entry.load()
    register()
    register()
    for config in CONFIGS:
        assert get_quantization_config(config.method) is config
    assert _LOAD_FORMAT_TO_MODEL_LOADER[LOAD_FORMAT] is QuantizingLoader


def test_config_edge() -> None:
    """vllm_plugin/config_edge.py wraps EngineArgs.create_engine_config, once."""
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_plugin import config_edge

    vllm_plugin.register()
    wrapper = EngineArgs.create_engine_config
    config_edge.install()
    assert EngineArgs.create_engine_config is wrapper
    assert getattr(wrapper, config_edge._MARK)
    names = {field.name for field in fields(VllmConfig)}
    assert {
        "additional_config",
        "quant_config",
        "load_config",
        "model_config",
        "parallel_config",
        "lora_config",
        "device_config",
    } <= names


def test_config_edge_composes_with_other_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wrap the same method with functools.wraps, before or after us: one layer is ours."""
    from functools import wraps

    from vllm.engine.arg_utils import EngineArgs

    from vllm_plugin import config_edge

    def plain(self: object) -> None: ...

    @wraps(plain)
    def theirs(self: object) -> None: ...

    monkeypatch.setattr(EngineArgs, "create_engine_config", theirs)
    config_edge.install()
    ours = EngineArgs.create_engine_config
    assert ours is not theirs

    @wraps(ours)
    def theirs_on_top(self: object) -> None: ...

    monkeypatch.setattr(EngineArgs, "create_engine_config", theirs_on_top)
    config_edge.install()
    assert EngineArgs.create_engine_config is theirs_on_top


def test_scheme_and_kernel() -> None:
    """scheme.py, cpu_int4.py: CompressedTensorsWNA16 picks an MPLinearKernel in create_weights."""
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsWNA16,
    )

    assert {"partition_weight_shape", "weight_type", "act_type", "group_size", "zero_points"} <= {
        field.name for field in fields(MPLinearLayerConfig)
    }
    source = inspect.getsource(CompressedTensorsWNA16)
    for name in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"):
        assert f'"{name}"' in source


def test_model_loader() -> None:
    """loader.py overrides DefaultModelLoader.load_model and get_all_weights."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    assert "self.get_all_weights(" in inspect.getsource(DefaultModelLoader.load_weights)


def test_torch_int4_gemm() -> None:
    """cpu_int4_ops.py: torch's int4pack layout and GEMM for few rows."""
    weight = torch.randint(0, 16, (64, 64), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight, 1)
    scale_zero = torch.ones(1, 64, 2, dtype=torch.bfloat16)
    x = torch.eye(64, dtype=torch.bfloat16)
    out = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 64, scale_zero)
    assert torch.equal(out.t().float(), weight.float() - 8 + 1)


def test_vllm_cpu_operators() -> None:
    """cpu_int4_ops.py: vLLM's int8-activation GEMM, where the processor has AMX."""
    from vllm import _custom_ops as ops

    assert hasattr(ops, "convert_weight_packed_scale_zp")
    assert hasattr(ops.CPUQuantAlgo, "AWQ")
