# SPDX-License-Identifier: Apache-2.0
"""What a worker compacted: counted where it happens, read by whoever reports it."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from kv_policies.layout.base import Layout
from kv_policies.plan import Tally


@dataclass
class Done:
    """What one step did.

    Attributes:
        segments: Compacted prompts and windows, by kind.
        tokens: Tokens of these segments, mean over the compressed layers.
        evicted: Tokens among them whose room was freed, mean over the compressed layers.
        seconds: Host time of observing and compacting, over all layers of a stage.
    """

    segments: dict[str, int] = field(default_factory=dict)
    tokens: float = 0.0
    evicted: float = 0.0
    seconds: float = 0.0


class Activity:
    """Counts a step's work.

    With pipeline parallelism each stage counts, and the front end adds the counts up. Tokens are
    means over the layers of all stages. Segments and seconds are those of one stage.

    Args:
        layers: Compressed layers of the model, on all stages.
        counts_segments: Whether this is the stage that counts segments and seconds.
    """

    def __init__(self, layers: int, counts_segments: bool = True) -> None:
        self._layers = layers
        self._counts_segments = counts_segments
        self._done = Done()

    def plan(self, tallies: Iterable[Tally], layers: int) -> None:
        """Count what a group of ``layers`` layers has to do in this step, all its passes together.

        Groups of layers compact the same segments, except that some keep all of one. So segments
        are counted once: those of the group that compacts most.
        """
        share = layers / self._layers
        segments: Counter[str] = Counter()
        for kind, count, tokens, kept in tallies:
            self._done.tokens += tokens * share
            self._done.evicted += (tokens - kept) * share
            segments[kind] += count
        if not self._counts_segments:
            return
        for kind, count in segments.items():
            self._done.segments[kind] = max(self._done.segments.get(kind, 0), count)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time of the block. On a GPU it is what the host spends on queueing the work."""
        started = time.perf_counter()
        yield
        if self._counts_segments:
            self._done.seconds += time.perf_counter() - started

    def take(self) -> Done:
        """What was done since the last call: vLLM asks once per step."""
        done, self._done = self._done, Done()
        return done


def counting_layer(layouts: Mapping[int, Layout]) -> int:
    """The layer whose pipeline stage counts segments.

    Of the layers that keep least: no other compacts a segment that these leave alone.

    Args:
        layouts: Of all compressed layers of the model, by index.
    """
    return min(layouts, key=lambda layer: (layouts[layer].amount, layer))
