# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress search``: choose the bits of each unit for a budget."""

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from compress_common.checkpoints.folder import check_model
from compress_common.errors import CompressError
from vllm_plugin.commands.common import (
    AUTO,
    SELF,
    AsJson,
    CalibrationText,
    Device,
    MethodSettings,
    Model,
    Plot,
    Problems,
    Seed,
    TensorParallelSize,
    check_text,
    check_writable,
    err,
    mib,
    out,
    settings_of,
    whole_file,
)
from vllm_plugin.commands.profiling.profile_plot import canvas
from vllm_plugin.progress import bar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from compress_common.progress import Progress
    from quant_methods.allocators.allocation import Allocation
    from quant_methods.calibration.images import ImageSettings


def search(
    model: Model,
    budget: Annotated[
        float, typer.Option(help="stored bits per weight, scales and zero points included")
    ],
    target: Annotated[str, typer.Option(help="what will serve it: cpu, cuda, humming")],
    file: Annotated[Path, typer.Option("--out", help="the file of bits, such as bits.json")],
    method: Annotated[str, typer.Option(help="probe, evopress, baq, luq, hessian")] = "probe",
    settings: MethodSettings = None,
    levels: Annotated[
        str | None,
        typer.Option(help="bits that a unit may have, such as 4,8,16 (default: the target's)"),
    ] = None,
    group_size: Annotated[int, typer.Option(help="input channels per scale: 128, 64 or 32")] = 128,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="no zero points")] = False,
    text: CalibrationText = SELF,
    samples: Annotated[int, typer.Option(help="calibration sequences")] = 64,
    length: Annotated[int, typer.Option(help="tokens per sequence")] = 128,
    seed: Seed = 0,
    search_samples: Annotated[
        int, typer.Option(help="sequences that the search measures on, besides the calibration's")
    ] = 32,
    images: Annotated[
        str | None,
        typer.Option(
            help="for luq and a model of images: 'made' (pictures that are drawn), or a .jsonl "
            "file of chats with image_url parts"
        ),
    ] = None,
    image_samples: Annotated[
        int | None, typer.Option(help="chats with images (default: 8)")
    ] = None,
    tensor_parallel_size: TensorParallelSize = 1,
    plot: Plot = None,
    device: Device = AUTO,
    as_json: AsJson = False,
) -> None:
    """Choose the bits of each unit: which layers' qkv, o, gate_up and down get 3, 4 or 8.

    Rounds every unit at every level first, which takes as long as one quantization per level. After
    an interruption, the same command continues where it stopped. The rounded levels stay in the
    cache, so another budget or method starts from them.

    It pays between whole numbers of bits. At a whole number, equal bits are about as good.

    Example: vllm-compress search meta-llama/Llama-3.1-8B-Instruct --budget 5 --target cuda --out
    bits.json
    """
    problems = Problems()
    problems.collect(lambda: check_model(model))
    problems.collect(lambda: check_text(text))
    chosen = problems.collect(lambda: settings_of(settings))
    wanted = None if levels is None else problems.collect(lambda: _numbers(levels))
    problems.collect(lambda: check_writable(file, plot))  # before minutes of work
    figure: Any = problems.collect(lambda: canvas(plot)) if plot else None
    problems.raise_found()
    from compress_common.calibration.text import CalibrationSettings
    from compress_common.checkpoints.checkpoint import Checkpoint, resolve
    from quant_methods.search_request import SearchRequest
    from quant_methods.searching import database_folder
    from quant_methods.searching import search as run

    request = SearchRequest(
        budget=budget,
        method=method,
        settings=chosen or {},
        target=target,
        levels=wanted,
        group_size=group_size,  # type: ignore[arg-type]  # pydantic says which there are
        symmetric=symmetric,
        tensor_parallel=tensor_parallel_size,
        calibration=CalibrationSettings(source=text, samples=samples, length=length, seed=seed),
        search_samples=search_samples,
        images=_images(images, image_samples, seed),
    )
    allocator = request.allocator()
    request.chosen_levels()
    checkpoint = Checkpoint(resolve(model))
    device = request.chosen_device(checkpoint, device)
    outputs = None
    if request.images is not None:
        outputs = _outputs(model, request.images, allocator.settings.image_tokens(), device)
    err.print(f"computes on {device}")
    with bar() as progress:
        made = run(checkpoint, request, device=device, progress=progress, images=outputs)
    with whole_file(file) as partial:
        made.save(partial)
    if plot:
        from vllm_plugin.commands.search_plot import draw

        draw(made, figure, Path(model).name)
        with whole_file(plot) as partial:
            figure.savefig(partial)
    folder, taken = database_folder(), ""
    with suppress(OSError):  # files of another search may go while they are counted
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        taken = f" ({mib(size)} of all models)"
    err.print(
        f"the levels stay in {folder} for other budgets and methods{taken}; "
        "remove the folder to free the space",
        highlight=False,
        soft_wrap=True,
    )
    if as_json:
        files = {"out": str(file), "plot": str(plot) if plot else None}
        print(json.dumps(files | {"allocation": made.model_dump(mode="json", by_alias=True)}))
        return
    _print_tables(made, Path(model).name)
    for path in (file, plot):
        if path:
            out.print(f"written: {path}", highlight=False, soft_wrap=True)
    command = _quantize_command(model, file, made)
    out.print(f"quantize it: {command}", markup=False, highlight=False, soft_wrap=True)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise CompressError(f"--levels {text!r} is not a list of numbers, such as 4,8") from error


def _images(source: str | None, samples: int | None, seed: int) -> "ImageSettings | None":
    """Return the chats with images that the options ask for."""
    from quant_methods.calibration.images import ImageSettings

    if source is None:
        if samples is not None:
            raise CompressError("--image-samples counts chats with images; give --images too")
        return None
    return ImageSettings(source=source, samples=8 if samples is None else samples, seed=seed)


def _outputs(
    model: str, images: "ImageSettings", tokens: int, device: str
) -> "Callable[[Progress], Sequence[torch.Tensor]]":
    """Return what runs the chats, once they are found to be good."""
    from vllm_plugin.commands.profiling.hf_images import HFImageModel
    from vllm_plugin.commands.profiling.image_outputs import check_tokens, image_outputs

    subject = HFImageModel(model, images, 1)
    check_tokens(subject, tokens)
    return lambda progress: image_outputs(subject, tokens, device, progress)


def _print_tables(made: "Allocation", title: str) -> None:
    rows: dict[str, dict[str, int]] = {}
    for unit, bits in made.bits.items():
        layer, _, name = unit.rpartition(".")
        rows.setdefault(layer, {})[name] = bits
    names = list(next(iter(rows.values())))
    table = Table(title=f"{title}, bits of each unit")
    for column in ("layer", *names):
        table.add_column(column, justify="right")
    for layer, units in rows.items():
        table.add_row(layer.rpartition(".")[2], *(str(units[name]) for name in names))
    out.print(table)
    report = made.report
    table = Table("what", "bits per weight", "KL, nats per token", title="on the search's text")
    points = {f"all {bits}": point for bits, point in report["uniform"].items()}
    for name, point in (points | {report["method"]: report}).items():
        table.add_row(name, f"{point['bits_per_weight']:.3f}", f"{point['kl_nats']:.4f}")
    out.print(table)
    out.print("bits per weight include scales and zero points", highlight=False)


def _quantize_command(model: str, file: Path, made: "Allocation") -> str:
    """Return the command that quantizes with the grids that the search counted with."""
    grid = made.grid
    words = ["vllm-compress", "quantize", model, "--allocation", str(file)]
    words += ["--group-size", str(grid["group_size"])]
    words += ["--symmetric"] if grid["symmetric"] else []
    words += ["--set", "rounding=gptq"]
    if grid["eight_bit"] != "w8a8":
        words += ["--set", f"eight_bit={grid['eight_bit']}"]
    if grid["tensor_parallel"] > 1:
        words += ["--tensor-parallel-size", str(grid["tensor_parallel"])]
    calibration = made.report["calibration"]
    words += ["--calibration", calibration["source"]] if calibration["source"] != SELF else []
    words += ["--samples", str(calibration["samples"]), "--length", str(calibration["length"])]
    words += ["--seed", str(calibration["seed"])] if calibration["seed"] else []
    return shlex.join([*words, "--out", f"{Path(model).name}-mixed"])
