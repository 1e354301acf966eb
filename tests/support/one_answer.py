# SPDX-License-Identifier: Apache-2.0
"""What doctor, plan, config edge and worker say to models, in a process of its own.

``ask(cases)`` is the caller's side. A case is a family of ``benchmarks.architectures`` and engine
arguments; the answer is what each of the four says, None for "accepted". The worker is only asked
where the config edge accepts: it loads random weights and describes its KV cache. It is not asked
of models with images or sound, because it wants a processor's files. The answer is
``{"unavailable": why}`` where vLLM lacks a package that the family needs.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.architectures import FAMILIES, OTHERS, write_config
from tests.support.child import SINGLE_PROCESS, in_child

ENGINE = {
    "enforce_eager": True,
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_model_len": 512,
    "kv_cache_memory_bytes": 1 << 24,
}


def ask(
    cases: list[tuple[str, dict[str, Any]]], timeout: float = 550
) -> list[dict[str, str | None]]:
    """The answers of all four to cases of (family, engine arguments)."""
    environment = os.environ | SINGLE_PROCESS | {"OMP_NUM_THREADS": "1"}
    environment["VLLM_LOGGING_LEVEL"] = "ERROR"
    return in_child(_ask_all, cases, env=environment, timeout=timeout)


def _ask_all(cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, str | None]]:
    root = Path(tempfile.mkdtemp())
    return [
        _ask(family, root / str(number), engine) for number, (family, engine) in enumerate(cases)
    ]


def _ask(family: str, folder: Path, engine: dict[str, Any]) -> dict[str, str | None]:
    from benchmarks.answers import UNAVAILABLE, answers, text

    kind = (FAMILIES | OTHERS)[family]
    said, config = answers(write_config(family, folder), kind.architecture, ENGINE | engine)
    if UNAVAILABLE not in said:
        said["worker"] = None
    try:
        if config is not None and kind.encoder is None:
            _start_worker(config)
    except Exception as error:
        said["worker"] = text(error)
    return said


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
