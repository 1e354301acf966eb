# SPDX-License-Identifier: Apache-2.0
"""What doctor, plan, config edge and worker say to models, in a process of its own.

``ask(cases)`` is the caller's side. A case is a family of ``architectures`` and engine arguments;
the answer is what each of the four says, None for "accepted". The worker is only asked where the
config edge accepts: it loads random weights and describes its KV cache. It is not asked of models
with images or sound, because it wants a processor's files. The answer is ``{"unavailable": why}``
where vLLM lacks a package that the family needs.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.architectures import CACHES, DENSE, FAMILIES, write
from tests.support.child import SINGLE_PROCESS, in_child

ALL = FAMILIES | DENSE | CACHES
Answers = dict[str, str | None]


def ask(cases: list[tuple[str, dict[str, Any]]], timeout: float = 550) -> list[dict[str, Any]]:
    """The answers of all four to cases of (family, engine arguments)."""
    environment = os.environ | SINGLE_PROCESS | {"OMP_NUM_THREADS": "1"}
    environment["VLLM_LOGGING_LEVEL"] = "ERROR"
    return in_child(_ask_all, cases, env=environment, timeout=timeout)


def _ask_all(cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    import vllm_plugin

    vllm_plugin.register()
    root = Path(tempfile.mkdtemp())
    answers = []
    for number, (family, engine) in enumerate(cases):
        try:
            _load_in_this_process(ALL[family][1])
        except ImportError as error:
            answers.append({"unavailable": str(error)})
            continue
        folder = write(family, root / str(number))
        with contextlib.redirect_stdout(io.StringIO()):
            answers.append(_ask(folder, engine, worker=ALL[family][3] is None))
    return answers


def _ask(folder: Path, engine: dict[str, Any], worker: bool) -> Answers:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_plugin.commands.checks import model_checks

    def args() -> EngineArgs:
        return EngineArgs(
            model=str(folder),
            enforce_eager=True,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=512,
            kv_cache_memory_bytes=1 << 24,
            **engine,
        )

    said: Answers = {"doctor": None, "plan": _plan(folder, engine), "edge": None, "worker": None}
    wrong = [check for check in model_checks(args()) if check.status == "problem"]
    said["doctor"] = "; ".join(check.found for check in wrong) or None
    try:
        config = args().create_engine_config()
    except Exception as error:
        said["edge"] = _text(error)
        return said
    try:
        if worker:
            _start_worker(config)
    except Exception as error:
        said["worker"] = _text(error)
    return said


def _plan(folder: Path, engine: dict[str, Any]) -> str | None:
    from vllm_plugin.cli import main

    sys.argv = ["vllm-compress", "plan", str(folder), "--gpu-memory", "1GiB", "--context", "512"]
    sys.argv += ["--activation-memory", "0B", "--block-size", "32"]
    if method := engine.get("quantization"):
        sys.argv += ["--quantization", method]
    sys.argv += ["--additional-config", json.dumps(engine.get("additional_config", {}))]
    printed = io.StringIO()
    from vllm_plugin.commands import common

    common.err.file = printed
    try:
        main()
    except SystemExit as stopped:
        return printed.getvalue() if stopped.code else None
    except Exception as error:
        return _text(error)
    return None


def _start_worker(config: Any) -> None:
    """Load random weights and describe the KV cache, as an engine does before its first request."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.utils.network_utils import get_distributed_init_method, get_open_port

    kind = resolve_obj_by_qualname(config.parallel_config.worker_cls)
    address = get_distributed_init_method("127.0.0.1", get_open_port())
    try:
        with set_current_vllm_config(config):
            worker = kind(config, 0, 0, address, is_driver_worker=True)
            worker.init_device()
            worker.load_model()
            settled = config.cache_config.block_size
            current_platform.update_block_size_for_backend(config)  # as an executor does
            assert config.cache_config.block_size == settled, "the config edge saw other blocks"
            assert worker.get_kv_cache_spec()
    finally:  # groups of ranks are made for the kind of model that comes first
        cleanup_dist_env_and_memory()


def _load_in_this_process(architecture: str) -> None:
    """Have vLLM know a model by its class; by its name, it would start a process to look at it."""
    from vllm import ModelRegistry

    known = ModelRegistry.models[architecture]
    ModelRegistry.register_model(architecture, known.load_model_cls())


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
