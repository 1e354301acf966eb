# SPDX-License-Identifier: Apache-2.0
"""Refuse a calibration that cannot end before the one who waits for it gives up."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from compress_common.errors import LimitError
from compress_common.progress import Progress
from compress_common.structure.derive import structure_of

_SIDE: Final = 1024  # of the matrices whose product is timed
_ROUNDS: Final = 3
_SEEN: Final = 2  # items of a step whose time is known before the rest is judged


@dataclass(frozen=True)
class TimeLimit:
    """How long a calibration may take.

    Attributes:
        seconds: From now on.
        advice: What to do instead, for the message.
    """

    seconds: float
    advice: str

    def check(self, needed: float) -> None:
        """Raise LimitError when the work takes longer.

        Args:
            needed: Seconds that it takes at the least.
        """
        if needed > self.seconds:
            raise LimitError(
                f"calibration needs at least {_shown(needed)} on this machine, and has "
                f"{_shown(max(self.seconds, 0))} until vLLM gives the engine up; {self.advice}"
            )

    def judged(self, progress: Progress, now: Callable[[], float] = time.monotonic) -> Progress:
        """Return a progress that raises LimitError when a step cannot end in time.

        Steps are told before each item, so the time from one call to the next is that of an item.
        The rest is judged by the fastest item: the first one waits for a device to start.

        Args:
            progress: Told too.
            now: The clock, in seconds.
        """
        begin = now()
        # Of each kind of step: when the last item was told, its number, items since the first, and
        # the least seconds of an item.
        seen: dict[str, tuple[float, int, int, float]] = {}

        def judge(step: str, done: int, total: int) -> None:
            progress(step, done, total)
            at, kind = now(), step.split()[0]
            before, last, items, least = seen.get(kind, (at, done, 0, math.inf))
            if done <= last:
                items, least = 0, math.inf
            else:
                items, least = items + done - last, min(least, (at - before) / (done - last))
            seen[kind] = at, done, items, least
            left = least * max(total - done, 0) if items >= _SEEN else 0.0
            self.check(at - begin + left)

        return judge


def least_operations(config: Any, tokens: int, *, sampled: bool, gram: bool) -> float:
    """Return the floating-point operations that a calibration takes at the least.

    Attention, the search of ranges and further passes are left out.

    Args:
        config: The text model's ``transformers`` config.
        tokens: Calibration tokens in all.
        sampled: Whether the model samples them.
        gram: Whether GPTQ rounds: on Gram matrices, with a second pass of the rounded model.
    """
    structure = structure_of(config)
    passes, total = 1 + sampled + gram, 0.0
    for index in range(structure.depth):
        kind = structure.layer(index)
        for stack in kind.stacks:
            inputs = kind.shapes[stack.linears[0]][1]
            outputs = sum(kind.shapes[name][0] for name in stack.linears)
            seen: float = tokens
            if stack.linears[0] in kind.routed and kind.experts is not None:
                seen *= kind.experts.chosen / kind.experts.count
            total += 2.0 * outputs * inputs * seen * passes
            if gram:
                total += inputs**2 * (2.0 * seen + outputs + inputs)
    return total


def operations_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Return how many floating-point operations a device does in a second, by a short product."""
    matrix = torch.ones(_SIDE, _SIDE, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * _SIDE**3 / best


def _shown(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 600 else f"{seconds:.0f} s"
