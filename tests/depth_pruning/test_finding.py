# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given
from hypothesis import strategies as st

from depth_pruning.finding import parts
from depth_pruning.request import PARTS


@given(st.integers(PARTS, 200))
def test_no_sample_is_fitted_to_and_judges(samples: int) -> None:
    cut = parts(torch.arange(samples)[:, None])
    assert sorted(int(sample) for part in cut for sample in part) == list(range(samples))
    fitted, choosing, judging = map(len, cut)
    assert judging == samples // PARTS
    assert judging <= choosing <= judging + 1
    assert fitted >= 3 * (choosing + judging) - PARTS
