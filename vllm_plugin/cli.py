# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress``: quantise, evaluate, list methods. Errors are one line unless ``--debug``."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import click
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from quant_methods.calibration import SELF, CalibrationSettings
from quant_methods.checkpoint import Checkpoint, resolve
from quant_methods.errors import CompressError, joined
from quant_methods.formats import FORMATS
from quant_methods.planning import PlanRequest
from quant_methods.registry import build_method, explain, methods
from quant_methods.writing import estimate, quantize_checkpoint
from vllm_plugin.evaluate import as_rows, evaluate
from vllm_plugin.progress import bar

app = typer.Typer(
    help="Make served models smaller: weight quantisation for vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out = Console()
err = Console(stderr=True)

_INTERRUPTED = 130  # what typer returns after Ctrl-C

Model = Annotated[str, typer.Argument(help="a model folder or hub id, 16-bit safetensors")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


@app.command()
def quantize(
    model: Model,
    target: Annotated[Path, typer.Option("--out", help="new folder for the int4 checkpoint")],
    method: Annotated[str, typer.Option(help="see `vllm-compress methods`")] = "smoothquant_plus",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="a setting of the method, KEY=VALUE; may be repeated"),
    ] = None,
    group_size: Annotated[
        int, typer.Option(help="input channels per scale, 128, 64 or 32: smaller is better, larger")
    ] = 128,
    symmetric: Annotated[bool, typer.Option(help="no zero points")] = False,
    format_name: Annotated[
        str, typer.Option("--format", help=f"checkpoint format: {', '.join(FORMATS)}")
    ] = "compressed-tensors",
    calibration: Annotated[str, typer.Option(help="'self', or a .txt or .jsonl file")] = SELF,
    samples: Annotated[int, typer.Option(help="calibration sequences")] = 32,
    length: Annotated[int, typer.Option(help="tokens per calibration sequence")] = 32,
    tensor_parallel_size: Annotated[
        int, typer.Option(help="ranks the checkpoint will be served on")
    ] = 1,
    device: Annotated[str, typer.Option(help="where blocks are computed: cpu, cuda")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Write an int4 checkpoint that vLLM serves, with or without this plugin.

    An interrupted run goes on when the same command is given again.

    Example: vllm-compress quantize meta-llama/Llama-3.1-8B-Instruct --out llama-int4
    """
    options: dict[str, Any] = {
        "group_size": group_size,
        "symmetric": symmetric,
        "tensor_parallel": tensor_parallel_size,
    }
    for pair in settings or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise CompressError(f"--set {pair!r} is not KEY=VALUE")
        options[key] = _literal(value)
    request = PlanRequest(
        method=method,
        settings=options,
        calibration=CalibrationSettings(source=calibration, samples=samples, length=length),
    )
    request.build()
    source = resolve(model)
    need = estimate(Checkpoint(source))
    err.print(f"needs about {_gib(need.memory)} of memory and {_gib(need.disk)} of disk")
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
    table.add_row("weights", f"{_gib(before)} -> {_gib(after)} ({after / before:.3f})")
    out.print(table)
    if curve := report.get("loss_curve"):
        table = Table("alpha", "KL, nats per token", title="search")
        for alpha, loss in curve.items():
            chosen = " <" if float(alpha) == report["alpha"] else ""
            table.add_row(alpha, f"{loss:.4f}{chosen}")
        out.print(table)
    out.print(f"serve it: vllm serve {target}")


def _literal(text: str) -> Any:
    """true, 0.5 and 64 as JSON reads them; anything else is a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@app.command("eval")
def evaluate_models(
    models: Annotated[
        list[str],
        typer.Argument(
            help="model folders or hub ids; MODEL@METHOD quantises while loading. The first is "
            "what the others are compared with"
        ),
    ],
    text: Annotated[Path, typer.Option(help="text file, held out from calibration")],
    windows: Annotated[int, typer.Option(min=1, help="windows of text: more are steadier")] = 32,
    length: Annotated[int, typer.Option(min=16, help="tokens per window")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="requests at once when decoding is timed")] = 8,
    engine_args: Annotated[
        str, typer.Option(help="JSON object of engine arguments for all models")
    ] = "{}",
    as_json: AsJson = False,
) -> None:
    """Compare models through vLLM itself: perplexity, bytes, tokens per second.

    Speeds are single readings on this machine; benchmarks/ has ratios of interleaved runs.

    Example: vllm-compress eval BASE BASE@smoothquant_plus INT4_FOLDER --text book.txt
    """
    try:
        extra = json.loads(engine_args)
    except json.JSONDecodeError as error:
        raise CompressError(f"--engine-args is not JSON: {error}") from error
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
    columns = ("perplexity", "nats vs first", "on disk", "resident", "prefill/s", "decode/s")
    table = Table("model", *columns)
    for row in results:
        table.add_row(
            row.model,
            f"{row.perplexity:.3f}",
            f"{row.nats_difference:+.4f} ± {row.standard_error:.4f}",
            _gib(row.disk_bytes),
            _gib(row.resident_bytes),
            f"{row.prefill_tokens_per_s:.0f}",
            f"{row.decode_tokens_per_s:.1f}",
        )
    out.print(table)


@app.command("methods")
def list_methods(as_json: AsJson = False) -> None:
    """List the quantisation methods that are registered, with their settings."""
    rows: dict[str, dict[str, Any]] = {
        name: {
            "at_load": kind.capabilities.at_load,
            "calibrates": kind.capabilities.calibrates,
            "formats": list(kind.capabilities.formats),
            "paper": kind.capabilities.paper,
            "settings": {
                key: field.description for key, field in kind.settings_type.model_fields.items()
            },
        }
        for name, kind in sorted(methods().items())
    }
    if as_json:
        print(json.dumps(rows))
        return
    for name, row in rows.items():
        serve = f"vllm serve MODEL --quantization {name}" if row["at_load"] else "offline only"
        out.print(f"[bold]{name}[/bold]  {row['paper']}")
        out.print(
            f"  {serve}; formats: {', '.join(row['formats'])}; "
            f"calibration: {'yes' if row['calibrates'] else 'none'}"
        )
        defaults = build_method(name, {}).settings
        for key, text in row["settings"].items():
            out.print(f"  --set {key}={json.dumps(getattr(defaults, key))}  [dim]{text}[/dim]")


@app.command("demo-model")
def demo_model() -> None:
    """Print the folder of the embedded demo model, converting it on first use."""
    from vllm_plugin.demo_model import demo_model_path

    print(demo_model_path())


def main() -> None:
    """Console entry point."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
    except ValidationError as error:
        _fail(joined(explain(error, "option", [])), debug)
    except (CompressError, RuntimeError) as error:
        _fail(error, debug)
    except click.ClickException as error:  # wrong usage of the command line
        error.show()
        sys.exit(error.exit_code)
    if code == _INTERRUPTED:
        err.print(
            "interrupted: nothing half-written is left; the same command goes on", style="red"
        )
    sys.exit(code)


def _fail(error: Exception, debug: bool) -> NoReturn:
    if debug:
        raise error
    err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
