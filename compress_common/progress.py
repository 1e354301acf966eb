# SPDX-License-Identifier: Apache-2.0
"""How slow work tells that it advances."""

from typing import Protocol


class Progress(Protocol):
    """Called as a step advances: ``progress(step, done, total)``."""

    def __call__(self, step: str, done: int, total: int) -> None: ...


def silent(step: str, done: int, total: int) -> None:
    """Show no progress."""


def both(first: Progress, second: Progress) -> Progress:
    """Return a progress that tells two others."""

    def told(step: str, done: int, total: int) -> None:
        first(step, done, total)
        second(step, done, total)

    return told
