# SPDX-License-Identifier: Apache-2.0
import torch

from depth_pruning.residual import _error


def test_rounding_of_large_states_is_no_error_and_another_sum_is() -> None:
    """A few tokens have states that are hundreds of times larger than what a block adds."""
    random = torch.Generator().manual_seed(0)
    before = torch.randn(1, 16, 64, generator=random).bfloat16()
    before[0, 0, 3] = 3000.0
    added = 0.5 * torch.randn(16, 64, generator=random)
    after = (before.float() + added[None] * 1.001).bfloat16()
    change = after.float() - before.float()
    assert (added - change[0]).norm() / change.norm() > 0.02
    assert _error(before, after, added) < 0.02
    assert _error(before, after, 0.9 * added) > 0.02
    assert _error(before.float(), after.float(), added) > 0.02
