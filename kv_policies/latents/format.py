# SPDX-License-Identifier: Apache-2.0
"""How the latents of many tokens lie in one block of the cache, in 16 bits or in 4."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Literal

import torch

Bits = Literal[4, 16]

BLOCK = 32  # tokens; latents that fill such a block fill those of 64, 128, ... too
GROUP = 32  # tokens that share a key channel's scale, as in CSKV
_ROWS = 16  # tokens that are written at once in 16 bits
_MOST = 15
_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class LatentFormat:
    """Latents of consecutive tokens in a block, from its start.

    Attributes:
        key_rank: Numbers per token for its key.
        value_rank: Numbers per token for its value.
        bits: 16: as they are, in the cache's own dtype, keys [tokens, key_rank], then values
            [tokens, value_rank]. 4: see ``_quantized``.
        tokens: Of a full block.

    CSKV quantizes keys per channel in groups of tokens and values per token
    (https://arxiv.org/abs/2409.10593). The zero is a float here: the integer of the published code
    clips groups that do not straddle zero.
    """

    key_rank: int
    value_rank: int
    bits: Bits
    tokens: int

    @property
    def unit(self) -> int:
        """Tokens that are written at once, a whole number of them to a block."""
        return _ROWS if self.bits == 16 else GROUP

    @classmethod
    def most_tokens(cls, elements: int, key_rank: int, value_rank: int, bits: Bits) -> int:
        """Tokens that fit in a block of ``elements`` numbers of 16 bits, whole units; 0: none."""
        unit = cls(key_rank, value_rank, bits, 0).unit
        each = cls.token_bytes(key_rank, value_rank, bits)
        return int(2 * elements / each) // unit * unit

    @classmethod
    def token_bytes(cls, key_rank: int, value_rank: int, bits: Bits) -> Fraction:
        """Bytes of a token in a cache of 16 bits, with its part of the scales."""
        return Fraction(cls(key_rank, value_rank, bits, GROUP).bytes(2), GROUP)

    def bytes(self, itemsize: int) -> int:
        """Bytes of a full block's content, scales included; itemsize: of the cache's dtype."""
        if self.bits == 16:
            return self.tokens * (self.key_rank + self.value_rank) * itemsize
        return self._regions()[-1][1]

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, ...]:
        """What ``write`` puts into a cache of ``dtype``.

        Args:
            keys: Latents of keys, [M, unit, key_rank].
            values: Latents of values, [M, unit, value_rank].
            dtype: Of the cache.

        Returns:
            The parts of a block, [M, size of the part in a unit] each, in the cache's dtype for 16
            bits and as bytes for 4.
        """
        if self.bits == 16:
            return keys.to(dtype).flatten(1), values.to(dtype).flatten(1)
        parts = self._quantized(keys.float(), values.float())
        return tuple(part.contiguous().flatten(1).view(torch.uint8) for part in parts)

    def write(
        self,
        cache: torch.Tensor,
        blocks: torch.Tensor,
        units: torch.Tensor,
        content: Sequence[torch.Tensor],
    ) -> None:
        """Put units of latents into their blocks; the rest of a block stays as it is.

        Args:
            cache: [blocks, elements].
            blocks: Block of each unit, int64 [M].
            units: Where it goes in the block, int64 [M].
            content: As ``encode`` returns it.
        """
        cache = cache if self.bits == 16 else cache.view(torch.uint8)
        for (first, stop), part in zip(self._regions(), content, strict=True):
            place = cache[:, first:stop].unflatten(1, (self.tokens // self.unit, -1))
            place[blocks, units] = part

    def read(self, cache: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of keys and of values, [M, tokens, rank] in the cache's dtype; blocks int [M]."""
        if self.bits == 16:
            keys, values = (cache[:, a:b].index_select(0, blocks) for a, b in self._regions())
        else:
            raw = cache.view(torch.uint8).index_select(0, blocks)
            kc, vc, ks, kz, vs, vz = (raw[:, a:b].contiguous() for a, b in self._regions())
            half = {"dtype": torch.float16}
            keys = _codes(kc, self.key_rank).to(cache.dtype)
            keys.mul_(ks.view(**half).view(len(raw), -1, 1, self.key_rank))
            keys.add_(kz.view(**half).view(len(raw), -1, 1, self.key_rank))
            values = _codes(vc, self.value_rank).to(cache.dtype)
            values.mul_(vs.view(**half).view(len(raw), -1, GROUP, 1))
            values.add_(vz.view(**half).view(len(raw), -1, GROUP, 1))
        shape = len(blocks), self.tokens, -1
        return keys.reshape(shape), values.reshape(shape)

    def _quantized(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Codes of keys and of values, uint8 [M, tokens / 2, rank], then float16: scales and zeros
        of keys [M, tokens / GROUP, key_rank] each, of values [M, tokens] each.

        In each group, row i holds token i in its low and token i + GROUP / 2 in its high bits.
        """
        keys = keys.unflatten(1, (-1, GROUP))
        key_codes, *of_keys = _round(keys, dim=2)
        value_codes, *of_values = _round(values.unflatten(1, (-1, GROUP)), dim=3)
        packed = [
            codes[:, :, : GROUP // 2] | codes[:, :, GROUP // 2 :] << 4
            for codes in (key_codes, value_codes)
        ]
        return (*packed, *of_keys, *of_values)

    def _regions(self) -> list[tuple[int, int]]:
        """Where each part lies in a block: keys and values in elements of the cache, or the six of
        ``_quantized`` in bytes."""
        if self.bits == 16:
            sizes = [self.tokens * self.key_rank, self.tokens * self.value_rank]
        else:
            groups, half = self.tokens // GROUP, self.tokens // 2
            sizes = [half * self.key_rank, half * self.value_rank]
            sizes += [2 * groups * self.key_rank] * 2 + [2 * self.tokens] * 2
        ends = list(accumulate(sizes))
        return list(zip([0, *ends], ends, strict=False))


def rounded(latents: torch.Tensor, dim: int) -> torch.Tensor:
    """Latents as a cache of 4 bits returns them, in float32.

    Args:
        latents: Groups of them, [M, GROUP, rank].
        dim: 1 for keys, whose channels have a scale each; 2 for values, whose tokens have.
    """
    codes, scale, zero = _round(latents.float(), dim)
    return codes.float() * scale.float() + zero.float()


def _round(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes 0 to 15, uint8, of x over its range along ``dim``, with the float16 scale and zero."""
    least, most = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    zero = least.clamp(-_LARGEST, _LARGEST).half()
    scale = ((most - least) / _MOST).clamp(max=_LARGEST).half()
    # Divided by what readers multiply with, which a small range rounds to few bits of a float16.
    step = scale.float()
    codes = ((x - zero.float()) / step.where(step > 0, 1)).round()
    return codes.clamp(0, _MOST).to(torch.uint8), scale, zero


def _codes(packed: torch.Tensor, rank: int) -> torch.Tensor:
    """uint8 [M, bytes] to [M, groups, GROUP, rank]."""
    rows = packed.view(len(packed), -1, GROUP // 2, rank)
    return torch.cat((rows & _MOST, rows >> 4), dim=2)
