# SPDX-License-Identifier: Apache-2.0
"""Where a server listens, and whether it does. Imports neither torch nor vLLM."""

import argparse
import errno
import http.client
import socket
import ssl
import urllib.request
from dataclasses import dataclass


def local_opener() -> urllib.request.OpenerDirector:
    """Return what reads URLs of this machine, whatever name their certificate has.

    Not through a proxy, which the environment may name for other hosts.
    """
    unverified = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
    return urllib.request.build_opener(urllib.request.ProxyHandler({}), unverified)


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
        host = self._reached
        return f"http{'s' * self.secure}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def _reached(self) -> str:
        anywhere = self.host in (None, "", "0.0.0.0", "::")
        return "127.0.0.1" if anywhere else str(self.host)

    def problem(self) -> str | None:
        """Why a server cannot listen here; None if it can."""
        if self.path:
            return None
        family = socket.AF_INET6 if ":" in (self.host or "") else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((self.host or "", self.port))
            except OverflowError:
                return f"--port {self.port} is not a port; give one from 0 to 65535"
            except (socket.gaierror, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or error
                return f"--host {self.host}: {reason}; give an address of this machine"
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    return f"--host {self.host}: {error.strerror}; give an address of this machine"
                return (
                    f"--port {self.port}: {error.strerror}; stop what listens there or give another"
                )
        return None

    def listens(self) -> bool:
        """Whether clients can connect. vLLM listens when its engine is ready, not before."""
        try:
            if self.path:
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(self.path)
            else:
                socket.create_connection((self._reached, self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def answers(self) -> bool:
        """Whether the server is healthy."""
        try:
            with local_opener().open(f"{self.url}/health", timeout=5) as got:
                return bool(got.status == 200)
        except (OSError, http.client.HTTPException):
            return False
