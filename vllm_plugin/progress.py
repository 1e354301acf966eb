# SPDX-License-Identifier: Apache-2.0
"""One progress bar for all long steps, in servers and on the command line."""

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from quant_methods.base import Progress


@contextmanager
def bar(*, disable: bool = False) -> Iterator[Progress]:
    """A tqdm bar that names the current step; nothing is drawn when ``disable``."""
    with tqdm(disable=disable, leave=False, bar_format="{desc} {bar} {n}/{total}") as shown:

        def progress(step: str, done: int, total: int) -> None:
            shown.set_description_str(step, refresh=False)
            shown.total, shown.n = total, done
            shown.refresh()

        yield progress
