# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress recommend``: which setting to serve on a device, and what it loses."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from compress_common.checkpoints.folder import check_model
from vllm_plugin.commands.common import (
    AsJson,
    Model,
    Plot,
    Problems,
    check_text,
    check_writable,
    gib,
    out,
    whole_file,
)
from vllm_plugin.commands.plan import context_size, memory_size, size
from vllm_plugin.commands.profiling.profile_plot import canvas
from vllm_plugin.progress import bar

if TYPE_CHECKING:
    from vllm_plugin.commands.recommendation import Recommendation, Row, Wanted

_UTILIZATION = 0.92  # vLLM's default
# Defaults of vLLM's server where they are smallest: sequences on a CPU, and tokens per step.
_SEQUENCES, _BATCH = 128, 2048


def recommend(
    model: Model,
    gpu_memory: Annotated[
        str, typer.Option(help="memory of the device, with its unit: 80GiB, 24GB")
    ],
    context: Annotated[
        str, typer.Option(help="tokens of a request when it ends: 32k is 32,000, 32K is 32,768")
    ],
    concurrency: Annotated[int, typer.Option(min=1, help="requests at once")] = 1,
    prompt: Annotated[
        str | None, typer.Option(help="tokens of them that are prompt (default: seven eighths)")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="a .txt or .jsonl file (default: Python's language reference)"),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0.01, max=1, help="share of the memory that vLLM may use")
    ] = _UTILIZATION,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Choose how much to compress a model, by what each setting takes and what it loses.

    Compares 16-bit and int4 weights with a few settings of the KV cache. Bytes are counted as by
    `plan`, losses are measured in engines on this machine, once per model and text: after an
    interruption the same command goes on, and later calls look them up. What an engine would refuse
    is left out.

    The safest setting that fits is taken: if possible one that recalls what the full cache recalls,
    then the one with the least loss. A smaller one whose loss is within its standard error of that
    counts as equal. Losses of weights and of the cache are measured alone, and added.

    Example: vllm-compress recommend MODEL --gpu-memory 24GiB --context 32k --concurrency 16
    """
    text = text and text.expanduser()
    problems = Problems()
    problems.collect(lambda: check_model(model))
    problems.collect(lambda: check_text(text))
    memory = problems.collect(lambda: memory_size(gpu_memory, "--gpu-memory")) or 0
    tokens = problems.collect(lambda: context_size(context)) or 0
    given = None if prompt is None else problems.collect(lambda: size(prompt, "--prompt"))
    problems.collect(lambda: check_writable(plot))
    if given is not None and tokens and not 0 < given < tokens:
        problems.found.append(
            f"--prompt {given} leaves no room for an answer in --context {tokens}; lower it"
        )
    figure: Any = problems.collect(lambda: canvas(plot)) if plot else None
    problems.raise_found()
    # Set before vLLM is imported, as its log is not part of the answer.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from vllm_plugin.capacity.blocks import typical_prompt
    from vllm_plugin.commands.recommendation import Wanted
    from vllm_plugin.commands.recommendation import recommend as run

    start = typical_prompt(tokens) if given is None else given
    wanted = Wanted(memory, gpu_memory_utilization, tokens, start, concurrency)
    with bar() as progress:
        found = run(model, wanted, text, progress=progress)
    if plot:
        from vllm_plugin.commands.recommending.frontier_plot import draw

        draw(found, wanted, figure, Path(model).name)
        with whole_file(plot) as partial:
            figure.savefig(partial, format=plot.suffix[1:])
    if as_json:
        print(json.dumps(_content(model, found, wanted, plot)))
    else:
        _print(model, found, wanted, plot)


def _content(
    model: str, found: "Recommendation", wanted: "Wanted", plot: Path | None
) -> dict[str, Any]:
    names = [candidate.name for candidate in found.chain]

    def content(row: "Row") -> dict[str, Any]:
        return {
            "setting": row.setting.name,
            "command": _command(model, row, wanted),
            "preset": row.setting.preset,
            "needs_bytes": row.size.needs(wanted.concurrency),
            "requests": row.size.requests(wanted.memory),
            "nats": row.loss.nats,
            "standard_error": row.loss.error,
            "weights": {"nats": row.weights.nats, "standard_error": row.weights.error},
            "cache": asdict(row.cache),
            "forgets": row.cache.forgets,
            "on_frontier": row.setting.name in names,
        }

    at = found.chosen
    return {
        "model": model,
        **asdict(wanted),
        "settings": [content(row) for row in found.rows],
        "take": names[at],
        "safer": names[at + 1] if at + 1 < len(names) else None,
        "smaller": names[at - 1] if at else None,
        "left_out": found.left_out,
        "plot": str(plot) if plot else None,
    }


def _command(model: str, row: "Row", wanted: "Wanted") -> str:
    """Return the command that serves the requests that were counted."""
    from vllm_plugin.commands.recommending.memory import BATCH

    more = ["--max-model-len", str(wanted.context)]
    if wanted.utilization != _UTILIZATION:
        more += ["--gpu-memory-utilization", f"{wanted.utilization:g}"]
    if wanted.concurrency > _SEQUENCES:
        more += ["--max-num-seqs", str(wanted.concurrency)]
    if wanted.concurrency > _BATCH:  # vLLM refuses more sequences than tokens
        more += ["--max-num-batched-tokens", str(max(BATCH, wanted.concurrency))]
    return row.setting.command(model, *more)


def _print(model: str, found: "Recommendation", wanted: "Wanted", plot: Path | None) -> None:
    title = f"{model}: {wanted.load}, {wanted.prompt:,} of them prompt, in {gib(wanted.memory)}"
    _say(title)
    out.print(table(found, wanted))
    _say("at once: such requests on this device; recalled: share of the full cache's keys")
    for name, reason in found.left_out.items():
        _say(f"left out: {name}: {reason}")
    at, chain = found.chosen, found.chain
    _say(f"take {chain[at].name}:\n  {_command(model, found.row(chain[at]), wanted)}")
    if at + 1 < len(chain):
        safer = found.row(chain[at + 1])
        fits = safer.size.requests(wanted.memory)
        note = f"needs {gib(chain[at + 1].needs)}, serves {fits} at once here"
        _say(f"safer, {chain[at + 1].name} ({note}):\n  {_command(model, safer, wanted)}")
    if at:
        smaller = found.row(chain[at - 1])
        note = f"serves {smaller.size.requests(wanted.memory)} at once"
        _say(f"smaller, {chain[at - 1].name} ({note}):\n  {_command(model, smaller, wanted)}")
    known = "" if found.measured else " before"
    _say(f"losses were measured on this machine{known}, and are kept in {found.folder}")
    if plot:
        _say(f"written: {plot}")


def table(found: "Recommendation", wanted: "Wanted") -> Table:
    """Return the settings in a table that fits 80 columns, the safest first."""
    columns = ("needs", "at once", "nats lost", "recalled")
    rows = sorted(found.rows, key=lambda row: row.candidate(wanted.concurrency).risk)
    chain = {candidate.name for candidate in found.chain}
    shown = Table("setting", *columns, box=SIMPLE, pad_edge=False, collapse_padding=True)
    for row in rows:
        name, loss = row.setting.name, row.loss
        mark = " <- take" if name == found.chain[found.chosen].name else ""
        shown.add_row(
            name + (mark or ("" if name in chain else " (beaten)")),
            gib(row.size.needs(wanted.concurrency)),
            str(row.size.requests(wanted.memory)),
            f"{loss.nats:.3f}" + (f" ± {loss.error:.3f}" if loss.error else ""),
            "-" if loss.recall is None else f"{loss.recall:.2f}{_error(loss.recall_error)}",
        )
    return shown


def _error(error: float | None) -> str:
    return f" ± {error:.2f}" if error else ""


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)
