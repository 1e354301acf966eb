# SPDX-License-Identifier: Apache-2.0
"""Refuses what an engine would refuse, before any is started."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from compress_common.errors import CompressError, joined
from vllm_plugin.commands.checks import installation, model_checks
from vllm_plugin.self_check import layouts
from vllm_plugin.settings import KEY, parse_settings

KV = dict[str, Any]  # a section ``compress.kv``


def kept_shares(
    model: str, settings: Sequence[tuple[str, KV]], engine_args: dict[str, Any], context: int
) -> list[float]:
    """Return the share of the KV cache that each setting keeps of a prompt, whole blocks counted.

    Args:
        model: a folder.
        settings: each with its name.
        engine_args: of all engines.
        context: tokens of the prompt.

    Raises:
        CompressError: lists every problem that ``doctor`` has with the model or with a setting,
            and every setting that would leave such a prompt whole.
    """
    check_installation()
    problems = refused(model, {}, engine_args)
    shares: list[float] = []
    for name, kv in [] if problems else settings:
        section = {KEY: {"kv": kv}}
        if found := refused(model, section, engine_args):
            problems += [f"{name}: {problem}" for problem in found]
            continue
        config = _arguments(model, section, engine_args).create_engine_config()
        chosen = layouts(config, parse_settings(config.additional_config)) or {}
        blocks = -(-context // config.cache_config.block_size)
        kept = [Fraction(blocks - int(layout.gap(context)), blocks) for layout in chosen.values()]
        shares.append(float(sum(kept, Fraction(0)) / len(kept)))
        if shares[-1] == 1:
            problems.append(
                f"{name} keeps all of a prompt of {context:,} tokens, so there is nothing to "
                "judge; raise --context, or keep less"
            )
    if problems:
        raise joined(problems)
    return shares


def check_installation() -> None:
    """Raise CompressError where ``doctor`` has a problem with the installation."""
    if problems := [f"{each.name}: {each.found}" for each in installation() if not each.ok]:
        raise joined(problems)


def refused(
    model: str, additional_config: dict[str, Any], engine_args: dict[str, Any]
) -> list[str]:
    """Return what ``doctor`` has against an engine with these arguments. No weights are loaded."""
    try:
        checks = model_checks(_arguments(model, additional_config, engine_args))
    except CompressError as error:
        return error.problems
    return [check.found for check in checks if not check.ok]


def _arguments(
    model: str, additional_config: dict[str, Any], engine_args: dict[str, Any]
) -> EngineArgs:
    try:
        return EngineArgs(model=model, additional_config=additional_config, **engine_args)
    except TypeError as error:
        raise CompressError(f"--engine-args: {error}") from error
