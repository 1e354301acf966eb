# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress quantize``: write an int4 checkpoint."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from compress_common.checkpoints.folder import check_model
from compress_common.checkpoints.partial import Partial
from vllm_plugin.commands.common import (
    AUTO,
    SELF,
    AsJson,
    CalibrationText,
    Device,
    MethodSettings,
    Model,
    Problems,
    Seed,
    TensorParallelSize,
    check_text,
    err,
    gib,
    out,
    settings_of,
)
from vllm_plugin.progress import bar


def quantize(
    model: Model,
    target: Annotated[Path, typer.Option("--out", help="new folder for the int4 checkpoint")],
    method: Annotated[str, typer.Option(help="see `vllm-compress methods`")] = "smoothquant_plus",
    settings: MethodSettings = None,
    bits: Annotated[
        int | None,
        typer.Option(min=2, max=8, help="bits of a weight (default: the method's, 4)"),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(help="file with the bits of each unit; units it does not name get --bits"),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="input channels per scale: 128, 64 or 32; smaller: better, larger files "
            "(default: the method's, 128)"
        ),
    ] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric", help="no zero points")] = None,
    format_name: Annotated[
        str, typer.Option("--format", help="checkpoint format: compressed-tensors, awq")
    ] = "compressed-tensors",
    calibration: CalibrationText = SELF,
    samples: Annotated[int, typer.Option(help="calibration sequences")] = 64,
    length: Annotated[int, typer.Option(help="tokens per calibration sequence")] = 128,
    seed: Seed = 0,
    tensor_parallel_size: TensorParallelSize = 1,
    device: Device = AUTO,
    as_json: AsJson = False,
) -> None:
    """Write a quantized checkpoint.

    vLLM serves 4 and 8 bits also without this plugin, on a CPU only with AVX-512. After an
    interruption, the same command continues where it stopped.

    Example: vllm-compress quantize meta-llama/Llama-3.1-8B-Instruct --out llama-int4
    """
    problems = Problems()
    problems.collect(lambda: check_model(model))
    problems.collect(lambda: check_text(calibration))
    problems.collect(lambda: Partial(target))  # before minutes of work
    own = problems.collect(lambda: settings_of(settings)) or {}
    problems.raise_found()
    from compress_common.calibration.text import CalibrationSettings
    from compress_common.checkpoints.checkpoint import Checkpoint, resolve
    from quant_methods.formats.writing import estimate, quantize_checkpoint
    from quant_methods.plan_request import PlanRequest

    given = {
        "bits": bits,
        "allocation": allocation,
        "group_size": group_size,
        "symmetric": symmetric,
    }
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    options["tensor_parallel"] = tensor_parallel_size
    options |= own
    request = PlanRequest(
        method=method,
        settings=options,
        calibration=CalibrationSettings(
            source=calibration, samples=samples, length=length, seed=seed
        ),
    )
    request.build()
    source = resolve(model)
    checkpoint = Checkpoint(source)
    device = request.chosen_device(checkpoint, device)
    need = estimate(checkpoint, request, device)
    grids = request.build().settings.grids(checkpoint.hf_config).values()
    if rare := sorted({f"{grid.bits}" for grid in grids if not grid.on_cpu}):
        err.print(
            f"No CPU serves these weights ({', '.join(rare)} bits), and of vLLM's kernels for CUDA "
            "only some do: `vllm-compress doctor` tells before a server starts",
            style="yellow",
            highlight=False,
        )
    err.print(
        f"computes on {device}, needs about {gib(need.memory)} of memory ({gib(need.program)} for "
        f"Python, torch and transformers) and {gib(need.disk)} of disk"
    )
    with bar() as progress:
        report = quantize_checkpoint(
            source, target, request, format_name=format_name, device=device, progress=progress
        )
    if as_json:
        print(json.dumps(report))
        return
    before, after = report["weight_bytes_before"], report["weight_bytes_after"]
    table = Table("what", "value", title=str(target))
    table.add_row("method", f"{report['method']} ({report['format']})")
    if "alpha" in report:
        table.add_row("alpha", f"{report['alpha']:.2f}")
    table.add_row("bits per weight", f"{report['bits_per_weight']:.2f} with scales and zero points")
    if (bits_each := report.get("embedding_bits_per_weight")) is not None:
        table.add_row("embeddings, lm_head", f"{bits_each:.2f} bits per weight with scales")
    table.add_row("weights on disk", f"{gib(before)} -> {gib(after)} ({after / before:.3f})")
    if routing := report.get("routing"):
        same = f"{routing['unchanged']:.1%} of {routing['tokens']} tokens, mean over layers"
        table.add_row("same experts as before", same)
    if left := report["left_at_16_bit"]:
        table.add_row("left at 16 bits", ", ".join(left))
    out.print(table)
    if curve := report.get("loss_curve"):
        table = Table("alpha", "KL, nats per token", title="search")
        for alpha, loss in curve.items():
            chosen = " <" if float(alpha) == report["alpha"] else ""
            table.add_row(alpha, f"{loss:.4f}{chosen}")
        out.print(table)
    if report["needs_plugin"]:
        out.print(
            "stock vLLM does not serve it: 2- and 3-bit codes and quantized embeddings need this "
            "plugin"
        )
    out.print(f"serve it: vllm serve {target}")
