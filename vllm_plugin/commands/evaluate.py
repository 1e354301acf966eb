# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress eval``: compare models through vLLM."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table

from compress_common.checkpoints.folder import check_model
from vllm_plugin.commands.common import AsJson, Problems, check_text, gib, json_object, out
from vllm_plugin.progress import bar

if TYPE_CHECKING:
    from vllm_plugin.commands.evaluation import Evaluation


def evaluate_models(
    models: Annotated[
        list[str],
        typer.Argument(
            help="model folders or hub ids; MODEL@METHOD quantizes while it loads. The others are "
            "compared with the first"
        ),
    ],
    text: Annotated[Path, typer.Option(help="a .txt or .jsonl file, held out from calibration")],
    windows: Annotated[int, typer.Option(min=1, help="windows of text: more are steadier")] = 32,
    length: Annotated[int, typer.Option(min=16, help="tokens per window")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="requests at once when decoding is timed")] = 8,
    engine_args: Annotated[
        str, typer.Option(help="JSON object of engine arguments for all models")
    ] = "{}",
    as_json: AsJson = False,
) -> None:
    """Compare models through vLLM itself: perplexity, bytes, tokens per second.

    After ± is the standard error of the difference over windows, as tokens of one window are not
    independent: it needs at least two windows, and more of them make it smaller.

    Speeds are single readings on this machine. Use benchmarks/ for ratios of alternating runs.

    Example: vllm-compress eval BASE BASE@smoothquant_plus INT4_FOLDER --text book.txt
    """
    problems = Problems()
    for model in models:
        problems.collect(partial(check_model, model.partition("@")[0]))
    problems.collect(lambda: check_text(text))
    extra = problems.collect(lambda: json_object("--engine-args", engine_args))
    problems.raise_found()
    from vllm_plugin.commands.evaluation import as_rows, evaluate

    with bar() as progress:
        results = evaluate(
            models,
            text,
            windows=windows,
            length=length,
            batch=batch,
            engine_args=extra,
            progress=progress,
        )
    if as_json:
        print(json.dumps(as_rows(results)))
        return
    for number, row in enumerate(results, start=1):
        out.print(f"#{number}  {row.model}", markup=False, highlight=False, soft_wrap=True)
    out.print(comparison(results))


def comparison(results: list["Evaluation"]) -> Table:
    """Return a table of the figures that fits 80 columns. Models are numbered from 1."""
    columns = ("perplexity", "nats vs #1", "on disk", "resident", "prefill/s", "decode/s")
    table = Table("", *columns, box=SIMPLE, pad_edge=False, collapse_padding=True)
    for number, row in enumerate(results, start=1):
        table.add_row(
            f"#{number}",
            f"{row.perplexity:.3f}",
            f"{row.nats_difference:+.4f}{_error(row.standard_error)}",
            gib(row.disk_bytes),
            gib(row.resident_bytes),
            f"{row.prefill_tokens_per_s:.0f}",
            f"{row.decode_tokens_per_s:.1f}",
        )
    return table


def _error(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"
