# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress plan``: how many requests fit, without and with compression. No engine starts."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.table import Table

from compress_common.checkpoints.folder import check_model
from compress_common.errors import CompressError
from vllm_plugin.commands.common import (
    AdditionalConfig,
    AsJson,
    BasesFile,
    Budget,
    Keep,
    Model,
    Policy,
    Problems,
    ProfileFile,
    Quantization,
    config_of,
    err,
    gib,
    mib,
    out,
)

if TYPE_CHECKING:
    from vllm_plugin.commands.deployment import Comparison, Load

_MAX_NUM_SEQS = 256  # vLLM's smallest default
# quant_methods.formats.sizes.Packing, which would import torch. A test compares them.
Packing = Literal["checkpoint", "cpu-bf16", "cpu-int8"]


def plan(
    model: Model,
    gpu_memory: Annotated[
        str, typer.Option(help="memory of the device, with its unit: 80GiB, 24GB")
    ],
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
    budget: Budget = None,
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
        int | None,
        typer.Option(
            min=2,
            help="tokens per block (default: as on CUDA, 16, for cskv 64; on a CPU it is 32)",
        ),
    ] = None,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="tokens per step, which activations grow with")
    ] = 8192,
    max_num_seqs: Annotated[
        int,
        typer.Option(
            min=1,
            help="requests at once, as for `vllm serve`: policies that look at attention store "
            "the last queries of each",
        ),
    ] = _MAX_NUM_SEQS,
    packing: Annotated[
        Packing, typer.Option(help="how int4 is held: CPU kernels need more than the checkpoint")
    ] = "checkpoint",
    as_json: AsJson = False,
) -> None:
    """Tell how many requests fit a device, without and with compression. Nothing is loaded.

    Only the config and the headers of the weights are read, of a model on this machine. One device
    holds the model; with tensor parallelism give the memory of all. Exits with 1 if not one request
    fits.

    Example: vllm-compress plan meta-llama/Llama-3.1-8B-Instruct --gpu-memory 80GiB --context 32k
    --policy snap_kv --keep 0.25 --quantization smoothquant_plus
    """
    problems = Problems()
    problems.collect(lambda: check_model(model))
    memory = problems.collect(lambda: memory_size(gpu_memory, "--gpu-memory")) or 0
    tokens = problems.collect(lambda: context_size(context)) or 0
    start = None if prompt is None else problems.collect(lambda: size(prompt, "--prompt"))
    aside = None
    if activation_memory is not None:
        aside = problems.collect(lambda: memory_size(activation_memory, "--activation-memory"))
    if start is not None and tokens and start >= tokens:
        problems.found.append(
            f"--prompt {start} leaves no room for an answer in --context {tokens}; lower it"
        )
    config = problems.collect(
        lambda: config_of(additional_config, policy, keep, budget, profile, bases)
    )
    problems.raise_found()
    from vllm_plugin.capacity.blocks import typical_prompt
    from vllm_plugin.commands.deployment import Load, compare, default_block_size

    start = typical_prompt(tokens) if start is None else start
    block = block_size or default_block_size(config or {})
    load = Load(tokens, start, block, max_num_batched_tokens, max_num_seqs)
    found = compare(
        model,
        load,
        int(memory * gpu_memory_utilization),
        quantization=quantization,
        additional_config=config or {},
        packing=packing,
        activation_memory=aside,
        problems=problems,
    )
    load = replace(load, block_size=found.block_size)
    warning = _too_long(load.context, found.model_length)
    if as_json:
        if warning:
            err.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
        content = {"without": asdict(found.without), "with": asdict(found.compressed)}
        aside = found.activation_memory
        given = {"activation_memory": aside, "depth": found.depth}
        print(json.dumps(asdict(load) | given | content))
    else:
        _print(model, load, found, packing, warning)
    if not found.compressed.requests_one_in_prefill:
        raise typer.Exit(1)


def _too_long(context: int, model_length: int | None) -> str | None:
    if model_length is None or context <= model_length:
        return None
    return (
        f"--context {context:,} is more than the model's {model_length:,} positions, and vLLM "
        "refuses that"
    )


def _print(
    model: str, load: "Load", found: "Comparison", packing: str, warning: str | None
) -> None:
    without, compressed = found.without, found.compressed
    table = Table()
    changed, quantized = without != compressed, without.weights != compressed.weights
    headings = ("", "without", "with", "factor") if changed else ("", "without compression")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")

    def row(name: str, field: str, form: Callable[[int], str]) -> None:
        before, after = getattr(without, field), getattr(compressed, field)
        factor = f"{after / before:.2f}" if before else "-"
        table.add_row(name, *(form(before), form(after), factor)[: len(headings) - 1])

    row(f"weights (int4 as {packing})" if quantized else "weights", "weights", gib)
    row(f"KV bytes per token of a prompt of {load.prompt:,}", "kv_bytes_per_token", "{:,}".format)
    if compressed.beside_cache:
        row("memory beside the KV cache", "beside_cache", mib)
    row("memory left for KV", "kv_memory", gib)
    if without.block_bytes == compressed.block_bytes:  # else blocks are of fewer layers each
        row(f"blocks of {load.block_size} tokens", "blocks", "{:,}".format)
        row("bytes per block", "block_bytes", "{:,}".format)
    row("KV of a request at its peak", "peak_bytes", mib)
    row("KV of a request that decodes, at most", "decoding_bytes", mib)
    row("requests at once, all decoding", "requests", "{:,}".format)
    row("requests at once, one of them in prefill", "requests_one_in_prefill", "{:,}".format)
    title = f"{model}: requests of {load.prompt:,} tokens of prompt, {load.context:,} in all"
    out.print(title, highlight=False, soft_wrap=True)
    if warning:
        out.print(f"Warning: {warning}.", style="yellow", highlight=False, soft_wrap=True)
    out.print(table)
    aside = gib(found.activation_memory)
    notes = [
        f"Set aside for activations and graphs: {aside}; vLLM measures it when it starts.",
    ]
    if found.depth:
        notes.append(f"The model is pruned: {found.depth}.")
    if found.prompt_window:
        notes.append(
            f"Prompts of more than {found.prompt_window:,} tokens are compacted while they are "
            "computed."
        )
    elif compressed.decoding_blocks != without.decoding_blocks:
        notes.append(
            "A prompt needs all its blocks while it is computed (the peak); then it is compacted."
        )
    if not changed:
        notes.append("Nothing is compressed: give --policy and --keep, or --quantization.")
    if compressed.stored_queries:
        notes.append(
            f"Of the memory beside the KV cache {mib(compressed.stored_queries)} are queries that "
            f"score decode windows, stored for {load.sequences:,} requests (--max-num-seqs)."
        )
    if compressed.requests > load.sequences:
        notes.append("vLLM also limits requests at once by --max-num-seqs: raise it to that.")
    if not compressed.kv_memory:
        notes.append("The weights and what is set aside take all of the memory: give more.")
    elif not compressed.requests_one_in_prefill:
        notes.append("Not one such prompt fits: give more memory or a shorter prompt.")
    for note in notes:
        out.print(note, highlight=False, soft_wrap=True)


def size(text: str, option: str) -> int:
    """Return a number of tokens or bytes: ``32k``, ``32K``, ``80GiB`` or ``24GB``.

    Raises:
        CompressError: names the option.
    """
    # 1K is 1,024 for vLLM, and 1k is 1,000; pydantic knows the latter only.
    scaled = f"{text}iB" if text.endswith("K") else text
    try:
        value = int(TypeAdapter(ByteSize).validate_python(scaled))
    except ValidationError:
        value = -1
    if value < 0:
        raise CompressError(f"{option} {text!r} is not a size such as 80GiB, 24GB, 32k or 32000")
    return value


def context_size(text: str) -> int:
    """Return the tokens of a request.

    Raises:
        CompressError: it is no size, or has no room for a prompt and an answer.
    """
    tokens = size(text, "--context")
    if tokens < 2:
        raise CompressError(f"--context {text} has no room for a prompt and an answer; raise it")
    return tokens


def memory_size(text: str, option: str) -> int:
    """Return bytes. A number without a unit is refused, because 80 is never meant as 80 bytes.

    Raises:
        CompressError: names the option, and suggests a unit.
    """
    value = size(text, option)
    try:
        number = float(text)
    except ValueError:
        return value
    if number == 0:
        return 0
    raise CompressError(f"{option} {text!r} has no unit; give one, such as {text.strip()}GiB")
