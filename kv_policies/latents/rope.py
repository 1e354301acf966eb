# SPDX-License-Identifier: Apache-2.0
"""Rotary positions, put on keys and taken off again."""

import torch


class Rope:
    """Rotates pairs of channels by the angles of a table.

    RoFormer, Su et al. 2021 (https://arxiv.org/abs/2104.09864).

    Limits: Rotations must depend on the position alone. Tables that also scale cannot be undone.

    Args:
        table: [positions, rotary_dim], cosines then sines, as vLLM's ``cos_sin_cache``. Channels
            from rotary_dim on are left alone.
        neox: Pairs are (i, i + rotary_dim / 2); False: (2i, 2i + 1).
    """

    def __init__(self, table: torch.Tensor, neox: bool = True) -> None:
        self.table, self.neox = table, neox

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [M, H, D] at positions int64 [M]. May write over x."""
        return self._turn(x, positions, 1)

    def unrotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The inverse, in new memory."""
        return self._turn(x, positions, -1)

    def halves(self, size: int) -> torch.Tensor:
        """The order of a head's channels, int64 [size], that puts pairs where neox has them."""
        channels = torch.arange(size)
        if self.neox:
            return channels
        turned = channels[: self.table.shape[1]]
        return torch.cat((turned[::2], turned[1::2], channels[len(turned) :]))

    def _turn(self, x: torch.Tensor, positions: torch.Tensor, sign: int) -> torch.Tensor:
        cos, sin = self.table[positions].to(x.dtype)[:, None].chunk(2, dim=-1)
        width = self.table.shape[1]
        turned, rest = x[..., :width], x[..., width:]
        sin = sin * sign
        if self.neox:
            a, b = turned.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)
        a, b = turned[..., ::2], turned[..., 1::2]
        pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        return torch.cat((pairs, rest), dim=-1)
