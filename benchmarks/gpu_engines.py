# SPDX-License-Identifier: Apache-2.0
"""Whole engines on a GPU: same text, speed with CUDA graphs, capacity, diffusion.

Stock and ours take turns in one run. Engines use full decode graphs without torch.compile, which is
what decides the speed of a decode step; ``defaults`` uses vLLM's defaults.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import NotHere, Options, Result, alternate
from benchmarks.diffusion_speed import DiffusionEngine
from benchmarks.engine import Engine, EngineFailed
from benchmarks.gpu_models import SENSITIVE, SENSITIVE_TINY, llada, llama, made_up_bases
from benchmarks.kv_engine import KVEngine, last_line, policy
from benchmarks.random_models import random_llama

# (requests, tokens of each prompt, new tokens)
DECODES = ((1, 2048, 64), (8, 2048, 64), (64, 480, 64))
_GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
_PIECES = {"mode": 0, "cudagraph_mode": "PIECEWISE"}
_BREAKABLE = {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}
# Windows that end while a graph is replayed, with little to generate.
_WINDOWS = policy("recent", keep=0.25, decode_window=32)
_LARGE = 120e9  # bytes of device memory in which all engines of a part fit with every layer

Starts = dict[str, partial[Engine]]


def identity(options: Options, result: Result) -> None:
    """Fill P_leaked_blocks and P_freed_blocks of each engine, and P_same_as_Q of pairs of them."""
    stock = partial(KVEngine, plugin=False)
    starts: Starts = {
        "stock": stock,
        "keep1": partial(KVEngine, **policy("snap_kv", keep=1)),
        "snap_kv": partial(KVEngine, **policy("snap_kv", keep=0.25)),
        "recent": partial(KVEngine, **_WINDOWS),
    }
    if _cuda():
        starts["recent_eager"] = partial(KVEngine, **_WINDOWS, enforce_eager=True)
        triton = {"attention_backend": "TRITON_ATTN"}
        starts |= {
            "stock_triton": partial(stock, **triton),
            "keep1_triton": partial(KVEngine, **policy("snap_kv", keep=1), **triton),
            "snap_kv_triton": partial(KVEngine, **policy("snap_kv", keep=0.25), **triton),
        }
    lengths = [40, 64, 100, 200] if options.smoke else [40, 333, 512, 700, 1200, 1999, 2600, 64]
    more = {"load_format": "auto", "max_model_len": 4096, "kv_cache_memory_bytes": 1 << 28}
    texts: dict[str, list[list[int]]] = {}
    with _started(options, result, starts, _sensitive(options), **more) as engines:
        for name, engine in engines.items():
            asked = {"lengths": lengths, "tokens": 64, "seed": options.seed}
            texts[name] = engine.ask("texts", **asked)
            seen = engine.ask("run", **asked)
            result.note(f"{name}_run", seen)
            left = engine.started["blocks"] - 1 - seen["free_blocks_at_end"]
            result.put(f"{name}_leaked_blocks", left)
            result.put(f"{name}_freed_blocks", seen["blocks_freed"])
    for name, base in (
        ("keep1", "stock"),
        ("keep1", "stock_triton"),
        ("keep1_triton", "stock_triton"),
        ("stock", "stock_triton"),
        ("snap_kv", "stock"),
        ("snap_kv_triton", "stock_triton"),
        ("recent", "stock"),
        ("recent", "recent_eager"),
    ):
        if name in texts and base in texts:
            result.put(f"{name}_same_as_{base}", _same(texts[name], texts[base]))


def syncs(options: Options, result: Result) -> None:
    """Fill P_syncs: places in our code that wait for the device, of steps with all kinds of work.

    PyTorch reports each place once. Where a step waits without us is in the notes of ``stock``.
    """
    starts: Starts = {
        "stock": partial(KVEngine, plugin=False),
        "snap_kv": partial(KVEngine, **policy("snap_kv", keep=0.25, decode_window=64)),
    }
    more = {"load_format": "auto", "max_model_len": 4096, "kv_cache_memory_bytes": 1 << 28}
    starts = {name: partial(s, env={"VLLM_GPU_SYNC_CHECK": "warn"}) for name, s in starts.items()}
    with _started(options, result, starts, _sensitive(options), **more) as engines:
        for name, engine in engines.items():
            engine.ask("run", lengths=[500] * 8, tokens=200, seed=options.seed)
            lines = [line for line in engine.log().splitlines() if "sync" in line.lower()]
            places = Counter(line.strip()[-300:] for line in lines)
            result.note(f"{name}_sync_places", dict(places.most_common(30)))
            ours = [line for line in places if "vllm_plugin" in line or "kv_policies" in line]
            result.put(f"{name}_syncs", len(ours))


def decode(options: Options, result: Result) -> None:
    """Fill P_decode_ratio_bB and P_prefill_ratio over stock with full graphs."""
    starts: Starts = {
        "stock": partial(KVEngine, plugin=False),
        "keep1": partial(KVEngine, **policy("snap_kv", keep=1)),
        "snap_kv": partial(KVEngine, **policy("snap_kv", keep=0.25)),
    }
    if _cuda():
        pieces = {"env": _BREAKABLE, "compilation_config": _PIECES}
        starts["stock_pieces"] = partial(KVEngine, plugin=False, **pieces)
        starts["keep1_pieces"] = partial(KVEngine, **policy("snap_kv", keep=1), **pieces)
    _time(options, result, starts, llama(options, _layers()), "")


def int4(options: Options, result: Result) -> None:
    """Fill P_int4_decode_ratio_bB over stock vLLM with the same int4 weights, and over bf16."""
    if not _cuda():
        raise NotHere("vLLM's CPU kernel takes no random int4 tensors; needs an NVIDIA GPU")
    starts: Starts = {
        "stock": partial(KVEngine, plugin=False),
        "keep1": partial(KVEngine, **policy("snap_kv", keep=1)),
        "snap_kv": partial(KVEngine, **policy("snap_kv", keep=0.25)),
    }
    _time(options, result, starts, llama(options, _layers(), int4=True), "_int4")


def latents(options: Options, result: Result) -> None:
    """Fill cskv_decode_ratio_bB and cskv_4bit_decode_ratio_bB over stock, all with full graphs."""
    model = llama(options, _layers())
    bases = {bits: str(made_up_bases(model, bits, options)) for bits in (16, 4)}
    starts: Starts = {
        "stock": partial(KVEngine, plugin=False),
        "cskv": partial(KVEngine, **policy("cskv", bases=bases[16])),
        "cskv_4bit": partial(KVEngine, **policy("cskv", bases=bases[4])),
    }
    if _cuda():
        pieces = {"env": _BREAKABLE, "compilation_config": _PIECES}
        starts["cskv_pieces"] = partial(starts["cskv"], **pieces)
    _time(options, result, starts, model, "", block_size=32)


def pool(options: Options, result: Result) -> None:
    """Fill P_requests_ratio and P_tokens_ratio, in a pool for 8 full requests of 8,192 tokens."""
    layers, fitting, length = (2, 4, 512) if options.smoke else (8, 8, 8192)
    model = llama(options, layers)
    token_bytes = 2 * 2 * 2 * 32 * layers if options.smoke else 4096 * layers
    starts: Starts = {
        "stock": partial(KVEngine, plugin=False),
        "snap_kv": partial(KVEngine, **policy("snap_kv", keep=0.25)),
    }
    more = {
        "max_model_len": length + 256,
        "kv_cache_memory_bytes": (fitting * (length + 256) + 512) * token_bytes,
        "max_num_seqs": 64,
        "enable_prefix_caching": False,
    }
    lengths = [length - 64 * (i % 8) for i in range(4 * fitting)]
    with _started(options, result, starts, model, **more) as engines:
        asked = {"lengths": lengths, "tokens": 128, "seed": options.seed}
        samples = alternate(
            list(engines), options.rounds, lambda name: engines[name].ask("run", **asked), "pool"
        )
    for name, seen in samples.items():
        result.note(f"{name}_pool", seen)
        if name != "stock":
            for key, what in (("requests", "mean_running"), ("tokens", "tokens_per_s")):
                ours, base = ([one[what] for one in s] for s in (seen, samples["stock"]))
                result.ratio(f"{name}_{key}_ratio", ours, base)


def denoise(options: Options, result: Result) -> None:
    """Fill P_ratio_bB: tokens per second over recomputing everything, and P_graphs_ratio_bB."""
    sections: dict[str, dict[str, Any]] = {
        "fixed_period": {},
        "dual_cache": {"block_length": 32},
        "elastic": {"gamma": 0.0},
    }
    starts: Starts = {
        name: partial(
            DiffusionEngine,
            additional_config={
                "compress": {"diffusion": {"policy": name, "tokens_per_step": 2, **section}}
            },
        )
        for name, section in sections.items()
    }
    if _cuda():
        starts["eager"] = partial(starts["fixed_period"], enforce_eager=True)
    asks = {
        "full": ("fixed_period", {"compress_period": 1}),
        "fixed_period": ("fixed_period", {}),
        "never": ("fixed_period", {"compress_period": 1000}),
        "dual_cache": ("dual_cache", {}),
        "elastic_probe": ("elastic", {}),
        "fixed_period_eager": ("eager", {}),
        "never_eager": ("eager", {"compress_period": 1000}),
    }
    more = {"max_num_batched_tokens": 4096, "max_model_len": 512, "enable_prefix_caching": False}
    own: dict[str, Any] = {"compilation_config": None}  # the worker captures its own graphs
    model = llada(options, _layers())
    with _started(options, result, starts, model, **more, **own) as engines:
        asks = {name: ask for name, ask in asks.items() if ask[0] in engines}
        for batch, canvas in ((1, 32),) if options.smoke else ((1, 128), (8, 32)):

            def measure(name: str, batch: int = batch, canvas: int = canvas) -> float:
                served, extra = asks[name]
                shapes = [(128, canvas)] * batch
                seen = engines[served].ask("denoise", shapes=shapes, seed=options.seed, extra=extra)
                return seen["tokens_per_s"]

            rates = alternate(list(asks), options.rounds, measure, f"denoise {batch}")
            result.note(f"denoise_tokens_per_s_b{batch}", rates)
            for name in asks:
                result.ratio(f"{name}_ratio_b{batch}", rates[name], rates["full"])
                if (eager := f"{name}_eager") in rates:
                    result.ratio(f"{name}_graphs_ratio_b{batch}", rates[name], rates[eager])


def defaults(options: Options, result: Result) -> None:
    """Fill keep1_default_decode_ratio_bB: both engines with all of vLLM's defaults."""
    starts: Starts = {
        "stock": partial(KVEngine, plugin=False),
        "keep1": partial(KVEngine, **policy("snap_kv", keep=1)),
    }
    model = llama(options, min(8, _layers()))
    graphs: dict[str, Any] = {"compilation_config": None}
    _time(options, result, starts, model, "_default", **graphs)


def _time(
    options: Options, result: Result, starts: Starts, model: Path, suffix: str, **more: Any
) -> None:
    decodes = ((1, 60, 8), (4, 60, 8)) if options.smoke else DECODES
    tokens = max(batch * (prompt + new + 64) for batch, prompt, new in decodes)
    layers, most = (2, 512) if options.smoke else (_layers(), 8704)
    engine = {
        "max_model_len": most,
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": max(tokens, most) * layers * 4096 + (1 << 26),
        "enable_prefix_caching": False,
    }
    with _started(options, result, starts, model, **engine, **more) as engines:
        for batch, prompt, new in decodes:
            ask = {"batch": batch, "prompt": prompt, "tokens": new, "seed": options.seed}
            speed = alternate(
                list(engines),
                options.rounds,
                lambda name, ask=ask: engines[name].ask("decode", **ask),  # type: ignore[misc]
                f"decode {batch}",
            )
            result.note(f"tokens_per_s{suffix}_b{batch}", speed)
            for name in engines.keys() - {"stock"}:
                result.ratio(f"{name}{suffix}_decode_ratio_b{batch}", speed[name], speed["stock"])
        prompt = 256 if options.smoke else 8192
        speed = alternate(
            list(engines),
            options.rounds,
            lambda name: engines[name].ask("prefill", tokens=prompt, seed=options.seed),
            "prefill",
        )
        result.note(f"prefill_tokens_per_s{suffix}", speed)
        for name in engines.keys() - {"stock"}:
            result.ratio(f"{name}{suffix}_prefill_ratio", speed[name], speed["stock"])


@contextmanager
def _started(
    options: Options, result: Result, starts: Starts, model: Path, **arguments: Any
) -> Iterator[dict[str, Engine]]:
    """Start engines side by side. One that does not start is noted, and the others go on."""
    base: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "gpu_memory_utilization": 0.1,
        "enforce_eager": not _cuda(),
        "enable_prefix_caching": True,
        "compilation_config": {**_GRAPHS, "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]},
    }
    if not _cuda():
        base.pop("compilation_config")
        arguments.pop("compilation_config", None)
        base |= {"kv_cache_memory_bytes": 1 << 26, "max_model_len": 512}
    given = {name: value for name, value in (base | arguments).items() if value is not None}
    with ExitStack() as stack, ThreadPoolExecutor(1 if options.smoke else 8) as threads:
        begun = {
            name: threads.submit(
                start.func, model, **(given | start.keywords), preloaded=options.smoke
            )
            for name, start in starts.items()
        }
        engines = {}
        for name, future in begun.items():
            try:
                engines[name] = stack.enter_context(future.result())
                result.note(f"{name}_started", engines[name].started)
            except EngineFailed as error:
                result.missing(f"{name}_engine", last_line(str(error)))
                result.note(f"{name}_log", str(error)[-1500:])
        yield engines


def _sensitive(options: Options) -> Path:
    return random_llama(SENSITIVE_TINY if options.smoke else SENSITIVE, options)


def _same(ours: list[list[int]], base: list[list[int]]) -> float:
    """The share of requests with the same tokens."""
    return sum(a == b for a, b in zip(ours, base, strict=True)) / len(base)


def _cuda() -> bool:
    return torch.cuda.is_available()


def _layers() -> int:
    """All 32 layers of an 8B model, or 16 where the engines of a part would not fit."""
    if not _cuda():
        return 2
    return 32 if torch.cuda.get_device_properties(0).total_memory > _LARGE else 16
