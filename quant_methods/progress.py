# SPDX-License-Identifier: Apache-2.0
"""How slow work tells that it advances."""

from typing import Protocol


class Progress(Protocol):
    """Called as a step advances: ``progress(step, done, total)``."""

    def __call__(self, step: str, done: int, total: int) -> None: ...


def silent(step: str, done: int, total: int) -> None:
    """Show no progress."""
