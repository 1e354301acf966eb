# SPDX-License-Identifier: Apache-2.0
"""Parses and checks a command line of ``vllm serve``, and runs it as a child process."""

import argparse
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

import yaml
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from compress_common.errors import CompressError, joined, nearest
from vllm_plugin.command_line import mixed_forms, name_problems
from vllm_plugin.commands.checks import installation, model_checks
from vllm_plugin.commands.common import json_object

_POLL = 0.5  # seconds between two looks at a server that starts
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


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return what ``vllm serve`` makes of its arguments.

    Raises:
        CompressError: vLLM would refuse them, or would leave some of them out in silence.
    """
    parser = _Parser(prog="vllm")
    command = ServeSubcommand()
    serving = command.subparser_init(parser.add_subparsers(dest="subparser"))
    parser.flags = list(serving._option_string_actions)
    if problems := mixed_forms(arguments):
        raise joined(problems)
    try:
        parsed = parser.parse_args(["serve", *arguments])
        command.validate(parsed)
    except CompressError:
        raise
    except (AssertionError, IndexError, KeyError, OSError, TypeError, ValueError) as error:
        raise CompressError(f"vLLM cannot read the arguments: {error}") from error
    except yaml.YAMLError as error:
        place = " ".join(str(error).split())
        raise CompressError(f"the file of --config is not YAML: {place}") from error
    if isinstance(parsed.additional_config, str):  # vLLM takes what it cannot read for a name
        json_object("--additional-config", parsed.additional_config)
    if parsed.model_tag is None and "--model" not in " ".join(arguments):
        raise CompressError("no model is given: name a folder or a hub id, or have it in --config")
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
    if problem := Address.given(parsed).problem():
        problems.append(problem)
    if problems:
        raise joined(problems)


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        host: to bind; None: every interface.
        port: of the HTTP server.
        secure: with TLS.
        path: of a Unix socket, in place of host and port.
    """

    host: str | None
    port: int
    secure: bool
    path: str | None

    @classmethod
    def given(cls, parsed: argparse.Namespace) -> "Address":
        """The address in parsed arguments."""
        return cls(parsed.host, parsed.port, bool(parsed.ssl_certfile), parsed.uds)

    @property
    def url(self) -> str:
        """Where a client on this machine finds the server."""
        anywhere = self.host in (None, "", "0.0.0.0", "::")
        host = "127.0.0.1" if anywhere else str(self.host)
        return f"http{'s' * self.secure}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def problem(self) -> str | None:
        """Why a server cannot listen here; None if it can."""
        if self.path:
            return None
        family = socket.AF_INET6 if ":" in (self.host or "") else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((self.host or "", self.port))
            except OSError as error:
                return (
                    f"--port {self.port}: {error.strerror}; stop what listens there or give another"
                )
        return None

    def answers(self) -> bool:
        """Whether the server is healthy."""
        context = ssl._create_unverified_context() if self.secure else None
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5, context=context) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the server's process: ours must see everything that it needs.

    torch looks for ninja on PATH. vLLM loads our check of streaming requests only where
    VLLM_PLUGINS names the plugin, and then loads no plugin that is not named.
    """
    names = {
        entry.name
        for group, entries in _plugins().items()
        if group != "vllm.endpoint_plugins"
        for entry in entries
    }
    plugins = env.get("VLLM_PLUGINS", ",".join(sorted(names)))
    path = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    return {**env, "PATH": path, "VLLM_PLUGINS": plugins}


def _plugins() -> dict[str, Any]:
    found = entry_points()
    return {group: found.select(group=group) for group in found.groups if group.startswith("vllm.")}


def run(
    arguments: list[str], address: Address, env: dict[str, str], ready: Callable[[], None]
) -> int:
    """Run ``vllm serve`` until it ends. Signals to stop are passed on.

    Args:
        arguments: after ``vllm serve``.
        address: where it will listen.
        env: of ``environment``.
        ready: called once, when the server is healthy.

    Returns:
        The exit code.
    """
    # Not the installed script: it may be another environment's, and this name is told apart too.
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
    # In a group of its own. Otherwise Ctrl-C would reach it twice, and vLLM would not shut down.
    server = subprocess.Popen(command, env=env, process_group=0)

    def stop(number: int, frame: Any) -> None:
        server.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    while server.poll() is None and not (address.path or address.answers()):
        time.sleep(_POLL)
    if server.poll() is None and not address.path:
        ready()
    code = server.wait()
    return code if code >= 0 else 128 - code
