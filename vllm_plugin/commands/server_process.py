# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` as a child process: where it listens, what it is given, and how it ends."""

import argparse
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

_POLL = 0.5  # seconds between two looks at a server that starts
_PATIENCE = 30  # seconds for a server to shut down


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
        # Not through a proxy that the environment names for other hosts.
        handlers = [
            urllib.request.ProxyHandler({}),
            urllib.request.HTTPSHandler(context=ssl._create_unverified_context()),
        ]
        try:
            with urllib.request.build_opener(*handlers).open(
                f"{self.url}/health", timeout=5
            ) as got:
                return bool(got.status == 200)
        except (OSError, http.client.HTTPException):
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


def command(arguments: Sequence[str]) -> list[str]:
    """Return the command that runs ``vllm serve`` of this environment."""
    # Not the installed script: another environment's may come first on PATH.
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]


def run(
    command: Sequence[str], address: Address, env: Mapping[str, str], ready: Callable[[], None]
) -> int:
    """Run a server until it ends. It never outlives this function, nor do its processes.

    Args:
        command: the server.
        address: where it will listen.
        env: of ``environment``.
        ready: called once, when the server is healthy.

    Returns:
        The exit code.
    """
    server: subprocess.Popen[bytes] | None = None
    caught: list[int] = []

    def stop(number: int, frame: Any) -> None:
        caught.append(number)
        if server is not None:
            server.send_signal(_passed_on(number))

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, stop)
    # In a group of its own. Otherwise Ctrl-C would reach it twice, and vLLM would not shut down.
    server = subprocess.Popen(command, env=env, process_group=0)
    try:
        for early in caught:  # before it was there
            server.send_signal(_passed_on(early))
        while server.poll() is None and not (address.path or address.answers()):
            time.sleep(_POLL)
        if server.poll() is None and not address.path:
            ready()
        code = server.wait()
        return code if code >= 0 else 128 - code
    finally:
        _end(server)


def _passed_on(number: int) -> int:
    """vLLM shuts down on these two. A closed terminal would end its first process alone."""
    return number if number in (signal.SIGINT, signal.SIGTERM) else signal.SIGTERM


def _end(server: "subprocess.Popen[bytes]") -> None:
    if server.poll() is None:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(_PATIENCE)
    with suppress(ProcessLookupError):  # nothing is left of its group
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
