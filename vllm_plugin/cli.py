# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress``: its commands in one app. Errors are one line unless ``--debug``."""

import sys
from typing import NoReturn

import click
import typer
from pydantic import ValidationError

from compress_common.errors import CompressError, explain, joined
from vllm_plugin.commands.calibrate_kv import calibrate_kv
from vllm_plugin.commands.common import err
from vllm_plugin.commands.demo_model import demo_model
from vllm_plugin.commands.doctor import doctor
from vllm_plugin.commands.evaluate import evaluate_models
from vllm_plugin.commands.methods import list_methods
from vllm_plugin.commands.plan import plan
from vllm_plugin.commands.profile import profile
from vllm_plugin.commands.quantize import quantize
from vllm_plugin.commands.ray_serve import ray_serve

app = typer.Typer(
    help="Make served models smaller: weight quantisation and KV-cache compression for vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(quantize)
app.command()(profile)
app.command("calibrate-kv")(calibrate_kv)
app.command()(plan)
app.command()(doctor)
app.command()(ray_serve)
app.command("eval")(evaluate_models)
app.command("methods")(list_methods)
app.command("demo-model")(demo_model)

_INTERRUPTED = 130  # what typer returns after Ctrl-C


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
            "interrupted: nothing half-written is left; give the same command again", style="red"
        )
    sys.exit(code)


def _fail(error: Exception, debug: bool) -> NoReturn:
    if debug:
        raise error
    err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
