# SPDX-License-Identifier: Apache-2.0
"""What int4 weights hold in memory, and what quantizing costs when a server starts."""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Options, Result, alternate, cache_folder
from benchmarks.engine import Engine
from benchmarks.random_models import TINY, bench_model, random_llama, write_rtn
from vllm_plugin.demo_model import demo_model_path


def memory(options: Options, result: Result) -> None:
    """Fill weight_bytes_ratio, resident_ratio and resident_ratio_at_load (1.1B random Llama)."""
    from compress_common.checkpoints.checkpoint import Checkpoint

    model = bench_model(options)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        int4 = write_rtn(model, Path(scratch) / "int4", options)
        sizes = {
            name: sum(size for _, size in Checkpoint(folder).shapes().values())
            for name, folder in (("bf16", model), ("int4", int4))
        }
        result.put("weight_bytes_ratio", sizes["int4"] / sizes["bf16"], **sizes)

        contenders: dict[str, tuple[Path, dict[str, Any]]] = {
            "bf16": (model, {"plugin": False}),
            "written": (int4, {}),
            "at load": (model, {"quantization": "rtn"}),
        }

        def start(name: str) -> float:
            folder, arguments = contenders[name]
            arguments = {"skip_tokenizer_init": True, "preloaded": options.smoke} | arguments
            with Engine(folder, **arguments) as engine:
                result.details[f"memory_engine_{name}"] = engine.started
                return engine.started["resident_bytes"]

        held = alternate(list(contenders), options.rounds, start, "memory", warm_up=0)
    result.details["resident_bytes"] = held
    result.ratio("resident_ratio", held["written"], held["bf16"])
    result.ratio("resident_ratio_at_load", held["at load"], held["bf16"])


def load(options: Options, result: Result) -> None:
    """Fill calibrate_pack_cpu_s and second_start_extra_s (demo model, default settings).

    Each first start has an empty plan cache of its own; second starts share one that is warm.
    """
    model = random_llama(TINY, options) if options.smoke else demo_model_path()
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        caches = Path(scratch)

        def start(name: str) -> dict[str, float]:
            arguments: dict[str, Any] = {"plugin": False}
            if name != "stock":
                cache = caches / "warm"
                if name == "first":
                    cache = caches / str(len(list(caches.iterdir())))
                    cache.mkdir()
                arguments = {
                    "quantization": "smoothquant_plus",
                    "env": {"VLLM_COMPRESS_CACHE": str(cache)},
                }
            with Engine(model, preloaded=options.smoke, **arguments) as engine:
                return {what: engine.started[what] for what in ("cpu_s", "wall_s")}

        start("second")  # fills the plan cache of all second starts, and the system's file cache
        names = ["stock", "first", "second"]
        starts = alternate(names, options.rounds, start, "load", warm_up=0)

    def extra(name: str, what: str) -> list[float]:
        pairs = zip(starts[name], starts["stock"], strict=True)
        return [one[what] - stock[what] for one, stock in pairs]

    result.details["load_starts"] = starts
    result.median("calibrate_pack_cpu_s", extra("first", "cpu_s"))
    result.median("second_start_extra_s", extra("second", "wall_s"))
    result.median("first_start_extra_s", extra("first", "wall_s"))
    result.median("second_start_extra_cpu_s", extra("second", "cpu_s"))
