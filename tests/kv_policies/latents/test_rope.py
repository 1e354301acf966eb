# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from kv_policies.latents.rope import Rope


def table(positions: int, width: int) -> torch.Tensor:
    angles = torch.arange(positions)[:, None] * 100.0 ** -(torch.arange(0, width, 2) / width)
    return torch.cat((angles.cos(), angles.sin()), -1)


@pytest.mark.parametrize("neox", [True, False])
def test_pairs_are_rotated_by_their_angle_and_back(neox: bool) -> None:
    rope, positions = Rope(table(50, 8), neox), torch.randint(50, (20,))
    x = torch.randn(20, 3, 12)
    turned = rope.rotate(x.clone(), positions)
    first, second = (x[..., :4], x[..., 4:8]) if neox else (x[..., :8:2], x[..., 1:8:2])
    angles = positions[:, None] * 100.0 ** -(torch.arange(0, 8, 2) / 8)
    want = torch.complex(first, second) * torch.exp(1j * angles)[:, None]
    got = (turned[..., :4], turned[..., 4:8]) if neox else (turned[..., :8:2], turned[..., 1:8:2])
    torch.testing.assert_close(torch.complex(*got), want)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    torch.testing.assert_close(rope.unrotate(turned, positions), x)
