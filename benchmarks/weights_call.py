# SPDX-License-Identifier: Apache-2.0
"""An int4 linear of ours and of vLLM, with the same AMX kernel: what the calls around it take.

On an emulated processor whose clock counts instructions, these are shares of instructions.
"""

import time
from collections.abc import Callable
from typing import Any

from benchmarks.common import Options, Result, alternate
from benchmarks.engine import in_process
from benchmarks.random_models import LLAMA_1B, TINY
from benchmarks.weights_speed import no_amx

GROUP = 128
KEYS = {rows: f"call_ratio_b{rows}" for rows in (1, 8, 32)}
CALLS = 5  # of each linear in a sample


def call(options: Options, result: Result) -> None:
    """Fill call_ratio_*: vLLM's time of a layer's linears over ours, with 1, 8 and 32 rows."""
    if why := no_amx():
        for key in KEYS.values():
            result.missing(key, why)
        return
    samples = in_process(_samples, options, preloaded=options.smoke)
    for rows, key in KEYS.items():
        result.note(f"call_ns_b{rows}", samples[rows])
        result.ratio(key, samples[rows]["vLLM"], samples[rows]["ours"])


def _samples(options: Options) -> dict[int, dict[str, list[float]]]:
    """Nanoseconds of a layer's linears by rows and by whose they are; their outputs are equal."""
    import torch

    torch.manual_seed(options.seed)
    torch.set_grad_enabled(False)
    size = TINY if options.smoke else LLAMA_1B
    hidden, inner = size.hidden_size, size.intermediate_size
    kv = hidden // size.num_attention_heads * size.num_key_value_heads
    shapes = (hidden, hidden + 2 * kv), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)
    linears = [_linears(*shape) for shape in shapes]
    found = {}
    for rows in KEYS:
        inputs = [torch.randn(rows, shape[0]).bfloat16() for shape in shapes]

        def sample(whose: str, inputs: list[Any] = inputs) -> float:
            start = time.perf_counter_ns()
            for _ in range(CALLS):
                for pair, x in zip(linears, inputs, strict=True):
                    pair[whose](x)
            return (time.perf_counter_ns() - start) / CALLS

        for pair, x in zip(linears, inputs, strict=True):
            if not torch.equal(pair["ours"](x), pair["vLLM"](x)):
                raise RuntimeError("the two have other outputs")
        title = f"linears of a layer, {rows} rows"
        found[rows] = alternate(["vLLM", "ours"], options.rounds, sample, title)
    return found


def _linears(inputs: int, outputs: int) -> dict[str, Callable[[Any], Any]]:
    """Both kernels, on the same random weights without zero points."""
    import torch
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
        MPLinearLayerConfig,
    )
    from vllm.scalar_type import scalar_types

    from vllm_plugin.quantization.cpu_int4 import CpuInt4LinearKernel

    shape = inputs, outputs
    config = MPLinearLayerConfig(
        full_weight_shape=shape,
        partition_weight_shape=shape,
        weight_type=scalar_types.uint4b8,
        act_type=torch.bfloat16,
        group_size=GROUP,
        zero_points=False,
    )
    words = torch.randint(-(2**31), 2**31, (outputs, inputs // 8), dtype=torch.int64).int()
    scales = (torch.rand(outputs, inputs // GROUP) * 0.01 + 0.001).bfloat16()
    found: dict[str, Callable[[Any], Any]] = {}
    for name, kind in (("ours", CpuInt4LinearKernel), ("vLLM", CPUWNA16LinearKernel)):
        layer = torch.nn.Module()
        layer.bias = None
        for key, tensor in (("weight", words), ("scale", scales)):
            parameter = torch.nn.Parameter(tensor.clone(), requires_grad=False)
            parameter.input_dim, parameter.output_dim, parameter.packed_dim = 1, 0, 1
            layer.register_parameter(key, parameter)
        kernel = kind(config, "weight", "scale", "zero")
        kernel.process_weights_after_loading(layer)
        found[name] = lambda x, kernel=kernel, layer=layer: kernel.apply_weights(layer, x)
    return found
