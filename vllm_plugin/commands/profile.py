# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress profile``: measure how much of the KV cache each layer needs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.table import Table

from compress_common.checkpoints.folder import check_model
from kv_policies.budget.share import exact
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
    out,
    print_written,
    serve_command,
    whole_file,
)
from vllm_plugin.commands.profiling.profile_plot import canvas, draw
from vllm_plugin.progress import bar

if TYPE_CHECKING:
    import torch

    from compress_common.calibration.text import CalibrationSettings
    from kv_policies.budget.profile import Profile
    from quant_methods.calibration.images import ImageSettings

LENGTH: Final = 512  # tokens of a text


def profile(
    model: Model,
    keep: Annotated[str, typer.Option(help="share of the KV cache that stays, above 0, up to 1")],
    text: CalibrationText = SELF,
    images: Annotated[
        str | None,
        typer.Option(
            help="for a model of images, in place of a text: 'made' (pictures that are drawn), or "
            "a .jsonl file of chats with image_url parts"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="texts or chats: more are steadier")] = 4,
    length: Annotated[
        int | None,
        typer.Option(
            help="tokens per text, 512 by default; about as many as your prompts have is best"
        ),
    ] = None,
    seed: Seed = 0,
    levels: Annotated[
        int | None,
        typer.Option(help="different shares to serve, 1 to 8 (default: what suits the model)"),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option("--out", help="the file (default: kv-profile-MODEL-KEEP.json)"),
    ] = None,
    plot: Plot = None,
    device: Device = AUTO,
    as_json: AsJson = False,
) -> None:
    """Measure which share of the KV cache each layer needs, for `prefix_kv` and other policies.

    Runs the model in transformers on a text, and gives a larger share to layers whose attention is
    more spread out. The time grows with samples x length. Most of it is sampling, which a text file
    saves, and a sampled text is kept for the next run.

    The default text is enough for a stable profile: on a 135M model at keep 0.25 its shares were,
    on average, within 0.02 of those of four other texts of 1,024 tokens (equal shares: 0.11). More
    samples make shares steadier. Longer texts fit long prompts better.

    A model of images and text that will be asked about images is best measured on some: give chats
    such as your users send, as JSON Lines of the OpenAI API's `messages`. An image is a data URI,
    or a path from the folder of the file on.

    Example: vllm-compress profile meta-llama/Llama-3.1-8B-Instruct --keep 0.25
    """
    problems = Problems()
    problems.collect(lambda: check_model(model))
    if images is None:
        problems.collect(lambda: check_text(text))
    elif text != SELF or length is not None:
        problems.found.append(
            "--images takes the place of a text: leave --text and --length out, or --images"
        )
    share = problems.collect(lambda: exact(keep))
    if target is None and share is not None:
        name = Path(model).expanduser().resolve().name
        target = Path(f"kv-profile-{name}-{float(share):g}.json")
    figure: Any = problems.collect(lambda: canvas(plot)) if plot else None
    problems.collect(lambda: check_writable(target, plot))  # before minutes of work
    problems.raise_found()
    assert share is not None and target is not None
    from vllm_plugin.commands.profiling.kv_profile import make_profile

    settings = _settings(text, images, samples, length, seed)
    with bar() as progress:
        made, attention = make_profile(
            model, share, settings, levels=levels, device=device, progress=progress
        )
    with whole_file(target) as partial:
        made.save(partial)
    if plot:
        draw(made, figure)
        with whole_file(plot) as partial:
            figure.savefig(partial)
    if as_json:
        _print_json(made, target, plot)
    else:
        _print_table(made, attention)
        pooling = {} if images is None else {"pool": 1}  # what a picture shows is in few tokens
        command = serve_command(model, policy="snap_kv", **pooling, profile=target)
        print_written(command, target, plot)


def _settings(
    text: str, images: str | None, samples: int, length: int | None, seed: int
) -> "CalibrationSettings | ImageSettings":
    """What the options ask to measure on."""
    from compress_common.calibration.text import CalibrationSettings
    from quant_methods.calibration.images import ImageSettings

    if images is None:
        tokens = LENGTH if length is None else length
        return CalibrationSettings(source=text, samples=samples, length=tokens, seed=seed)
    return ImageSettings(source=images, samples=samples, seed=seed)


def _print_json(made: "Profile", target: Path, plot: Path | None) -> None:
    cut = made.cut()
    content = {
        "out": str(target),
        "plot": str(plot) if plot else None,
        "profile": made.model_dump(mode="json", by_alias=True),
        "levels": {
            "fractions": [str(fraction) for fraction in cut.fractions],
            "level_of": cut.level_of,
            "moved": float(cut.moved),
            "padded_layers": cut.padded_layers,
        },
    }
    print(json.dumps(content))


def _print_table(made: "Profile", attention: list["torch.Tensor"]) -> None:
    from vllm_plugin.commands.profiling.kv_profile import kept_by_layer

    cut = made.cut()
    columns = ("layer", "own share", "level", "served share", "attention kept")
    table = Table(title=f"{made.model.name}, keep {float(made.keep):g}")
    for column in columns:
        table.add_column(column, justify="right")
    rows = zip(
        made.layers,
        made.fractions,
        cut.level_of,
        cut.per_layer,
        kept_by_layer(attention, cut.per_layer),
        strict=True,
    )
    for layer, own, level, served, kept in rows:
        table.add_row(
            str(layer), f"{float(own):.3f}", str(level), f"{float(served):.3f}", f"{kept:.3f}"
        )
    out.print(table)
    if others := made.model.num_hidden_layers - len(made.layers):
        out.print(f"{others} layers without full attention are left alone")
    total = made.provenance.attention_retained
    out.print(
        f"attention kept: {total['profile']:.4f} with own shares, {total['levels']:.4f} in "
        f"{len(cut.fractions)} levels, {total['uniform']:.4f} if uniform",
        highlight=False,
        soft_wrap=True,
    )
    padded = f"; {cut.padded_layers} layers of memory lost to uneven levels"
    out.print(
        f"levels move a layer's share by {float(cut.moved):.4f} on average"
        f"{padded if cut.padded_layers else ''}",
        highlight=False,
        soft_wrap=True,
    )
