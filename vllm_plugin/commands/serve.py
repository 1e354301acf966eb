# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress serve``: checks, makes what is missing, and starts ``vllm serve``."""

import json
import os
import shlex
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_plugin import KEY
from vllm_plugin.commands.common import out
from vllm_plugin.presets import PRESETS, Preset, flags, text

if TYPE_CHECKING:
    import argparse

# Unknown flags are vLLM's.
PASSES_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(
    context: typer.Context,
    preset: Annotated[
        Preset | None, typer.Option(help="how much to compress; none: what the flags say")
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="print the preset, a file for `vllm serve --config`")
    ] = False,
) -> None:
    """Check, make what is missing, and start `vllm serve`, whose arguments all pass through.

    Everything that an engine would refuse is refused before it starts. Bases of `cskv` are fitted
    once and kept in the cache. When the server answers, its URL and a request to try are printed.
    Flags win over the preset. A file of --config must not have what the preset has.

    Example: vllm-compress serve MODEL --preset balanced --port 8000 --max-model-len 8192
    """
    if show:
        chosen = [name for name in PRESETS if name == preset or name in context.args] or PRESETS
        print("\n".join(f"# {name}.yaml\n{text(name)}" for name in chosen), end="")
        return
    given, chosen_flags = context.args, flags(preset) if preset else []
    # vLLM wants the model first. Flags that come later win.
    model = [] if not given or given[0].startswith("-") else given[:1]
    arguments = [*model, *chosen_flags, *given[len(model) :]]
    env = dict(os.environ)
    from vllm_plugin.commands.early import refuse_early, refuse_settings

    refuse_early(given, arguments, preset)
    refuse_settings(arguments)
    # Set before vLLM is imported, as its log is not part of the answer.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from vllm_plugin.command_line import with_additional_config, without_secrets
    from vllm_plugin.commands.address import Address
    from vllm_plugin.commands.launch import check, parse
    from vllm_plugin.commands.missing import (
        lacks_bases,
        stored_bases,
        whole,
        with_bases,
        with_config,
    )
    from vllm_plugin.commands.server_process import command, environment, run

    own = [flag for option in context.command.params for flag in option.opts]
    parsed = parse(arguments, own)
    if lacks_bases(parsed.additional_config):
        bases = stored_bases(parsed)
        if bases is None:  # before minutes of work
            check(with_config(parsed, whole(parsed.additional_config)))
        parsed = with_bases(parsed, bases)
        arguments = with_additional_config(arguments, parsed.additional_config)
    check(parsed)
    _say(f"starting: {shlex.join(['vllm', 'serve', *without_secrets(arguments)])}")
    address = Address.given(parsed)

    def ready() -> None:
        _say(_summary(parsed, address.url, preset))

    raise typer.Exit(run(command(arguments), address, environment(env), ready))


def _summary(parsed: "argparse.Namespace", url: str, preset: Preset | None) -> str:
    name = (parsed.served_model_name or [parsed.model])[0]
    sampling = {"max_tokens": 16, "temperature": 0}
    body = json.dumps({"model": name, "prompt": "The capital of Japan is", **sampling})
    secret = parsed.api_key or os.environ.get("VLLM_API_KEY")
    key = '-H "Authorization: Bearer $VLLM_API_KEY" ' if secret else ""
    header = f"{key}-H 'Content-Type: application/json'"
    request = f"curl -s {url}/v1/completions {header} -d {quote(body)}"
    lines = [f"{name} is served at {url}/v1"]
    if parsed.runner != "pooling":
        lines.append(f"  try it:   {request}")
    if parsed.quantization or (parsed.additional_config or {}).get(KEY):
        lines.append(f"  figures:  vllm-compress status {url}, or {url}/metrics")
    else:
        lines.append(f"  nothing is compressed; --preset does it; vLLM's metrics: {url}/metrics")
    if preset:
        lines.append(f"  undo:     the same command without --preset {preset}")
    return "\n".join(lines)


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)
