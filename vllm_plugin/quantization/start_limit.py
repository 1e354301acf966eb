# SPDX-License-Identifier: Apache-2.0
"""How long vLLM's front end waits for an engine that calibrates at its start.

Read in vLLM 0.32. One Python API server starts its engines itself and waits for them without a
limit (``wait_for_engine_startup``), also under Ray. Several API servers, and the Rust front end,
start beside the engines and give them up after ``VLLM_ENGINE_READY_TIMEOUT_S``
(``MPClient.__init__``).
"""

import json
import shlex
import time
from pathlib import Path

import psutil
from vllm import envs
from vllm.config import ParallelConfig, VllmConfig

from quant_methods.plan_request import PlanRequest
from quant_methods.time_limit import TimeLimit

_SHARE = 0.9  # of the limit for calibration; the rest is for the load of the quantized model


def start_limit(vllm_config: VllmConfig, request: PlanRequest) -> TimeLimit | None:
    """Return how long a calibration may take; None: as long as it likes."""
    if not has_limit(vllm_config.parallel_config, envs.VLLM_USE_RUST_FRONTEND):
        return None
    elapsed = time.time() - psutil.Process().create_time()
    seconds = envs.VLLM_ENGINE_READY_TIMEOUT_S
    name = Path(vllm_config.model_config.model).name
    command = quantize_command(vllm_config.model_config.model, request, f"{name}-quantized")
    return TimeLimit(
        _SHARE * seconds - elapsed,
        f"quantize the model first with `{command}` and serve {name}-quantized, which needs no "
        "calibration, or raise VLLM_ENGINE_READY_TIMEOUT_S, which several API servers and the Rust "
        f"front end wait for an engine (now {seconds} s), or start with --api-server-count 1",
    )


def has_limit(parallel: ParallelConfig, rust_front_end: bool) -> bool:
    """Whether the front end gives an engine up that is not ready in time."""
    return rust_front_end or parallel._api_process_count > 1


def quantize_command(model: str, request: PlanRequest, target: str) -> str:
    """Return the shell command that calibrates as a request does, without a limit of time."""
    given = request.calibration
    words = ["vllm-compress", "quantize", model, "--out", target, "--method", request.method]
    for name, value in request.settings.items():
        if name == "tensor_parallel":
            words += ["--tensor-parallel-size", str(value)]
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            words += ["--set", f"{name}={text}"]
    words += ["--calibration", given.source, "--samples", str(given.samples)]
    words += ["--length", str(given.length)]
    if given.seed:
        words += ["--seed", str(given.seed)]
    return shlex.join(words)
