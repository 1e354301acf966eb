# SPDX-License-Identifier: Apache-2.0
"""Which kernel multiplies each fused unit of quantized linears, and where there is none."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.platforms import current_platform

from compress_common.consecutive import consecutive
from compress_common.errors import CompressError
from compress_common.structure.derive import known_structure
from compress_common.structure.structure import Structure
from compress_common.structure.wrapper import language_config
from vllm_plugin.quantization.config import MethodConfig
from vllm_plugin.quantization.cpu_experts import BITS as EXPERT_BITS
from vllm_plugin.quantization.cpu_experts import experts_problem
from vllm_plugin.quantization.cpu_int4 import SETTING, CpuInt4LinearKernel, resolve_activations
from vllm_plugin.quantization.embedding import embedding_kernel
from vllm_plugin.quantization.scheme import kernel_type

# Bits of routed experts for which vLLM has kernels on CUDA (Marlin, Triton), by symmetry.
_CUDA_EXPERTS = {True: (4, 8), False: (4,)}
_NOT_FOR_AMX = 32  # input channels of a group that vLLM's kernel of experts does not take


@dataclass(frozen=True)
class _Unit:
    """A kind of fused unit.

    Attributes:
        name: Such as ``q+k+v``.
        linears: By the names that they have in a layer.
        scheme: Of vLLM's config; None: they stay at 16 bits.
        layers: Those that have it, as text; "": all.
    """

    name: str
    linears: tuple[str, ...]
    scheme: dict[str, Any] | None
    layers: str


def kernels(config: VllmConfig) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield each kind of unit, fused as vLLM serves it, and what describes its kernel.

    A unit with several kinds of grids comes once for each, with the layers that have it.
    """
    for unit in _units(config):
        yield unit.name, partial(_described, config, unit)
    weights = getattr(config.quant_config, "embedding_weights", None)
    if weights is not None:
        yield "embeddings", partial(embedding_kernel, config, weights)


def kernel_problems(config: VllmConfig) -> list[str]:
    """List the units that no kernel multiplies. vLLM itself would end while it loads.

    Args:
        config: vLLM's own, of this engine.
    """
    problems = []
    rounded = getattr(config.quant_config, "activations", None) == "int8"
    if rounded and not current_platform.is_cpu():
        problems.append(f"{SETTING} is 'int8', which only kernels for CPUs do; remove it")
    found: dict[str, list[str]] = {}
    for unit in _units(config):
        try:
            _described(config, unit)
        except CompressError as error:
            name = f"{unit.name} of {unit.layers}" if unit.layers else unit.name
            found.setdefault(str(error), []).append(name)
    return problems + [f"{', '.join(names)}: {problem}" for problem, names in found.items()]


def _units(config: VllmConfig) -> Iterator[_Unit]:
    quant, hf_config = config.quant_config, language_config(config.model_config.hf_config)
    if not isinstance(quant, MethodConfig):
        return
    # Not ``structure_of``, which refuses a checkpoint that is quantized already.
    structure = known_structure(hf_config)
    if structure is None:
        return
    found: dict[tuple[tuple[str, ...], str | None], list[int]] = {}
    for linears in structure.all_units.values():
        target = next((t for t in quant.target_scheme_map if _matches(t, linears[0])), None)
        parts = tuple(structure.place(name)[1] for name in linears)
        found.setdefault((parts, target), []).append(structure.place(linears[0])[0])
    for (parts, target), layers in sorted(found.items(), key=lambda item: item[1]):
        name = "+".join(part.rpartition(".")[2].removesuffix("_proj") for part in parts)
        if parts[0] in structure.routed:
            name = "experts"
        where = "" if len(layers) == structure.depth else f"layers {ranges(layers)}"
        yield _Unit(name, parts, None if target is None else quant.target_scheme_map[target], where)


def _described(config: VllmConfig, unit: _Unit) -> str:
    """Return the kernel of a unit as one line.

    Raises:
        CompressError: There is none.
    """
    where = f"; {unit.layers}" if unit.layers else ""
    if unit.scheme is None:
        return f"vLLM's own, 16 bits{where}"
    structure = known_structure(language_config(config.model_config.hf_config))
    if structure is not None and unit.linears[0] in structure.routed:
        return _experts_described(config, unit, structure) + where
    layer, bits = _layer(config, unit), unit.scheme["weights"].num_bits
    inputs, outputs = layer.full_weight_shape
    if unit.scheme["input_activations"] is not None:
        return f"vLLM's own W8A8; {inputs} x {outputs}, {bits} bits, rounded activations{where}"
    try:
        with set_current_vllm_config(config):  # has --linear-backend
            name = choose_mp_linear_kernel(layer).__name__
    except ValueError as error:
        raise CompressError(_no_kernel(bits, layer, str(error))) from error
    asked = config.quant_config.activations
    ours, reason = CpuInt4LinearKernel.can_implement(layer)
    if current_platform.is_cpu() and not ours and asked == "int8":
        resolve_activations(asked)  # raises without AMX
        raise CompressError(f"{SETTING} is 'int8', and {reason}; use 'auto' or 'bf16'")
    if current_platform.is_cpu() and not ours and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        raise CompressError(
            f"{reason}, and vLLM's own int4 kernel needs AVX-512, which this processor lacks; use "
            "--dtype bfloat16"
        )
    if ours:
        kind = CpuInt4LinearKernel.served_activations(layer, asked)
        name = f"{CpuInt4LinearKernel.__name__}, {kind} activations"
    if layer.weight_type.size_bits != bits:
        name += f", {bits} bits unpacked to {layer.weight_type.size_bits}"
    inputs, outputs = layer.partition_weight_shape
    return f"{name}; {inputs} x {outputs}, groups of {layer.group_size}{where}"


def _experts_described(config: VllmConfig, unit: _Unit, structure: Structure) -> str:
    """Return what multiplies routed experts, as one line.

    Raises:
        CompressError: Nothing does.
    """
    assert unit.scheme is not None
    if config.parallel_config.enable_expert_parallel:
        raise CompressError(
            "quantized experts were never tested with --enable-expert-parallel; use "
            "--tensor-parallel-size alone"
        )
    if config.lora_config is not None:
        raise CompressError(
            "quantized experts were never tested with --enable-lora; remove the flag, or leave "
            "experts at 16 bits with an allocation"
        )
    weights, ranks = unit.scheme["weights"], config.parallel_config.tensor_parallel_size
    shapes: set[tuple[int, int]] = set()
    for name in unit.linears:
        outputs, inputs = structure.shapes[name]
        row = name in structure.row_parallel
        shapes.add((outputs, inputs // ranks) if row else (outputs // ranks, inputs))
    kind = next(kind for kind in structure.kinds if kind.experts is not None)
    assert kind.experts is not None
    text = (
        f"{kind.experts.count} experts, {kind.experts.chosen} for a token, {weights.num_bits} bits"
    )
    if unit.scheme["input_activations"] is not None:
        if current_platform.is_cpu():
            raise CompressError(
                f"routed experts with rounded activations (w8a8) are not served on a CPU; quantize "
                f"them to {EXPERT_BITS} bits, or leave them at 16 with an allocation"
            )
        return f"vLLM's own; {text}, rounded activations"
    if current_platform.is_cpu():
        dtype, size = config.model_config.dtype, weights.group_size or -1
        if problem := experts_problem(weights.num_bits, size, dtype, sorted(shapes)):
            raise CompressError(problem)
        asked = config.quant_config.activations
        if resolve_activations(asked) == "int8":
            if asked == "int8" and (not weights.symmetric or size == _NOT_FOR_AMX):
                raise CompressError(
                    f"{SETTING} is 'int8', which vLLM's kernel of experts takes with symmetric "
                    f"weights in groups other than {_NOT_FOR_AMX}; use 'auto' or 'bf16'"
                )
            where = " where it takes them, else CompressedTensorsCpuExperts"
            return f"vLLM's for AMX{where if asked == 'auto' else ''}; {text}"
        return f"CompressedTensorsCpuExperts, bf16 activations; {text}"
    if weights.num_bits not in _CUDA_EXPERTS[bool(weights.symmetric)]:
        served = "4 bits, and of 8 bits without zero points (symmetric=true)"
        raise CompressError(
            f"no kernel here serves routed experts of {weights.num_bits} bits "
            f"{'without' if weights.symmetric else 'with'} zero points; there are kernels for "
            f"weights of {served}"
        )
    return f"vLLM's own; {text}"


def _layer(config: VllmConfig, unit: _Unit) -> MPLinearLayerConfig:
    """Return what vLLM chooses the kernel of a quantized unit by."""
    assert unit.scheme is not None
    hf_config = language_config(config.model_config.hf_config)
    ranks = config.parallel_config.tensor_parallel_size
    structure = known_structure(hf_config)
    assert structure is not None
    shapes, weights = structure.shapes, unit.scheme["weights"]
    inputs, outputs = shapes[unit.linears[0]][1], sum(shapes[name][0] for name in unit.linears)
    if unit.linears[0] in structure.row_parallel:
        part = inputs // ranks, outputs
    else:  # vLLM repeats key and value heads that are fewer than the ranks
        part = inputs, sum(_cut(structure, name, ranks, hf_config) for name in unit.linears)
    return MPLinearLayerConfig(
        full_weight_shape=(inputs, outputs),
        partition_weight_shape=part,
        weight_type=kernel_type(weights.num_bits, weights.symmetric),
        act_type=config.model_config.dtype,
        group_size=weights.group_size or -1,
        zero_points=not weights.symmetric,
    )


def _cut(structure: Structure, linear: str, ranks: int, hf_config: Any) -> int:
    """Return the output channels of a linear on one rank: key and value heads may be repeated."""
    outputs, known = structure.shapes[linear][0], structure.attention
    if known is None or linear not in (known.key, known.value):
        return outputs // ranks
    heads = getattr(hf_config, "num_key_value_heads", None) or hf_config.num_attention_heads
    if known.separate:
        return outputs // min(ranks, heads)
    stored = 2 * heads * known.head_dim
    return (outputs - stored) // ranks + stored // min(ranks, heads)


def _no_kernel(bits: int, layer: MPLinearLayerConfig, reasons: str) -> str:
    zeros = "with" if layer.zero_points else "without"
    served = "4 bits, of 8 bits without zero points, and of 8 bits with int8 activations (w8a8)"
    if current_platform.is_cpu():
        served = "2, 3 and 4 bits, and of 8 bits with int8 activations (w8a8)"
    tried = "; ".join(line.strip() for line in reasons.splitlines()[1:])
    return (
        f"no kernel here serves weights of {bits} bits {zeros} zero points; "
        f"{current_platform.device_type.upper()} kernels serve weights of {served}; quantize with "
        f"such bits (vLLM: {tried})"
    )


def _matches(target: str, linear: str) -> bool:
    return target == "Linear" or bool(re.match(target.removeprefix("re:"), linear))


def ranges(numbers: Sequence[int]) -> str:
    """Ascending integers as text: ``0 to 3, 7, 9 to 11``."""
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in consecutive(numbers))
