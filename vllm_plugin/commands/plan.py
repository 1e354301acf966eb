# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress plan``: how many requests fit, without and with compression. No engine starts."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.table import Table

from compress_common.errors import CompressError, joined, nearest
from kv_policies.layout.base import Layout
from quant_methods.checkpoint import Checkpoint
from quant_methods.local import local_folder, text_config
from quant_methods.registry import methods
from quant_methods.sizes import Packing
from vllm_plugin.capacity import (
    Footprint,
    Group,
    activation_allowance,
    block_bytes,
    groups_of,
    kv_footprint,
    layer_token_bytes,
    request_blocks,
    typical_prompt,
    weight_footprint,
)
from vllm_plugin.commands.common import (
    AdditionalConfig,
    AsJson,
    BasesFile,
    Keep,
    Model,
    Policy,
    ProfileFile,
    Quantization,
    config_of,
    gib,
    out,
)
from vllm_plugin.kv_cache.budget import layouts_of
from vllm_plugin.settings import Settings, parse_settings

_MAX_NUM_SEQS = 256  # vLLM's smallest default

T = TypeVar("T")


@dataclass(frozen=True)
class Load:
    """What is asked of a deployment, in tokens. batch: most in one step."""

    context: int
    prompt: int
    block_size: int
    batch: int


@dataclass(frozen=True)
class Column:
    """A deployment, sizes in bytes: what it takes, and how many requests it holds at once."""

    weights: int
    kv_bytes_per_token: int
    kv_memory: int
    block_bytes: int
    blocks: int
    peak_blocks: int
    decoding_blocks: int
    requests: int
    requests_one_in_prefill: int


def plan(
    model: Model,
    gpu_memory: Annotated[str, typer.Option(help="memory of the device: 80GiB, 24GB")],
    context: Annotated[
        str,
        typer.Option(
            help="tokens of a request when it ends. As for --max-model-len, 32k is 32,000 and 32K "
            "is 32,768"
        ),
    ],
    prompt: Annotated[
        str | None, typer.Option(help="tokens of them that are prompt (default: seven eighths)")
    ] = None,
    policy: Policy = None,
    keep: Keep = None,
    profile: ProfileFile = None,
    bases: BasesFile = None,
    quantization: Quantization = None,
    additional_config: AdditionalConfig = "{}",
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0.01, max=1, help="share of the memory that vLLM may use")
    ] = 0.92,
    activation_memory: Annotated[
        str | None,
        typer.Option(help="set aside for activations and graphs (default: an estimate)"),
    ] = None,
    block_size: Annotated[
        int, typer.Option(min=2, help="tokens per block: CUDA 16, this plugin on a CPU 32")
    ] = 16,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="tokens per step, which activations grow with")
    ] = 8192,
    packing: Annotated[
        Packing, typer.Option(help="how int4 is held: CPU kernels need more than the checkpoint")
    ] = "checkpoint",
    as_json: AsJson = False,
) -> None:
    """Tell how many requests fit a device, without and with compression. Nothing is loaded.

    Only the config and the headers of the weights are read, of a model on this machine. One device
    holds the model; with tensor parallelism give the memory of all.

    Example: vllm-compress plan meta-llama/Llama-3.1-8B-Instruct --gpu-memory 80GiB --context 32k
    --policy snap_kv --keep 0.25 --quantization smoothquant_plus
    """
    check = _Problems()
    memory = check(lambda: size(gpu_memory, "--gpu-memory")) or 0
    tokens = check(lambda: size(context, "--context")) or 0
    start = check(lambda: size(prompt, "--prompt")) if prompt else typical_prompt(tokens)
    aside = (
        check(lambda: size(activation_memory, "--activation-memory")) if activation_memory else None
    )
    settings = check(
        lambda: parse_settings(config_of(additional_config, policy, keep, profile, bases))
    )
    folder = check(lambda: _folder(model))
    config = check(lambda: text_config(folder)) if folder else None
    if tokens and start and start >= tokens:
        check.found.append(
            f"--prompt {start} leaves no room for an answer in --context {tokens}; lower it"
        )
    weights = layouts = each = None
    if folder is not None and config is not None and settings is not None:
        weights = check(lambda: _weights(folder, quantization, settings, packing))
        layouts = check(lambda: _layouts(settings, block_size, model, config))
        each = check(lambda: layer_token_bytes(config, torch.bfloat16))
    if check.found or weights is None or each is None:
        raise joined(check.found)

    if aside is None:
        aside = activation_allowance(config, max_num_batched_tokens)
    load = Load(tokens, start or 0, block_size, max_num_batched_tokens)
    room = int(memory * gpu_memory_utilization) - aside
    kv = kv_footprint(config, torch.bfloat16, "auto", layouts)
    without, compressed = (
        _column(groups_of(config, chosen), load, room, taken, per_token, each)
        for chosen, taken, per_token in (
            (None, weights.original, kv.original),
            (layouts, weights.compressed, kv.compressed),
        )
    )
    if as_json:
        content = {"without": asdict(without), "with": asdict(compressed)}
        print(json.dumps(asdict(load) | {"activation_memory": aside} | content))
    else:
        _print(model, load, aside, without, compressed)


def _column(
    groups: list[Group], load: Load, room: int, weights: int, per_token: int, each: int
) -> Column:
    """room: bytes for weights and KV. each: bytes of a token in a layer."""
    page = block_bytes(groups, load.block_size, each)
    need = request_blocks(groups, load.block_size, load.context, load.prompt, load.batch)
    blocks = max(0, room - weights) // page
    return Column(
        weights=weights,
        kv_bytes_per_token=per_token,
        kv_memory=max(0, room - weights),
        block_bytes=page,
        blocks=blocks,
        peak_blocks=need.peak,
        decoding_blocks=need.decoding,
        requests=need.all_decoding(blocks),
        requests_one_in_prefill=need.one_in_prefill(blocks),
    )


def _print(model: str, load: Load, aside: int, without: Column, compressed: Column) -> None:
    table = Table()
    for heading in ("", "without", "with", "factor"):
        table.add_column(heading, justify="right" if heading else "left")

    def row(name: str, field: str, form: Callable[[int], str]) -> None:
        before, after = getattr(without, field), getattr(compressed, field)
        factor = f"{after / before:.2f}" if before else "-"
        table.add_row(name, form(before), form(after), factor)

    row("weights", "weights", gib)
    row("KV bytes per token of a long prompt", "kv_bytes_per_token", "{:,}".format)
    row("memory left for KV", "kv_memory", gib)
    row(f"blocks of {load.block_size} tokens", "blocks", "{:,}".format)
    row("bytes per block", "block_bytes", "{:,}".format)
    row("blocks of a request: its peak", "peak_blocks", "{:,}".format)
    row("blocks of a request: decoding, at most", "decoding_blocks", "{:,}".format)
    row("requests at once, all decoding", "requests", "{:,}".format)
    row("requests at once, one of them in prefill", "requests_one_in_prefill", "{:,}".format)
    title = f"{model}: requests of {load.prompt:,} tokens of prompt, {load.context:,} in all"
    out.print(title, highlight=False, soft_wrap=True)
    out.print(table)
    notes = [
        "A prompt needs all its blocks while it is computed (the peak); then it keeps its share.",
        f"Set aside for activations and graphs: {gib(aside)}; vLLM measures it when it starts.",
    ]
    if compressed.requests > _MAX_NUM_SEQS:
        notes.append("vLLM also limits requests at once by --max-num-seqs: raise it to that.")
    if not compressed.requests_one_in_prefill:
        notes.append("Not one such prompt fits: give more memory or a shorter prompt.")
    for note in notes:
        out.print(note, highlight=False, soft_wrap=True)


def size(text: str, option: str) -> int:
    """``80GiB``, ``24GB``, ``32k`` or ``32K`` as a number; CompressError names the option."""
    # 1K is 1,024 for vLLM, and 1k is 1,000; pydantic knows the latter only.
    text = f"{text}iB" if text.endswith("K") else text
    try:
        value = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        value = -1
    if value < 0:
        raise CompressError(f"{option} {text!r} is not a size such as 80GiB, 24GB, 32k or 32000")
    return value


def _folder(model: str) -> Path:
    folder = local_folder(model)
    if folder is None:
        raise CompressError(
            f"{model} is not on this machine, and nothing is downloaded to plan; give a folder, or "
            f"fetch it first: hf download {model}"
        )
    Checkpoint(folder)  # says what is wrong with the files
    return folder


def _weights(
    folder: Path, quantization: str | None, settings: Settings, packing: Packing
) -> Footprint:
    if quantization is not None and quantization not in methods():
        hint = nearest(quantization, methods())
        raise CompressError(
            f"--quantization {quantization!r} is no method of ours{hint} "
            f"(valid: {', '.join(sorted(methods()))})"
        )
    found = weight_footprint(folder, quantization, settings.weights, packing=packing)
    if found is None:
        raise CompressError(
            f"{folder} is quantised by others, so its 16-bit size is not known; give the original"
        )
    return found


def _layouts(
    settings: Settings, block_size: int, model: str, config: Any
) -> Mapping[int, Layout] | None:
    if settings.kv is None:
        return None
    settings.kv.build()
    return layouts_of(settings.kv, block_size, model, config)


class _Problems:
    """Collects what is wrong, so that users see all of it at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def __call__(self, step: Callable[[], T]) -> T | None:
        try:
            return step()
        except CompressError as error:
            self.found.append(str(error))
            return None
