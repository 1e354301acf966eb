# SPDX-License-Identifier: Apache-2.0
"""Which kernel multiplies each fused unit of quantized linears: what ``doctor`` tells."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel

from quant_methods.architecture import ARCHITECTURES, ROW_PARALLEL, linear_shapes
from vllm_plugin.quantization.config import MethodConfig
from vllm_plugin.quantization.cpu_int4 import CpuInt4LinearKernel, resolve_activations
from vllm_plugin.quantization.scheme import kernel_type


def kernels(config: VllmConfig) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield each kind of unit, fused as vLLM serves it, and what describes its kernel.

    A unit with several kinds of grids comes once for each, with the layers that have it.
    """
    quant = config.quant_config
    if not isinstance(quant, MethodConfig):
        return
    hf_config = config.model_config.hf_text_config
    found: dict[tuple[tuple[str, ...], str | None], list[int]] = {}
    # Not ``architecture_of``, which refuses a checkpoint that is quantized already.
    for unit in ARCHITECTURES[hf_config.model_type].units(hf_config).values():
        target = next((t for t in quant.target_scheme_map if _matches(t, unit[0])), None)
        parts = tuple(name.split(".", 3)[3] for name in unit)
        found.setdefault((parts, target), []).append(int(unit[0].split(".")[2]))
    for (parts, target), layers in sorted(found.items(), key=lambda item: item[1]):
        name = "+".join(part.rpartition(".")[2].removesuffix("_proj") for part in parts)
        where = "" if len(layers) == hf_config.num_hidden_layers else f"; layers {ranges(layers)}"
        scheme = None if target is None else quant.target_scheme_map[target]
        yield name, partial(_described, config, quant, parts, scheme, where)


def _described(
    config: VllmConfig,
    quant: MethodConfig,
    parts: tuple[str, ...],
    scheme: dict[str, Any] | None,
    where: str,
) -> str:
    """Return the kernel of a unit as one line; raises what vLLM raises where there is none."""
    if scheme is None:
        return f"vLLM's own, 16 bits{where}"
    shapes = linear_shapes(config.model_config.hf_text_config)
    inputs, outputs = shapes[parts[0]][1], sum(shapes[part][0] for part in parts)
    weights, ranks = scheme["weights"], config.parallel_config.tensor_parallel_size
    if scheme["input_activations"] is not None:
        what = f"{weights.num_bits} bits, rounded activations"
        return f"vLLM's own; {inputs} x {outputs}, {what}{where}"
    row = parts[0] in ROW_PARALLEL
    layer = MPLinearLayerConfig(
        full_weight_shape=(inputs, outputs),
        partition_weight_shape=(inputs // ranks, outputs) if row else (inputs, outputs // ranks),
        weight_type=kernel_type(weights.num_bits, weights.symmetric),
        act_type=config.model_config.dtype,
        group_size=weights.group_size,
        zero_points=not weights.symmetric,
    )
    name = choose_mp_linear_kernel(layer).__name__
    if CpuInt4LinearKernel.can_implement(layer)[0]:
        name = (
            f"{CpuInt4LinearKernel.__name__}, {resolve_activations(quant.activations)} activations"
        )
    if layer.weight_type.size_bits != weights.num_bits:
        name += f", {weights.num_bits} bits unpacked to {layer.weight_type.size_bits}"
    inputs, outputs = layer.partition_weight_shape
    return f"{name}; {inputs} x {outputs}, groups of {layer.group_size}{where}"


def _matches(target: str, linear: str) -> bool:
    return target == "Linear" or bool(re.match(target.removeprefix("re:"), linear))


def ranges(numbers: Sequence[int]) -> str:
    """Ascending integers as text: ``0 to 3, 7, 9 to 11``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
