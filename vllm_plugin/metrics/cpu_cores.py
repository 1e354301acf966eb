# SPDX-License-Identifier: Apache-2.0
"""Cores that vLLM leaves idle on a CPU for a KV connector. Ours moves no cache and needs none."""

import os

from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import CpuArchEnum, current_platform

logger = init_logger(f"vllm.{__name__}")

NAME = "VLLM_CPU_NUM_OF_RESERVED_CPU"
# Where vLLM leaves a core to each rank rather than to all.
_PER_RANK = (CpuArchEnum.X86, CpuArchEnum.ARM, CpuArchEnum.RISCV)
_chosen: str | None = None  # our value of NAME; None: it is not ours


def reserve_as_stock(config: VllmConfig) -> None:
    """Have an engine with our connector compute on as many cores as one without.

    vLLM reads the variable when it binds the threads of the workers, in a process that it starts. A
    variable of the user's stays.
    """
    global _chosen
    if not current_platform.is_cpu() or envs.VLLM_CPU_OMP_THREADS_BIND != "auto":
        return
    if NAME in os.environ:
        return
    per_rank = current_platform.get_cpu_architecture() in _PER_RANK
    _chosen = str(config.parallel_config.local_world_size if per_rank else 1)
    os.environ[NAME] = _chosen
    logger.info(
        "vLLM leaves a core idle for a KV connector. The one that reports our figures moves no "
        "cache, so %s=%s, as without it; vLLM warns that this is too few, which is no concern.",
        NAME,
        _chosen,
    )


def restore() -> None:
    """Undo it: the next engine of this process may have no connector, or more ranks."""
    global _chosen
    if _chosen is not None and os.environ.get(NAME) == _chosen:
        del os.environ[NAME]
    _chosen = None
