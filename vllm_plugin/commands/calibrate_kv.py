# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress calibrate-kv``: fit the bases of a KV policy that stores latents."""

import json
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Final, get_args

import typer
from rich.table import Table

from compress_common.checkpoints.folder import check_model
from compress_common.errors import CompressError, joined
from vllm_plugin.commands.common import (
    AUTO,
    SELF,
    AsJson,
    CalibrationText,
    Device,
    Model,
    Plot,
    Problems,
    Seed,
    check_text,
    check_writable,
    err,
    out,
    print_written,
    serve_command,
    whole_file,
)
from vllm_plugin.commands.profiling.profile_plot import canvas
from vllm_plugin.progress import bar

if TYPE_CHECKING:
    from kv_policies.latents.bases import Bases
    from kv_policies.latents.bases_header import Objective
    from kv_policies.latents.format import Bits
    from vllm_plugin.commands.profiling.kv_bases import HeldOut

_POLICIES: Final = ("cskv",)
RATIOS: Final = {4: "0.86", 16: "0.8"}  # by bits: at these cskv recalls what the full cache does
BITS: Final = 4
SAMPLES: Final = 24
LENGTH: Final = 512


def calibrate_kv(
    model: Model,
    ratio: Annotated[
        str | None,
        typer.Option(
            help="share of the cache's bytes that is saved: 0 or more, below 1 (default: 0.86 in 4 "
            "bits, 0.8 in 16)"
        ),
    ] = None,
    bits: Annotated[int, typer.Option(help="of a number of a latent: 4 or 16")] = BITS,
    method: Annotated[str, typer.Option(help="KV policy: cskv")] = "cskv",
    text: CalibrationText = SELF,
    samples: Annotated[
        int, typer.Option(help="texts: more are steadier; the last quarter is held out")
    ] = SAMPLES,
    length: Annotated[int, typer.Option(help="tokens per text")] = LENGTH,
    seed: Seed = 0,
    allocate: Annotated[
        bool,
        typer.Option(help="give layers, keys and values different ranks; else all get the same"),
    ] = True,
    objective: Annotated[
        str,
        typer.Option(
            help="what is kept: 'attention', what queries see; 'reconstruction', as in the paper"
        ),
    ] = "attention",
    tensor_parallel_size: Annotated[
        int,
        typer.Option(
            "--tensor-parallel-size",
            "--tensor-parallel",
            min=1,
            help="ranks that will serve the model; each gets bases of its own KV heads",
        ),
    ] = 1,
    target: Annotated[
        Path | None,
        typer.Option("--out", help="the file (default: kv-bases-MODEL-RATIO-BITSbit.safetensors)"),
    ] = None,
    plot: Plot = None,
    device: Device = AUTO,
    as_json: AsJson = False,
) -> None:
    """Fit low-rank bases of keys and values, for the policy `cskv`.

    Runs the model in transformers on a text, one block at a time, and computes the principal
    components of its keys (before RoPE) and values. Ranks are distributed over layers, keys and
    values by what they lose per byte in the given bits, rounding included.

    Example: vllm-compress calibrate-kv meta-llama/Llama-3.1-8B-Instruct --ratio 0.86
    """
    problems = Problems()
    problems.collect(lambda: check_model(model))
    problems.collect(lambda: check_text(text))
    problems.collect(lambda: check_writable(target, plot))  # before minutes of work
    figure: Any = problems.collect(lambda: canvas(plot)) if plot else None
    problems.raise_found()
    from compress_common.calibration.text import CalibrationSettings
    from vllm_plugin.commands.profiling.bases_plot import draw
    from vllm_plugin.commands.profiling.kv_bases import make_bases

    given = RATIOS.get(bits, "0") if ratio is None else ratio
    share, width, wanted = _checked(given, bits, method, objective)
    settings = CalibrationSettings(source=text, samples=samples, length=length, seed=seed)
    if target is None:
        name = Path(model).expanduser().resolve().name
        ranks = f"-tp{tensor_parallel_size}" if tensor_parallel_size > 1 else ""
        target = Path(f"kv-bases-{name}-{float(share):g}-{width}bit{ranks}.safetensors")
        check_writable(target)
    with bar() as progress:
        bases, report = make_bases(
            model,
            share,
            settings,
            bits=width,
            allocate=allocate,
            objective=wanted,
            tensor_parallel=tensor_parallel_size,
            device=device,
            progress=progress,
        )
    with whole_file(target) as partial:
        bases.save(partial)
    if plot:
        draw(bases, report, figure)
        with whole_file(plot) as partial:
            figure.savefig(partial, format=plot.suffix[1:])
    if doubt := bases.header.doubt:
        err.print(f"warning: {doubt}", highlight=False, soft_wrap=True)
    if as_json:
        content = {
            "out": str(target),
            "plot": str(plot) if plot else None,
            "bases": bases.header.model_dump(mode="json", by_alias=True),
            "held_out": [asdict(row) for row in report],
        }
        print(json.dumps(content))
    else:
        _print_table(bases, report)
        command = serve_command(model, tensor_parallel_size, policy=method, bases=target)
        print_written(command, target, plot)


def _checked(
    ratio: str, bits: int, method: str, objective: str
) -> tuple[Fraction, "Bits", "Objective"]:
    """Return the options that typer cannot check; CompressError lists every wrong one."""
    from kv_policies.latents.bases_header import Objective, exact_ratio
    from kv_policies.latents.format import Bits

    known: dict[str, Objective] = {name: name for name in get_args(Objective)}
    widths: dict[int, Bits] = {width: width for width in get_args(Bits)}
    problems, share = [], Fraction(0)
    try:
        share = exact_ratio(ratio)
    except CompressError as error:
        problems.append(str(error))
    if bits not in widths:
        allowed = ", ".join(map(str, widths))
        problems.append(f"--bits {bits} has no format; allowed: {allowed}")
    if method not in _POLICIES:
        problems.append(f"--method {method!r} has no bases to fit; allowed: {', '.join(_POLICIES)}")
    if objective not in known:
        problems.append(f"--objective {objective!r} is unknown; allowed: {', '.join(known)}")
    if problems:
        raise joined(problems)
    return share, widths[bits], known[objective]


def _print_table(bases: "Bases", report: list["HeldOut"]) -> None:
    from kv_policies.latents.bases_header import SIDES, token_room
    from vllm_plugin.commands.profiling.bases_plot import METHODS

    header = bases.header
    ratio = f"ratio {float(header.ratio):g}, {header.bits} bits"
    title = f"{header.model.name}, {ratio}: energy lost, held out"
    table = Table(title=title)
    for column in ("layer", *(f"{s} {c}" for s in SIDES for c in ("rank", *METHODS.values()))):
        table.add_column(column, justify="right")
    for row in report:
        cells = [str(row.layer)]
        for side, rank in zip(SIDES, bases.ranks(row.layer), strict=True):
            cells += [str(rank), *(f"{getattr(row, side)[m]:.3f}" for m in METHODS)]
        table.add_row(*cells)
    means = [f"{fmean(getattr(r, s)[m] for r in report):.3f}" for s in SIDES for m in METHODS]
    table.add_section()
    table.add_row("mean", "", *means[: len(METHODS)], "", *means[len(METHODS) :])
    out.print(table)
    if others := header.model.num_hidden_layers - len(header.layers):
        out.print(f"{others} layers without full attention are left alone")
    stored = sum(header.token_bytes(row) for row in header.layers)
    whole = token_room(Fraction(0), header.features) * len(report)
    ranks = f" on each of {header.tensor_parallel} ranks" if header.tensor_parallel > 1 else ""
    out.print(
        f"bytes per token{ranks}, with scales: {float(stored):g} of {float(whole):g} in 16 bits; "
        "the last tokens stay whole beside them",
        highlight=False,
        soft_wrap=True,
    )
