# SPDX-License-Identifier: Apache-2.0
"""How long steps report progress: a bar on a terminal, else a line now and then."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from compress_common.progress import Progress

_THEIRS: Final = "transformers.utils.logging"
PERIOD: Final = 30.0  # seconds between the lines


@contextmanager
def bar(*, disable: bool = False) -> Iterator["Progress"]:
    """Show the progress of a long step on stderr.

    On a terminal this is a bar, which vanishes at the end. Elsewhere, such as in a log, it is one
    line every 30 seconds: a bar would write thousands of carriage returns there.

    Args:
        disable: show nothing.

    Yields:
        A function that takes the name of the current step, how much of it is done, and its total.
    """
    with _without_theirs():
        if disable or not sys.stderr.isatty():
            yield lines(disable=disable)
        else:
            with _drawn() as progress:
                yield progress


@contextmanager
def _without_theirs() -> Iterator[None]:
    """Hide the bars of transformers: they would draw over ours, and write returns into a log."""
    # transformers asks huggingface_hub when it is imported, which takes seconds.
    from huggingface_hub import utils as hub

    theirs = not hub.are_progress_bars_disabled()
    hub.disable_progress_bars()
    if loaded := sys.modules.get(_THEIRS):
        theirs = loaded.is_progress_bar_enabled()
        loaded.disable_progress_bar()
    try:
        yield
    finally:
        if theirs:
            hub.enable_progress_bars()
            if loaded := sys.modules.get(_THEIRS):
                loaded.enable_progress_bar()


@contextmanager
def _drawn() -> Iterator["Progress"]:
    """Draw a bar on a terminal."""
    from tqdm import tqdm  # not above, as `vllm-compress --help` is to be quick

    pace = Pace()
    with tqdm(total=1, leave=False, bar_format="{desc} {bar} {n}/{total}{postfix}") as shown:

        def progress(step: str, done: int, total: int) -> None:
            shown.set_description_str(step, refresh=False)
            shown.set_postfix_str(pace.left(step, done, total), refresh=False)
            shown.total, shown.n = max(total, done), done
            shown.refresh()

        yield progress


def lines(
    *, disable: bool = False, now: Callable[[], float] = time.monotonic, period: float = PERIOD
) -> "Progress":
    """Return a progress function that prints the first line at once, then one in each period.

    Args:
        disable: print nothing.
        now: the clock, in seconds.
        period: least seconds from one line to the next.
    """
    last, pace = -math.inf, Pace(now)

    def progress(step: str, done: int, total: int) -> None:
        nonlocal last
        left = pace.left(step, done, total)
        if not disable and now() - last >= period:
            last = now()
            told = f"{step} {done}/{total}" + (f", {left}" if left else "")
            print(f"vllm-compress: {told}", file=sys.stderr, flush=True)

    return progress


class Pace:
    """Tells how long a step still takes, at the speed that it had so far.

    Args:
        now: the clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._step: tuple[str, int] | None = None
        self._begin, self._first = 0.0, 0

    def left(self, step: str, done: int, total: int) -> str:
        """Return a text such as ``1:20 left``, empty while that is not known.

        Args:
            step: name of the step; with another name or total, another one has begun.
            done: how much of it is done. What a resumed step had done before does not count.
            total: of the step.
        """
        if self._step != (step, total) or done < self._first:
            self._step, self._begin, self._first = (step, total), self._now(), done
        if done == self._first or done >= total:
            return ""
        seconds = (self._now() - self._begin) * (total - done) / (done - self._first)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        return f"{clock} left"
