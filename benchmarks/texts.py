# SPDX-License-Identifier: Apache-2.0
"""A text that comes with what vLLM requires: Newton's Opticks."""

import importlib.util
from pathlib import Path

_PACKAGE, _FILE = "tvm_ffi", "3rdparty/libbacktrace/Isaac.Newton-Opticks.txt"


def opticks() -> tuple[str, str]:
    """Its halves: one to calibrate on, one to judge by. FileNotFoundError if it is not there."""
    found = importlib.util.find_spec(_PACKAGE)
    places = found.submodule_search_locations if found else None
    if not places or not (book := Path(places[0]) / _FILE).is_file():
        raise FileNotFoundError(f"the text {_FILE} of the package apache-tvm-ffi")
    content = book.read_text(encoding="utf-8", errors="replace")
    return content[: len(content) // 2], content[len(content) // 2 :]
