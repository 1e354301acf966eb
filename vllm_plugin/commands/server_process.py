# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` as a child process: what it is given, and how it ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from vllm_plugin.commands.address import Address

_POLL = 0.5  # seconds between two looks at a server that starts
_PATIENCE = 30  # seconds for a server to shut down
_GRACE = 5  # seconds from a signal to all of its processes to SIGKILL
_STOPPING = f"stopping vLLM; a second Ctrl-C kills it after {_GRACE} seconds\n"


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
    """Run a server until it ends, and end all of its processes.

    A server that listens gets a signal alone: vLLM then lets requests end, or aborts them, as it
    is set to. A server that starts does not act on SIGINT before its engine is ready, so all of
    its processes get the signal, as from a terminal, and SIGKILL after a grace period. They get
    both after a second signal too.

    SIGKILL of this process cannot be passed on: vLLM goes on, in a process group of its own.

    Args:
        command: the server.
        address: where it will listen.
        env: of ``environment``.
        ready: called once, when the server is healthy.

    Returns:
        The exit code: the server's, or 128 and the signal that ended it.
    """
    server: subprocess.Popen[bytes] | None = None
    caught: list[int] = []

    def stop(number: int, frame: Any) -> None:
        caught.append(_passed_on(number))
        if server is not None:
            _pass_on(server, caught, address)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, stop)
    # In a group of its own. Otherwise Ctrl-C would reach it twice, and vLLM would not shut down.
    server = subprocess.Popen(command, env=env, process_group=0)
    try:
        if caught:  # before it was there
            _pass_on(server, caught, address)
        while server.poll() is None and not (address.path or address.answers()):
            time.sleep(_POLL)
        if server.poll() is None and not address.path and not caught:
            ready()
        code = server.wait()
        if code and caught:  # an interrupted start ends with whatever code its processes leave
            return 128 + caught[0]
        return code if code >= 0 else 128 - code
    finally:
        _end(server)


def _pass_on(server: "subprocess.Popen[bytes]", caught: Sequence[int], address: Address) -> None:
    """Pass on the last signal of those caught; runs in a signal handler."""
    if len(caught) == 1:
        with suppress(OSError):  # the terminal is closed
            os.write(2, _STOPPING.encode())  # print() must not run inside itself
        if address.listens():
            server.send_signal(caught[-1])
            return
    _signal_group(server, caught[-1])
    kill = threading.Timer(_GRACE, _signal_group, (server, signal.SIGKILL))
    kill.daemon = True
    kill.start()


def _signal_group(server: "subprocess.Popen[bytes]", number: int) -> None:
    with suppress(ProcessLookupError):  # nothing is left of it
        os.killpg(server.pid, number)


def _passed_on(number: int) -> int:
    """vLLM shuts down on these two. A closed terminal would end its first process alone."""
    return number if number in (signal.SIGINT, signal.SIGTERM) else signal.SIGTERM


def _end(server: "subprocess.Popen[bytes]") -> None:
    if server.poll() is None:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(_PATIENCE)
    _signal_group(server, signal.SIGKILL)
    server.wait()
