# SPDX-License-Identifier: Apache-2.0
"""How many requests one pool of bytes serves at once: counts, not timings."""

import random
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from benchmarks.common import Options, Result
from benchmarks.kv_engine import (
    BLOCK,
    POLICIES,
    KVEngine,
    NotMeasured,
    Shape,
    bench_model,
    contender,
    policy,
    reported,
    shape_of,
)
from compress_common.calibration.precision import slow_in_16_bit

KEEP = 0.25
# The default ratio, and that of the paper.
KEEP_OF = {"cskv": 0.14, "cskv_16bit": 0.2, "cskv_halves": 0.2}
SMOKE_POLICIES = ("prefix_kv", "fp8")


@dataclass(frozen=True)
class Load:
    """``prompts`` at once, of ``shortest`` to ``longest`` tokens, ``tokens`` new ones each, in a
    pool for ``fitting`` whole requests."""

    prompts: int = 16
    shortest: int = 440
    longest: int = 500
    tokens: int = 64
    fitting: int = 5

    def lengths(self, seed: int) -> list[int]:
        draw = random.Random(seed)
        return [draw.randint(self.shortest, self.longest) for _ in range(self.prompts)]

    @property
    def request_blocks(self) -> int:
        return -(-(self.longest + self.tokens) // BLOCK)

    def pool_bytes(self, shape: Shape) -> int:
        """Bytes, not blocks: at G levels a block is of one G-th of the layers. One block more than
        fits, the one that vLLM never gives away."""
        return (self.fitting * self.request_blocks + 1) * shape.block_bytes


def pool(options: Options, result: Result) -> None:
    """Fill P_steps_ratio, P_peak_running, P_preemptions, P_kept and full_peak_running."""
    load = Load(6, 140, 200, 16, 2) if options.smoke else Load()
    model = bench_model(options)
    served = _Served(load, options, result, "pool")
    full = served("full", contender("full", 1, model, options))
    result.put("full_peak_running", full["peak_running"])
    result.put("full_preemptions", full["preemptions"])
    extra = ("cskv_16bit", "cskv_halves", "snap_kv_fp8")
    for name in (bar := tqdm((*POLICIES, *extra), "pool", leave=False)):
        bar.set_postfix_str(name)
        failed: dict[str, str] = {}
        if options.smoke and name not in SMOKE_POLICIES:
            failed[name] = "--smoke leaves it out"
        else:
            with reported(failed, name):
                seen = served(name, contender(name, KEEP_OF.get(name, KEEP), model, options))
                result.put(f"{name}_steps_ratio", seen["steps"] / full["steps"])
                result.put(f"{name}_peak_running", seen["peak_running"])
                result.put(f"{name}_preemptions", seen["preemptions"])
                kept = seen["kept_bytes_per_column"] / full["kept_bytes_per_column"]
                result.put(f"{name}_kept", kept)
        for key in ("steps_ratio", "peak_running", "preemptions", "kept") if failed else ():
            result.missing(f"{name}_{key}", failed[name])


def windows(options: Options, result: Result) -> None:
    """Fill decode_window_steps_ratio."""
    # Short prompts and long outputs: what windows are for.
    load = Load(6, 60, 100, 160, 2) if options.smoke else Load(16, 100, 160, 512, 4)
    served = _Served(load, options, result, "windows")
    failed: dict[str, str] = {}
    with reported(failed, "snap_kv"):
        seen = [
            served(f"decode_window {size}", policy("snap_kv", keep=KEEP, decode_window=size))
            for size in (128, 0)
        ]
        result.put("decode_window_steps_ratio", seen[0]["steps"] / seen[1]["steps"])
    if failed:
        result.missing("decode_window_steps_ratio", failed["snap_kv"])


class _Served:
    """Serves one load by one engine after the other, all with the same bytes of cache."""

    def __init__(self, load: Load, options: Options, result: Result, part: str) -> None:
        self._load, self._seed = load, options.seed
        self._model = bench_model(options)
        wide = slow_in_16_bit()  # then in float32, with as many blocks: they are what counts
        self._bytes = load.pool_bytes(shape_of(self._model)) * (2 if wide else 1)
        self._block_bytes = shape_of(self._model).block_bytes * (2 if wide else 1)
        self._arguments = {
            "dtype": "float32" if wide else "bfloat16",
            "block_size": BLOCK,
            "kv_cache_memory_bytes": self._bytes,
            "max_model_len": load.request_blocks * BLOCK,
            "max_num_seqs": 32,
            "max_num_batched_tokens": 512,
            "skip_tokenizer_init": True,
            "preloaded": options.smoke,
        }
        result.details[f"{part}_load"] = asdict(load) | {"pool_bytes": self._bytes}
        self._seen: dict[str, Any] = result.details.setdefault(f"{part}_served", {})

    def __call__(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        with KVEngine(self._model, **self._arguments, **arguments) as engine:
            pool_bytes = engine.started["pool_bytes"]
            if not 0 <= self._bytes - pool_bytes < self._block_bytes:
                raise NotMeasured(f"the pool has {pool_bytes} bytes instead of {self._bytes}")
            seen = engine.ask(
                "run",
                lengths=self._load.lengths(self._seed),
                tokens=self._load.tokens,
                seed=self._seed,
            )
            self._seen[name] = {"engine": engine.started} | seen
        return seen
