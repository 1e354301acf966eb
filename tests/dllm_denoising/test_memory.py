# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_denoising import memory
from dllm_denoising.commit import gumbel, predict
from dllm_denoising.drift import Over, attention_mass, cosines, probabilities
from dllm_denoising.memory import StepMemory, groups, parts
from tests.support.peak import Peak

LLADA = StepMemory(126464, 4096, 2, 32, 32, 128)


@given(st.lists(st.integers(0, 30), max_size=8), st.integers(1, 40))
def test_parts_have_every_row_once_in_order(counts: list[int], most: int) -> None:
    found = list(parts(counts, most))
    sizes = [sum(count for _, count in part) for part in found]
    assert all(size == most for size in sizes[:-1]) and all(0 < size <= most for size in sizes)
    rows = [owner for part in found for owner, count in part for _ in range(count)]
    assert rows == [owner for owner, count in enumerate(counts) for _ in range(count)]


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(1, 200))
def test_groups_have_every_request_once_and_fit(lengths: list[int], room: int) -> None:
    found = list(groups(lengths, lambda length: max(1, room // length)))
    assert [i for group in found for i in range(len(lengths))[group]] == list(range(len(lengths)))
    for group in found:
        mine = lengths[group]
        assert len(mine) == 1 or len(mine) * max(mine) <= room


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_predicted_row_takes_no_more_than_stated(dtype: torch.dtype, sampled: bool) -> None:
    rows, vocabulary = 7, 5000
    stated = StepMemory(vocabulary, 16, dtype.itemsize, 1, 1, 16).predicted_row * rows
    hidden = torch.zeros(rows, 16, dtype=dtype)
    head = torch.zeros(16, vocabulary, dtype=dtype)
    with Peak() as peak:
        logits = hidden @ head
        noise = None
        if sampled:
            noise = gumbel((rows, vocabulary), 1.0, torch.Generator().manual_seed(0))
        predict(logits, 0, noise)
    assert stated / 3 < peak.most < stated * 1.01


@pytest.mark.parametrize("over", ["row", "heads"])
def test_watched_rows_take_no_more_than_stated(over: Over) -> None:
    rows, length = 6, 900
    sizes = StepMemory(10, 64, 2, 4, 2, 16)
    queries, keys = torch.randn(1, 4, rows, 16), torch.randn(1, 2, length, 16)
    there, all_rows = torch.ones(1, length, dtype=torch.bool), torch.ones(1, rows, dtype=torch.bool)
    with Peak() as peak:
        past = probabilities(queries, keys, 0.25, there)
        current = probabilities(queries, keys, 0.25, there)
        cosines(past, current, all_rows, there, over)
        attention_mass(current, all_rows)
    stated = sizes.watched_row(length) * rows
    assert stated / 3 < peak.most < stated * 1.02


def test_no_request_makes_a_step_take_more() -> None:
    """LLaDA-8B with 4,096 tokens: float64 logits of one block of 4,096 rows were 4 GB a copy."""
    one, many = (
        LLADA.most(rows, requests, 4096, watches=True)
        for rows, requests in ((4096, 1), (65536, 256))
    )
    assert one <= many <= 512 << 20
    assert LLADA.predicted_rows > 100  # or the head would be read too often


def test_small_models_set_little_aside() -> None:
    small = StepMemory(64, 128, 4, 4, 4, 32)
    assert small.most(2048, 16, 256, watches=False) == small.predicted_row * 2048 < 4 << 20


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 2**15), st.integers(1, 64))
def test_parts_of_any_size_fit_what_is_set_aside(
    heads: int, requests: int, length: int, head_size: int
) -> None:
    sizes = StepMemory(1000, 64, 2, heads, heads, head_size)
    most = sizes.most(length * requests, requests, length, watches=True)
    together = min(requests, sizes.watched_requests(length))
    rows = min(length, sizes.watched_rows(together, length))
    keys = sizes.watched_key * length * together
    assert keys + sizes.watched_row(length) * together * rows <= most
    assert min(length, sizes.predicted_rows) * sizes.predicted_row <= most
    assert sizes.predicted_rows * sizes.predicted_row <= max(memory.LOGITS, sizes.predicted_row)
