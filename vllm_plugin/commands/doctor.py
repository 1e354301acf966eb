# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress doctor``: checks an installation, and whether a model can be served."""

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from vllm_plugin.commands.common import (
    AdditionalConfig,
    AsJson,
    BasesFile,
    Budget,
    Keep,
    Policy,
    ProfileFile,
    Quantization,
    config_of,
    out,
)

if TYPE_CHECKING:
    from vllm_plugin.commands.checks import Check

_COLORS = {"ok": "green", "slow": "yellow", "problem": "red"}


def doctor(
    model: Annotated[str | None, typer.Argument(help="a model folder or hub id")] = None,
    quantization: Quantization = None,
    policy: Policy = None,
    keep: Keep = None,
    budget: Budget = None,
    profile: ProfileFile = None,
    bases: BasesFile = None,
    additional_config: AdditionalConfig = "{}",
    block_size: Annotated[int | None, typer.Option(help="as for `vllm serve`")] = None,
    dtype: Annotated[str, typer.Option(help="as for `vllm serve`")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="as for `vllm serve`")] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="as for `vllm serve`")] = 1,
    as_json: AsJson = False,
) -> None:
    """Check the installation and, with a model, what an engine would refuse or choose.

    Loads no weights. Exits with 1 if there is a problem. What works but is slow is no problem.

    Example: vllm-compress doctor MODEL --quantization smoothquant_plus --policy snap_kv --keep 0.25
    """
    # Set before vLLM is imported, as its log is not part of the answer.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from vllm.engine.arg_utils import EngineArgs

    from vllm_plugin.command_line import name_problems
    from vllm_plugin.commands.checks import Check, installation, model_checks

    config = config_of(additional_config, policy, keep, budget, profile, bases)
    checks = installation()
    if model is not None and (problems := name_problems(model)):
        checks += [Check("model", False, problem) for problem in problems]
    elif model is not None:
        checks += model_checks(
            EngineArgs(
                model=model,
                quantization=quantization,
                additional_config=config,
                block_size=block_size,
                dtype=dtype,  # type: ignore[arg-type]
                max_model_len=max_model_len,
                tensor_parallel_size=tensor_parallel_size,
            )
        )
    well = all(check.ok for check in checks)
    if as_json:
        print(json.dumps({"ok": well, "checks": [asdict(check) for check in checks]}))
    else:
        show(checks)
    if not well:
        raise typer.Exit(1)


def show(checks: list["Check"]) -> None:
    """Print a table, and below it, whole and ready to be copied, what is not ok."""
    table = Table("check", "", "found")
    for check in checks:
        state = Text(check.status, _COLORS[check.status])
        table.add_row(
            Text(check.name), state, Text(check.found if check.status == "ok" else "see below")
        )
    out.print(table)
    for status in ("slow", "problem"):
        for check in checks:
            if check.status == status:
                text = f"{status}: {check.name}: {check.found}"
                out.print(text, markup=False, highlight=False, soft_wrap=True)
