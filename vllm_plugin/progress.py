# SPDX-License-Identifier: Apache-2.0
"""One progress bar for all long steps, in servers and on the command line."""

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm
from transformers.utils import logging as hf_logging

from quant_methods.base import Progress


@contextmanager
def bar(*, disable: bool = False) -> Iterator[Progress]:
    """A tqdm bar that names the current step; nothing is drawn when ``disable``."""
    hf_logging.disable_progress_bar()  # it would draw over ours
    with tqdm(
        total=1, disable=disable, leave=False, bar_format="{desc} {bar} {n}/{total}"
    ) as shown:

        def progress(step: str, done: int, total: int) -> None:
            shown.set_description_str(step, refresh=False)
            shown.total, shown.n = max(total, done), done
            shown.refresh()

        yield progress
