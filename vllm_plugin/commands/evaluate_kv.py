# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress eval-kv``: what settings of the KV cache lose."""

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table

from compress_common.checkpoints.folder import check_model
from vllm_plugin import KEY
from vllm_plugin.commands.common import (
    AsJson,
    BasesFile,
    Budget,
    Keep,
    Model,
    Policy,
    Problems,
    ProfileFile,
    check_text,
    config_of,
    json_object,
    kv_setting,
    out,
)
from vllm_plugin.progress import bar

if TYPE_CHECKING:
    from vllm_plugin.commands.kv_evaluation import KVEvaluation

_STEADY = 4  # prompts from which on a standard error tells something


def evaluate_kv_settings(
    model: Model,
    policy: Policy = None,
    keep: Keep = None,
    budget: Budget = None,
    profile: ProfileFile = None,
    bases: BasesFile = None,
    kv: Annotated[
        list[str] | None,
        typer.Option(
            help="another setting: POLICY,KEY=VALUE,... with keys of compress.kv; may be repeated"
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="a .txt or .jsonl file (default: Python's language reference)"),
    ] = None,
    context: Annotated[
        int, typer.Option(min=64, help="tokens of a prompt: as many as yours have is best")
    ] = 768,
    windows: Annotated[
        int, typer.Option(min=1, help="prompts from the text: more are steadier")
    ] = 16,
    keys: Annotated[int, typer.Option(min=1, help="keys to recall, in each of four wordings")] = 4,
    engine_args: Annotated[
        str, typer.Option(help="JSON object of engine arguments for all settings")
    ] = "{}",
    as_json: AsJson = False,
) -> None:
    """Judge settings of the KV cache by what the model still recalls, and how well it goes on.

    Each setting is served by an engine of its own, the full cache first. `nats` are of 64 tokens
    behind each prompt, generated one by one, above the full cache. Keys are numbers in filler text,
    said in four wordings. They are asked for at the end of the prompt, and, as `asked later`,
    within the answer, when the prompt has been compacted. Recall is a share of what the full cache
    recalls.

    After ± is the standard error. Nothing starts if an engine would refuse one of the settings.

    Example: vllm-compress eval-kv MODEL --kv snap_kv,keep=0.5 --kv snap_kv,keep=0.25 --kv
    cskv,bases=kv.safetensors --text traffic.jsonl
    """
    problems = Problems()
    problems.collect(lambda: check_model(model))
    problems.collect(lambda: check_text(text))
    arguments = problems.collect(lambda: json_object("--engine-args", engine_args))
    single = config_of("{}", policy, keep, budget, profile, bases)
    settings = [single[KEY]["kv"]] if single else []
    for given in kv or ():
        if section := problems.collect(partial(kv_setting, given)):
            settings.append(section)
    if not (single or kv):
        problems.found.append("no setting is given; add --policy and --keep, or --kv")
    problems.raise_found()
    # Set before vLLM is imported, as its log is not part of the answer.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from vllm_plugin.commands.judging.material import Sizes
    from vllm_plugin.commands.kv_evaluation import as_rows, evaluate_kv

    with bar() as progress:
        results = evaluate_kv(
            model,
            settings,
            text,
            Sizes(context, windows, keys),
            engine_args=arguments,
            progress=progress,
        )
    if as_json:
        asked = {"text": text and str(text), "context": context, "windows": windows, "keys": keys}
        print(json.dumps({"model": model, **asked, "settings": as_rows(results)}))
        return
    if windows < _STEADY:
        out.print(f"{windows} prompts: their standard error is a guess; raise --windows")
    for number, row in enumerate(results, start=1):
        out.print(f"#{number}  {row.setting}", markup=False, highlight=False, soft_wrap=True)
    out.print(comparison(results))
    full = results[0]
    known = f"the full cache recalls {full.keys} of {len(full.recall_by_wording) * keys} keys"
    out.print(f"{model}: {known}", markup=False, highlight=False, soft_wrap=True)


def comparison(results: list["KVEvaluation"]) -> Table:
    """Return a table of the figures that fits 80 columns. Settings are numbered from 1."""
    columns = ("kept", "nats vs #1", "keys recalled", "worst wording", "asked later")
    table = Table("", *columns, box=SIMPLE, pad_edge=False, collapse_padding=True)
    for number, row in enumerate(results, start=1):
        known = {name: share for name, share in row.recall_by_wording.items() if share is not None}
        worst = min(known, key=lambda name: known[name], default=None)
        table.add_row(
            f"#{number}",
            f"{row.kept:.2f}",
            f"{row.nats_difference:+.4f}{_error(row.standard_error, 4)}",
            _share(row.recall, row.recall_error),
            "-" if worst is None else f"{known[worst]:.2f} {worst}",
            _share(row.later, row.later_error),
        )
    return table


def _share(share: float | None, error: float | None) -> str:
    return "-" if share is None else f"{share:.2f}{_error(error, 2)}"


def _error(error: float | None, digits: int) -> str:
    return "" if error is None else f" ± {error:.{digits}f}"
