# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress prune``: write a checkpoint with fewer decoder blocks."""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from compress_common.errors import CompressError
from vllm_plugin.commands.common import (
    AUTO,
    SELF,
    AsJson,
    CalibrationText,
    Device,
    Model,
    Plot,
    Seed,
    check_text,
    check_writable,
    err,
    gib,
    out,
    settings_of,
    whole_file,
)
from vllm_plugin.progress import bar

_HEALER = "refit"
_STEADY = 1000  # held-out tokens from which on a loss tells something
_HEAL = "heal."  # what settings of the healer begin with
_ANSWERS = (
    "exact answers (arithmetic, facts, recall) suffer more than nats say, and healing does not "
    "bring them back: test what you need before you serve it"
)
_TRAFFIC = (
    "calibrated on text that the model sampled: your own requests (--calibration traffic.jsonl) "
    "matter more than the search"
)


def prune(
    model: Model,
    target: Annotated[Path, typer.Option("--out", help="new folder for the checkpoint")],
    drop: Annotated[
        int | None, typer.Option(min=0, help="how many decoder blocks go; the search says which")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="which blocks go, such as 12-15 or 3,8-10")
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            help="as many go as this bound allows: KL in nats on held-out calibration text"
        ),
    ] = None,
    search: Annotated[
        str,
        typer.Option(
            help="auto, single_drop, block_influence, macro_influence, window, greedy, evopress"
        ),
    ] = AUTO,
    heal: Annotated[
        str, typer.Option(help="what makes up for them: refit, linear, fusegpt, none")
    ] = _HEALER,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="a setting of the search, KEY=VALUE, or of the healer, heal.KEY=VALUE"
        ),
    ] = None,
    keep_first: Annotated[
        int | None,
        typer.Option(min=1, help="embedding models trained for it: only so many blocks stay"),
    ] = None,
    dimensions: Annotated[
        int | None,
        typer.Option(min=1, help="with --keep-first: the `dimensions` that requests may ask for"),
    ] = None,
    calibration: CalibrationText = SELF,
    samples: Annotated[
        int, typer.Option(help="calibration sequences; of eight, one chooses and one judges")
    ] = 96,
    length: Annotated[int, typer.Option(help="tokens per calibration sequence")] = 128,
    seed: Seed = 0,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="also more than a quarter of the blocks, or one that costs over a nat"
        ),
    ] = False,
    plot: Plot = None,
    device: Device = AUTO,
    as_json: AsJson = False,
) -> None:
    """Drop decoder blocks, heal the rest, and write a standard checkpoint.

    It saves latency and KV cache in proportion to the blocks. For memory alone, int4 loses less:
    see docs/depth.md. After an interruption, the same command continues where it stopped.

    Example: vllm-compress prune MODEL --drop 4 --calibration traffic.jsonl --out DIR
    """
    if keep_first is not None:
        others = {
            "--drop": drop is not None,
            "--layers": layers is not None,
            "--max-loss": max_loss is not None,
            "--search": search != AUTO,
            "--heal": heal != _HEALER,
            "--set": bool(settings),
            "--calibration": calibration != SELF,
            "--force": force,
            "--plot": plot is not None,
        }
        if wrong := [option for option, given in others.items() if given]:
            told = f"{', '.join(wrong)} cannot be used with --keep-first"
            raise CompressError(f"{told}, which searches, heals and measures nothing; remove them")
        _cut(model, target, keep_first, dimensions, as_json)
        return
    if layers is not None and search != AUTO:
        raise CompressError(f"--layers leaves nothing for --search {search} to find; remove one")
    if dimensions is not None:
        raise CompressError("--dimensions needs --keep-first; an embedding model is cut by both")
    from compress_common.calibration.placement import chosen_device
    from compress_common.calibration.text import CalibrationSettings
    from compress_common.checkpoints.checkpoint import Checkpoint, resolve
    from compress_common.checkpoints.partial import Partial
    from depth_pruning.cutting import block_numbers
    from depth_pruning.pruning import prune_checkpoint, sizes
    from depth_pruning.request import PruneRequest

    given = settings_of(settings)
    request = PruneRequest(
        drop=drop,
        layers=None if layers is None else block_numbers(layers),
        max_loss=max_loss,
        search=search,
        search_settings={k: v for k, v in given.items() if not k.startswith(_HEAL)},
        heal=heal,
        heal_settings={k.removeprefix(_HEAL): v for k, v in given.items() if k.startswith(_HEAL)},
        calibration=CalibrationSettings(
            source=calibration, samples=samples, length=length, seed=seed
        ),
        force=force,
    )
    request.build_search()  # as the rest down to `resolve`: before a download
    request.build_healer()
    check_text(calibration)
    check_writable(plot)
    Partial(target)  # it refuses a folder that exists
    figure: Any = None
    if plot and not request.nothing:
        from vllm_plugin.commands.profiling.profile_plot import canvas

        figure = canvas(plot)
    source = resolve(model)
    checkpoint = Checkpoint(source)
    request.check(checkpoint)
    device = chosen_device(device, lambda: sizes(checkpoint, request))
    err.print(f"computes on {device}")
    with bar() as progress:
        report = prune_checkpoint(source, target, request, device=device, progress=progress)
    if figure and plot:
        from vllm_plugin.commands.prune_plot import draw

        draw(report, figure, Path(model).name)
        with whole_file(plot) as partial:
            figure.savefig(partial)
    if as_json:
        print(json.dumps(report))
        return
    _print_table(report, target)
    if figure:
        out.print(f"written: {plot}", highlight=False, soft_wrap=True)
    for line in _notes(report, sampled=calibration == SELF):
        out.print(line, highlight=False, soft_wrap=True)
    _print_next(target)


def _notes(report: dict[str, Any], sampled: bool) -> list[str]:
    """Return what a user should know of a result."""
    if not report["dropped"]:
        return ["no block went: there is nothing to measure or to draw"]
    judged = report["held_out_tokens"]
    few = f"{judged} tokens judge it: differences of some hundredths are chance; raise --samples"
    notes = [few] if judged < _STEADY else []
    return [*notes, _ANSWERS, *([_TRAFFIC] if sampled else [])]


def _cut(model: str, target: Path, keep_first: int, dimensions: int | None, as_json: bool) -> None:
    """Cut an embedding model."""
    from compress_common.checkpoints.checkpoint import resolve
    from depth_pruning.embedding import CutRequest, cut_embedding_model

    request = CutRequest(keep_first=keep_first, dimensions=dimensions)
    with bar() as progress:
        report = cut_embedding_model(resolve(model), target, request, progress=progress)
    if as_json:
        print(json.dumps(report))
        return
    _print_table(report, target)
    out.print("only a model that was trained for it (2D Matryoshka) embeds well after this cut")
    if dimensions is not None:
        out.print(f'ask for "dimensions": {dimensions} in each request to /v1/embeddings')
    command = shlex.join(["vllm", "serve", str(target), "--runner", "pooling"])
    out.print(f"serve it: {command}", highlight=False, soft_wrap=True)


def _print_table(report: dict[str, Any], target: Path) -> None:
    """Print what went and what that costs."""
    table = Table("what", "value", title=str(target))
    table.add_row("blocks", f"{report['layers_before']} -> {report['layers_after']}")
    before, after = report["weight_bytes_before"], report["weight_bytes_after"]
    table.add_row("weights on disk", f"{gib(before)} -> {gib(after)} ({after / before:.3f})")
    if dropped := report.get("dropped"):
        table.add_row("dropped", ", ".join(map(str, dropped)))
    if loss := report.get("loss"):
        bare = report["loss_without_healing"]
        table.add_row("KL on held-out text", f"{loss['kl']:.3f} nats ({bare['kl']:.3f} unhealed)")
        risen = f"{loss['nats']:.3f} ± {loss['nats_error']:.3f} nats"
        table.add_row("rise of the text's loss", f"{risen} ({bare['nats']:.3f} unhealed)")
        table.add_row("held-out text", f"{report['held_out_tokens']:,} tokens")
    out.print(table)


def _print_next(target: Path) -> None:
    """Print how the checkpoint is served, and made smaller still."""
    name = f"{target}-int4"
    for what, words in {
        "serve it": ["vllm", "serve", str(target)],
        "quantize it": ["vllm-compress", "quantize", str(target), "--out", name],
    }.items():
        out.print(f"{what}: {shlex.join(words)}", markup=False, highlight=False, soft_wrap=True)
