# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C in work that keeps its finished stages: at every one of them, or at some."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, TypeVar

import pytest

from compress_common.calibration.stages import Stages, Tensors

T = TypeVar("T")


def random_numbers() -> Random:
    """Random numbers, other ones in each run. The seed is printed, for when a test fails."""
    seed = Random().getrandbits(32)
    print(f"Random({seed})")
    return Random(seed)


@contextmanager
def stages_of(chosen: Collection[str] = (), random: Random | None = None) -> Iterator[list[str]]:
    """Yield the names of the stages that are computed, as they finish.

    Args:
        chosen: Names of stages. The second of them that is new ends the work by Ctrl-C: before it
            is computed, or when it is done but not stored.
        random: Draws which.
    """
    original, done = Stages.tensors, []

    def tensors(self: Stages, name: str, compute: Callable[[], Tensors]) -> Tensors:
        def computed() -> Tensors:
            ends = name in chosen and any(other in chosen for other in done)
            early = ends and random is not None and random.random() < 0.5
            if early:
                raise KeyboardInterrupt
            result = compute()
            if ends:
                raise KeyboardInterrupt
            done.append(name)
            return result

        return original(self, name, computed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stages, "tensors", tensors)
        yield done


def in_parts(work: Callable[[], T], chosen: Collection[str], random: Random) -> tuple[T, Any]:
    """Return what some work ends with that is interrupted at each chosen stage, and its parts.

    Args:
        work: Is started anew after each interruption.
        chosen: Names of stages.
        random: See ``stages_of``.

    Returns:
        The result, and the stages that each part computed.
    """
    parts: list[list[str]] = []
    while True:
        with stages_of(chosen, random) as done:
            parts.append(done)
            try:
                return work(), parts
            except KeyboardInterrupt:
                assert done, "nothing was kept"
