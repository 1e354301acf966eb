# SPDX-License-Identifier: Apache-2.0
"""Texts that come with what vLLM requires: Newton's Opticks, and others of different kinds."""

import argparse
import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_plugin.commands.judging.texts import reference

_PACKAGE, _FILE = "tvm_ffi", "3rdparty/libbacktrace/Isaac.Newton-Opticks.txt"


def opticks() -> tuple[str, str]:
    """Its halves: one to calibrate on, one to judge by. FileNotFoundError if it is not there."""
    found = importlib.util.find_spec(_PACKAGE)
    places = found.submodule_search_locations if found else None
    if not places or not (book := Path(places[0]) / _FILE).is_file():
        raise FileNotFoundError(f"the text {_FILE} of the package apache-tvm-ffi")
    content = book.read_text(encoding="utf-8", errors="replace")
    return content[: len(content) // 2], content[len(content) // 2 :]


def domains(seed: int = 0) -> dict[str, str]:
    """Five texts of different kinds: a book, a reference, Python, C++ and JSON records."""
    import torch

    headers = sorted((Path(torch.__file__).parent / "include" / "c10" / "util").glob("*.h"))
    return {
        "book": opticks()[1],
        "reference": reference(),
        "python": Path(argparse.__file__).read_text(encoding="utf-8"),
        "cpp": "\n".join(file.read_text(encoding="utf-8") for file in headers),
        "records": _records(random.Random(seed), 500),
    }


def windows(tokenizer: Any, text: str, count: int, length: int) -> Iterator[list[int]]:
    """Yield so many tokens from the middle of each of ``count`` equal parts of a text."""
    tokens = tokenizer(text)["input_ids"]
    part = len(tokens) // count
    for number in range(count):
        start = number * part + (part - length) // 2
        yield tokens[start : start + length]


def _records(draw: random.Random, count: int) -> str:
    """JSON lines as a service logs them."""
    words = ("search", "login", "upload", "payment", "export", "refund")
    rows = (
        {
            "id": 1000 + number,
            "user": f"user-{draw.randrange(500)}",
            "action": draw.choice(words),
            "status": draw.choice((200, 200, 200, 404, 500)),
            "milliseconds": draw.randrange(5, 900),
        }
        for number in range(count)
    )
    return "\n".join(json.dumps(row) for row in rows)
