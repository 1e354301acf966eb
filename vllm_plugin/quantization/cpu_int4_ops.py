# SPDX-License-Identifier: Apache-2.0
"""int4 linears on CPU as custom ops: for few rows, for many rows, and where to change over.

bfloat16 activations use torch's int4pack layout: codes uint8 [N, K/2] and `scale_zero` bfloat16
[K/g, N, 2]. A weight is (code - 8) * scale + zero. Symmetric weights have zero = 0 and are exact.
Otherwise zero is (8 - zero point) * scale, rounded to bfloat16. That rounding shifts all weights of
a group by the same amount, at most 2^-8 |zero|, so at most scale / 32.
"""

import functools
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.logger import init_logger
from vllm.utils.torch_utils import direct_register_custom_op

logger = init_logger(f"vllm.{__name__}")

_TILE_BYTES = 8 << 20  # dequantized weights at a time, so that they fit a last-level cache
_NEVER = 1 << 62
ROWS = "COMPRESS_INT4_ROWS"

_crossovers: dict[tuple[int, int, int], int] = {}


def _dequantize(
    codes: torch.Tensor, mask: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> torch.Tensor:
    return ((codes & mask).float() * scale + zero).bfloat16().contiguous()


@functools.cache
def _nibbles(half: int, halves: bool) -> tuple[tuple[int, int], torch.Tensor, torch.Tensor]:
    """Return the shape of a block, (nibbles, bytes) or reversed, and its mask and factor."""
    shape = (2, 1) if halves else (2,)
    with torch.inference_mode(False):
        # The high nibble needs no shift: it is 16 times too large and gets 1/16 of the scale.
        mask = torch.tensor([15, 240], dtype=torch.uint8).view(shape)
        factor = torch.tensor([1.0, 0.0625], dtype=torch.float32).view(shape)
    return (2, half) if halves else (half, 2), mask, factor


def _dequantize_rows(
    packed: torch.Tensor,
    scale_zero: torch.Tensor,
    block: int,
    halves: bool,
    run: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Return the transposed weights of some rows, bfloat16 [K, n].

    Args:
        packed: int4pack codes, uint8 [n, K/2].
        scale_zero: [K/g, n, 2].
        block: Outputs that int4pack interleaves, in block/2 bytes per input.
        halves: Whether the low nibbles are the first half of a block and the high nibbles the
            second. Else the two nibbles of a byte are neighbors.
        run: Computes the weights: `_dequantize`, compiled or not.
    """
    n, k = packed.shape[0], packed.shape[1] * 2
    groups, blocks, half = scale_zero.shape[0], n // block, block // 2
    pair, mask, factor = _nibbles(half, halves)
    scale, zero = scale_zero.float().unbind(-1)
    # Exact: a code of 4 bits times a bfloat16 scale fits float32, and so does 8 * scale.
    zero = torch.add(zero, scale, alpha=-8.0).view(groups, 1, blocks, *pair)
    scale = scale.reshape(groups, 1, blocks, *pair) * factor
    codes = packed.view(blocks, groups, k // groups, half).permute(1, 2, 0, 3)
    return run(codes.unsqueeze(3 if halves else 4), mask, scale, zero).view(k, n)


@functools.cache
def int4pack_layout() -> tuple[int, bool] | None:
    """Find (block, halves) of this CPU's int4pack layout by trial: AVX-512, AVX2 and others differ.

    None if `_dequantize_rows` knows no such layout. Then nothing is ever dequantized.
    """
    n, k = 208, 64  # has a last block that is smaller than any of the sizes but 16
    random = torch.Generator().manual_seed(0)  # leave vLLM's own random numbers alone
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32, generator=random)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    unit = torch.tensor([1.0, 8.0], dtype=torch.bfloat16).expand(1, n, 2)
    for block in (64, 32, 16):
        for halves in (True, False):
            main = n // block * block
            got = _dequantize_rows(packed[:main], unit[:, :main], block, halves, _dequantize)
            if torch.equal(got.t().to(torch.int32), codes[:main]):
                return block, halves
    logger.warning("Unknown int4pack layout: large batches will be slow on this CPU")
    return None


@functools.cache
def _compiled_dequantize() -> Callable[..., torch.Tensor]:
    """Return `_dequantize` compiled to one C++ loop, ten times faster, or itself if that fails."""
    block, halves = int4pack_layout() or (64, True)
    packed = torch.arange(7 * block * 160).to(torch.uint8).view(7 * block, 160)  # modulo 256
    scale_zero = torch.arange(5 * 7 * block * 2).to(torch.bfloat16).view(5, 7 * block, 2)

    def keep(guards: Sequence[Any]) -> list[bool]:
        # Threads and default dtype differ between loading and serving, and do not matter here.
        return [
            guard.guard_type not in ("GLOBAL_STATE", "TORCH_FUNCTION_STATE") for guard in guards
        ]

    logger.info("Compiling the int4 dequantizer: up to 20 s, 2 s once torch has it in its cache")
    try:
        options = {"cpp.dynamic_threads": True, "guard_filter_fn": keep}
        fused = torch.compile(_dequantize, options=options)
        got, expected = (
            _dequantize_rows(packed, scale_zero, block, halves, run) for run in (fused, _dequantize)
        )
        if torch.equal(got, expected):
            return fused
        logger.warning("The compiled int4 dequantizer is wrong; using the slower eager one")
    except Exception as error:  # no C++ compiler, no writable cache, ...: many types
        logger.warning("Cannot compile the int4 dequantizer, using the slower eager one: %s", error)
    return _dequantize


@functools.cache
def _tiles(n: int, k: int) -> tuple[tuple[int, int, int, bool], ...]:
    """Return (start, stop, block, halves) of tiles of about _TILE_BYTES that cover N outputs."""
    layout = int4pack_layout()
    if layout is None:
        raise RuntimeError("int4pack layout unknown: cannot dequantize")
    block, halves = layout
    blocks = n // block
    count = max(1, math.ceil(blocks * block * k * 2 / _TILE_BYTES))
    # Equal tiles where possible: each new shape may compile the dequantizer once more.
    count = next((c for c in range(count, 2 * count) if blocks % c == 0), count)
    step = max(1, math.ceil(blocks / count)) * block
    end = blocks * block
    tiles = [(start, min(start + step, end), block, halves) for start in range(0, end, step)]
    if end < n:
        tiles.append((end, n, n - end, False))  # the last, smaller block always has neighbours
    return tuple(tiles)


def dequantized_tile(
    packed: torch.Tensor, scale_zero: torch.Tensor, tile: tuple[int, int, int, bool]
) -> torch.Tensor:
    """Return the transposed weights, bfloat16 [K, stop - start], of one of `_tiles(N, K)`."""
    start, stop, block, halves = tile
    # The compiled function is specialised on the grad mode, and vLLM loads and runs in two modes.
    with torch.inference_mode(False), torch.no_grad():
        run = _compiled_dequantize() if stop - start > block else _dequantize
        return _dequantize_rows(packed[start:stop], scale_zero[:, start:stop], block, halves, run)


def linear_int4pack(
    x: torch.Tensor, packed: torch.Tensor, scale_zero: torch.Tensor, group_size: int
) -> torch.Tensor:
    """Multiply x bfloat16 [M, K] by torch's int4 GEMM, with float32 weights and sums: [M, N]."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scale_zero)


def linear_dequantized(
    x: torch.Tensor, packed: torch.Tensor, scale_zero: torch.Tensor
) -> torch.Tensor:
    """Multiply x bfloat16 [M, K] by torch's bfloat16 GEMM, with weights in bfloat16: [M, N]."""
    n, k = packed.shape[0], x.shape[1]
    tiles = _tiles(n, k)
    if len(tiles) == 1:
        return torch.mm(x, dequantized_tile(packed, scale_zero, tiles[0]))
    out = x.new_empty(x.shape[0], n)
    for tile in tiles:
        torch.mm(x, dequantized_tile(packed, scale_zero, tile), out=out[:, tile[0] : tile[1]])
    return out


def crossover(packed: torch.Tensor, scale_zero: torch.Tensor, group_size: int) -> int:
    """Largest M for which `linear_int4pack` is the faster one; measured once per (K, N, g).

    COMPRESS_INT4_ROWS sets it: both ways round differently, and measuring on a busy machine may not
    give the same M twice.
    """
    n, k = packed.shape[0], packed.shape[1] * 2
    key = k, n, group_size
    if key not in _crossovers:
        fixed = os.environ.get(ROWS)
        _crossovers[key] = (
            int(fixed) if fixed else _measure_crossover(packed, scale_zero, group_size)
        )
        m = _crossovers[key]
        most = "any M" if m == _NEVER else f"M up to {m}"
        logger.info("int4 linear K=%d N=%d g=%d: int4pack GEMM for %s", k, n, group_size, most)
    return _crossovers[key]


def _measure_crossover(packed: torch.Tensor, scale_zero: torch.Tensor, group_size: int) -> int:
    if int4pack_layout() is None:
        return _NEVER
    k = packed.shape[1] * 2
    rows = max(64, (1 << 22) // k // 64 * 64)  # a slice is enough, as both times grow with N
    packed, scale_zero = packed[:rows], scale_zero[:, :rows].contiguous()
    x = torch.ones(64, k, dtype=torch.bfloat16)
    runs: dict[int, Callable[[], torch.Tensor]] = {
        8: lambda: linear_int4pack(x[:8], packed, scale_zero, group_size),
        16: lambda: linear_dequantized(x[:16], packed, scale_zero),
        64: lambda: linear_dequantized(x, packed, scale_zero),
    }
    best = dict.fromkeys(runs, math.inf)  # seconds of CPU time
    threads = torch.get_num_threads()

    def measure() -> None:
        torch._C.set_num_threads(1)  # vLLM replaces torch.set_num_threads by a warning
        try:
            for attempt in range(6):  # interleaved, and the best of five
                for m, run in runs.items():
                    start = time.thread_time()
                    run()
                    if attempt:  # the first may compile
                        best[m] = min(best[m], time.thread_time() - start)
        finally:
            torch._C.set_num_threads(threads)  # also sets the default of later threads

    # Measure the CPU time of one thread: wall times mean nothing where cores are shared. Use a new
    # thread: OpenMP counts threads per thread, and vLLM has bound those of this one.
    worker = threading.Thread(target=measure)
    worker.start()
    worker.join()
    # int4pack costs best[8] / 2 for 4 rows, a dequantized GEMM fixed + slope * M for M rows.
    slope = max(0.0, (best[64] - best[16]) / 48)
    gain = best[8] / 8 - slope
    fixed = best[16] - 16 * slope
    return min(_NEVER, max(0, int(fixed / gain / 4)) * 4) if 0 < gain < math.inf else _NEVER


def int4_linear(
    rows: torch.Tensor, packed: torch.Tensor, scale_zero: torch.Tensor, group_size: int
) -> torch.Tensor:
    """Multiply rows bfloat16 [M, K] in the way that is faster for so many: [M, N]."""
    if rows.shape[0] == 0:
        return rows.new_empty(0, packed.shape[0])
    if rows.shape[0] <= crossover(packed, scale_zero, group_size):
        return linear_int4pack(rows, packed, scale_zero, group_size)
    return linear_dequantized(rows, packed, scale_zero)


def _cpu_int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale_zero: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = int4_linear(rows, packed, scale_zero, group_size)
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], packed.shape[0])


def _cpu_int4_linear_fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale_zero: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


# One opaque op: the choice depends on M, which is symbolic under torch.compile.
direct_register_custom_op("cpu_int4_linear", _cpu_int4_linear, fake_impl=_cpu_int4_linear_fake)


def cpu_int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale_zero: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """Multiply x bfloat16 [..., K], of any strides: bfloat16 [..., N]. There may be no rows."""
    return torch.ops.vllm.cpu_int4_linear(x, packed, scale_zero, bias, group_size)


def cpu_w4a8_linear(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Multiply like `cpu_int4_linear`, with int8 activations and weights of `pack_w4a8`."""
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.float()
    # vLLM's kernel assumes unit stride. A view takes microseconds, and this is run for each linear.
    plain = x.dim() == 2 and x.is_contiguous()  # noqa: PLR2004
    rows = x if plain else x.reshape(-1, x.shape[-1]).contiguous()
    # It divides by M. Under torch.compile a test of M would add a guard, and vLLM never compiles an
    # empty batch.
    if torch.compiler.is_compiling() or rows.numel():
        out = ops.int4_scaled_mm_cpu(rows, weights, zero_points, scales, bias)
    else:
        out = x.new_empty(0, scales.shape[0] * scales.shape[2])
    return out if plain else out.view(*x.shape[:-1], out.shape[1])
