# SPDX-License-Identifier: Apache-2.0
"""A network namespace with nothing but loopback, as Ray listens on every interface there is."""

import fcntl
import shutil
import socket
import struct
import subprocess

PREFIX = ["unshare", "--map-root-user", "--net"]
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1


def refusal() -> str:
    """Why no namespace can be made here; empty when one can."""
    if not shutil.which(PREFIX[0]):
        return "no command `unshare` (Debian: util-linux)"
    done = subprocess.run([*PREFIX, "true"], capture_output=True, text=True)
    return f"a network namespace is not allowed: {done.stderr.strip()}" if done.returncode else ""


def up() -> None:
    """Switch loopback on: in a new namespace it is off."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh22x", b"lo", _IFF_UP)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, request)
