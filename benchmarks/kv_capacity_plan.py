# SPDX-License-Identifier: Apache-2.0
"""What the host does to plan a step: pure functions on made-up requests, no model, no engine."""

import statistics
import time
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import torch

from benchmarks.common import Options, Result
from kv_policies.compaction import workspace
from kv_policies.latents.columns import LatentColumns
from kv_policies.latents.format import LatentFormat
from kv_policies.latents.packing import Packer, fresh_blocks
from kv_policies.latents.reading import LatentView
from kv_policies.layout.base import Layout
from kv_policies.layout.latents import LatentLayout
from kv_policies.layout.segments import IntArray
from kv_policies.layout.step import Step
from kv_policies.layout.tokens import TokenLayout
from kv_policies.layout.view import LiveColumns, LiveView
from kv_policies.planner import Planner
from kv_policies.registry import build_policy
from kv_policies.workspace import Heads

BLOCK, GROUPS, REQUESTS, LENGTH, LONGER = 32, 6, 32, 4096, 16
PROMPT, CHUNK = 2000, 250
HEADS = Heads(kv=8, group=4, size=128, itemsize=2, device="cpu")
POLICY = build_policy("snap_kv", {})
LEVELS = [TokenLayout(BLOCK, Fraction(1 + at, 14), 256, 1, 128) for at in range(GROUPS)]
LATENTS = [LatentLayout(BLOCK, 96 + 32 * at, 32, 32, 128, 32) for at in range(GROUPS)]


def plan(options: Options, result: Result) -> None:
    """Fill plan_*: milliseconds of a step, all groups together; the cases take turns."""
    rounds = 1 if options.smoke else max(5, options.rounds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one step is too little work to share
    cases = {
        f"plan_ms_{kind}_step{suffix}{name}": (groups, length, kind == "mixed")
        for suffix, length, kinds in (
            ("", LENGTH, ("mixed", "decode")),
            ("_long", LONGER * LENGTH, ("mixed",)),
        )
        for name, groups in (("", LEVELS), ("_cskv", LATENTS))
        for kind in kinds
    }
    turns = [
        {key: _mean_ms(*case, options.seed) for key, case in cases.items()} for _ in range(rounds)
    ]
    for key in cases:
        result.median(key, [turn[key] for turn in turns])
    for name in ("", "_cskv"):
        key = f"plan_ms_mixed_step{{}}{name}"
        ratios = [turn[key.format("_long")] / turn[key.format("")] for turn in turns]
        result.median(f"plan_long_ratio{name}", ratios)
    torch.set_num_threads(threads)


def _mean_ms(
    groups: list[TokenLayout] | list[LatentLayout], length: int, mixed: bool, seed: int
) -> float:
    """Of a step, over all the chunks of a prompt, the last one included."""
    shared = _shared(groups)
    builders = [
        _Builder(layout, *shared, REQUESTS, length // BLOCK, seed + at)
        for at, layout in enumerate(groups)
    ]
    times = []
    for n, c, q in _steps(mixed, seed):
        lengths = torch.from_numpy(c + q).int()  # the engine gives them
        begin = time.thread_time()
        step = Step(n, c, q, q.cumsum() - q, [str(row) for row in range(len(n))])
        for builder in builders:
            builder.plan(step, lengths)
        times.append(1000 * (time.thread_time() - begin))
    # The first step plans all requests: others arrive one by one.
    return statistics.mean(times[1:])


def _steps(mixed: bool, seed: int) -> Iterator[tuple[IntArray, IntArray, IntArray]]:
    """Requests that decode, and one whose prompt comes in chunks: n, c, q."""
    draw = np.random.default_rng(seed)
    n = draw.integers(200, PROMPT, REQUESTS)
    c, q = n + draw.integers(0, 400, REQUESTS), np.ones(REQUESTS, np.int64)
    if mixed:
        n[-1], c[-1], q[-1] = PROMPT, 0, CHUNK
    for _ in range(PROMPT // CHUNK):
        yield n, c, q
        c = c + q


def _shared(
    groups: list[TokenLayout] | list[LatentLayout],
) -> tuple[LiveColumns, Planner | Packer, LatentColumns | None]:
    """What the worker gives to the builders of all groups."""
    live, forms = LiveColumns(groups), []
    for layout in groups:
        if isinstance(layout, TokenLayout):
            return live, Planner(groups, POLICY, workspace(POLICY, HEADS)), None
        forms.append((layout, LatentFormat(200, 216, 16, layout.tokens)))
    return live, Packer(forms), LatentColumns(groups)


class _Builder:
    """What a metadata builder does of its own for one group of layers."""

    def __init__(
        self,
        layout: Layout,
        live: LiveColumns,
        planner: Planner | Packer,
        latents: LatentColumns | None,
        requests: int,
        columns: int,
        seed: int,
    ) -> None:
        self.layout, self.planner = layout, planner
        self.live = LiveView(layout, live)
        self.latents = latents and LatentView(layout, latents)
        self.table = torch.randint(10_000, (requests, columns), dtype=torch.int32)

    def plan(self, step: Step, lengths: torch.Tensor) -> None:
        if self.latents is not None:
            fresh_blocks(self.layout, step, self.table)
        for _, part in step.passes(self.layout):
            self.planner.work(self.layout, part, self.table)
            view, _ = self.live.update(part, self.table, lengths)
            if self.latents is not None:
                self.latents.update(part, self.table, view)
