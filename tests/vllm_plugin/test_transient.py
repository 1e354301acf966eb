# SPDX-License-Identifier: Apache-2.0
"""How much memory is left for the KV cache beside what a step of ours takes."""

from types import SimpleNamespace

import pytest

from compress_common.errors import CompressError
from vllm_plugin.transient import left_for_cache, reserve

GIB, FLAGS = 1 << 30, "--max-model-len"


def test_a_measured_cache_gives_up_what_a_step_needs() -> None:
    assert left_for_cache(5 * GIB, 2 * GIB, "denoising", FLAGS, None, 0) == 3 * GIB


def test_a_fixed_cache_keeps_its_size_where_both_fit() -> None:
    assert left_for_cache(4 * GIB, 2 * GIB, "denoising", FLAGS, 4 * GIB, 6 * GIB) == 4 * GIB


@pytest.mark.parametrize(
    ("available", "needed", "fixed", "free", "told"),
    [
        (2, 2, None, 0, "denoising needs 2.0 GiB of memory, of the 2.0 GiB"),
        (2, 2, None, 0, "lower --max-model-len$"),
        (4, 3, 4, 6, "--kv-cache-memory-bytes .* or --max-model-len$"),
    ],
)
def test_what_does_not_fit_is_refused(
    available: int, needed: int, fixed: int | None, free: int, told: str
) -> None:
    fixed = fixed and fixed * GIB
    with pytest.raises(CompressError, match=told):
        left_for_cache(available * GIB, needed * GIB, "denoising", FLAGS, fixed, free * GIB)


def test_a_startup_plan_is_no_size_that_an_operator_fixed() -> None:
    """vLLM applies its plan while it measures, and the plan does not know of us."""
    worker = SimpleNamespace(cache_config=SimpleNamespace(kv_cache_memory_bytes=None))

    def measure() -> int:
        worker.cache_config.kv_cache_memory_bytes = 5 * GIB
        return 5 * GIB

    assert reserve(worker, measure, 2 * GIB, "denoising", FLAGS) == 3 * GIB
