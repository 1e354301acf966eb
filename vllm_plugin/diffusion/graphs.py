# SPDX-License-Identifier: Apache-2.0
"""Forward passes of fixed shapes, captured as CUDA graphs before the first request.

A step whose rows are the same in all layers can be padded to one of a few shapes. Its forward pass
then reads the same memory and launches the same kernels each time, so that a graph replays it
without the time that Python takes to launch them. Steps of up to 512 rows are bound by that time.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from vllm.distributed.parallel_state import graph_capture
from vllm.logger import init_logger
from vllm.model_executor.offloader import get_offloader
from vllm.utils.gc_utils import freeze_gc_for_cudagraph_capture

logger = init_logger(f"vllm.{__name__}")  # under vLLM's own, or it is not shown

_ROWS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_REQUESTS = (1, 2, 4, 8, 16, 32)
GRAPH = 8 << 20  # bytes of device memory that are kept free per graph; an estimate

# Where steps are padded. A CPU launches nothing, so that padding would only cost time there; tests
# add it to run the same steps.
PADDED_ON = {"cuda"}

Pass = Callable[[], None]


@dataclass(frozen=True, order=True)
class Shape:
    """What a padded step is padded to.

    Attributes:
        rows: Positions that are computed.
        requests: Requests, of which the last can be empty.
        blocks: Columns of the block table.
        length: The most positions of a request.
    """

    rows: int
    requests: int
    blocks: int
    length: int


def shapes(requests: int, blocks: int, length: int) -> list[Shape]:
    """Return all shapes of an engine.

    Args:
        requests: The most requests of a step.
        blocks: The most blocks of a request.
        length: The most positions of a request.
    """
    least = next((some for some in _REQUESTS if some >= requests), _REQUESTS[-1])
    return [
        Shape(rows, some, blocks, length)
        for rows in _ROWS
        for some in _REQUESTS
        if some <= min(rows, least)
    ]


def fitting(known: Iterable[Shape], rows: int, requests: int) -> Shape | None:
    """Return the smallest shape that a step fits in, or None."""
    fits = (shape for shape in known if shape.rows >= rows and shape.requests >= requests)
    return min(fits, default=None)


def captured(
    known: Sequence[Shape], pass_of: Callable[[Shape], Pass], device: torch.device
) -> dict[Shape, Pass]:
    """Run a forward pass of each shape once, which compiles its kernels, and capture it.

    Args:
        known: The shapes.
        pass_of: Loads the inputs of an empty step of a shape, and returns what computes hidden
            states from them. All tensors that it shares with others stay where they are.
        device: Where they run. Only CUDA has graphs.

    Returns:
        What runs the same pass again, with the inputs of the current step.
    """
    graphs: dict[Shape, Pass] = {}
    if device.type != "cuda" or not known:
        for shape in known:
            graphs[shape] = pass_of(shape)
            graphs[shape]()
        return graphs
    before = torch.accelerator.get_memory_info()[0]
    with freeze_gc_for_cudagraph_capture(), graph_capture(device) as context:
        pool = torch.cuda.graph_pool_handle()
        # The largest first, so that the smaller ones find room in the memory that it took.
        for shape in sorted(known, reverse=True):
            run = pass_of(shape)
            run()
            graphs[shape] = _Graph(run, pool, context.stream)
    taken = before - torch.accelerator.get_memory_info()[0]
    logger.info("Captured %d CUDA graphs of denoising steps, in %d MiB", len(graphs), taken >> 20)
    return graphs


class _Graph:
    """One captured forward pass."""

    def __init__(self, run: Pass, pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
        self._graph = torch.cuda.CUDAGraph()
        get_offloader().sync_prev_onload()  # of weights that are kept on the host
        with torch.cuda.graph(self._graph, pool, stream):
            run()
            get_offloader().join_after_forward()

    def __call__(self) -> None:
        get_offloader().sync_prev_onload()
        self._graph.replay()
