# SPDX-License-Identifier: Apache-2.0
"""Parses and checks a command line of ``vllm serve``, before a server is started."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from compress_common.errors import CompressError, joined, nearest
from vllm_plugin.command_line import NO_MODEL, name_problems
from vllm_plugin.commands.address import Address
from vllm_plugin.commands.checks import installation, model_checks
from vllm_plugin.commands.common import json_object

_UNKNOWN = "unrecognized arguments: "


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, which would print pages of usage and exit."""

    flags: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith(_UNKNOWN):
            flag = message.removeprefix(_UNKNOWN).split()[0].partition("=")[0]
            hint = nearest(flag, self.flags)
        raise CompressError(message + hint)


def parse(arguments: list[str], own: Sequence[str] = ()) -> argparse.Namespace:
    """Return what ``vllm serve`` makes of its arguments, which ``refuse_early`` has passed.

    Args:
        arguments: behind ``vllm serve``.
        own: flags of our command, one of which can be what an unknown flag means.

    Raises:
        CompressError: vLLM would refuse them.
    """
    parser = _Parser(prog="vllm")
    command = ServeSubcommand()
    serving = command.subparser_init(parser.add_subparsers(dest="subparser"))
    parser.flags = [*own, *serving._option_string_actions]
    try:
        parsed = parser.parse_args(["serve", *arguments])
        command.validate(parsed)
    except CompressError:
        raise
    except (AssertionError, IndexError, KeyError, OSError, TypeError, ValueError) as error:
        raise CompressError(f"vLLM cannot read the arguments: {error}") from error
    if isinstance(parsed.additional_config, str):  # vLLM takes what it cannot read for a name
        json_object("--additional-config", parsed.additional_config)
    if parsed.model_tag is None and parsed.model == AsyncEngineArgs.model:  # vLLM's default
        raise CompressError(NO_MODEL)
    parsed.model = parsed.model_tag or parsed.model
    if problems := name_problems(parsed.model):
        raise joined(problems)
    return parsed


def check(parsed: argparse.Namespace) -> None:
    """Refuse what an engine would refuse, without loading weights.

    Raises:
        CompressError: lists every problem found.
    """
    checks = installation()
    problems = [f"{each.name}: {each.found}" for each in checks if not each.ok]
    if not problems:
        found = model_checks(AsyncEngineArgs.from_cli_args(parsed))
        problems = [each.found for each in found if not each.ok]
    if not parsed.headless and (problem := Address.given(parsed).problem()):
        problems.append(problem)
    if problems:
        raise joined(problems)
