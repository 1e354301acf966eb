# SPDX-License-Identifier: Apache-2.0
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from quant_methods.formats.packing import (
    from_awq,
    from_compressed_tensors,
    pack,
    to_awq,
    to_compressed_tensors,
    unpack,
)
from quant_methods.grid import PER_CHANNEL, Grid, quantize


def reference(codes: list[int], bits: int) -> list[int]:
    """The words of one row, by one long integer: the first code has the lowest bits."""
    stream = sum(code << bits * place for place, code in enumerate(codes))
    words = -(-len(codes) * bits // 32)
    unsigned = [stream >> 32 * word & 0xFFFFFFFF for word in range(words)]
    return [word - (1 << 32 if word >> 31 else 0) for word in unsigned]


@given(st.integers(2, 8), st.integers(1, 70), st.sampled_from([0, 1]), st.integers(0, 1000))
@settings(deadline=None, max_examples=80)
def test_words_are_dense_and_give_the_codes_back(
    bits: int, size: int, packed_dim: Literal[0, 1], seed: int
) -> None:
    """vLLM takes ceil(K * bits / 32) words; compressed-tensors 0.17 writes more of odd widths."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (3, size), dtype=torch.uint8, generator=generator)
    expected = torch.tensor([reference(row.tolist(), bits) for row in codes], dtype=torch.int32)
    words = pack(codes if packed_dim == 1 else codes.t(), packed_dim, bits)
    assert torch.equal(words if packed_dim == 1 else words.t(), expected)
    back = unpack(words, packed_dim, bits, size)
    assert torch.equal(back if packed_dim == 1 else back.t(), codes)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_no_bit_becomes_a_number(bits: int) -> None:
    """Codes of an 8B model's down_proj take 58 MB. They must not take gigabytes on the way."""
    codes = torch.randint(0, 1 << bits, (16, 4096), dtype=torch.uint8)
    with Largest() as packing:
        words = pack(codes, bits=bits)
    with Largest() as unpacking:
        unpack(words, bits=bits, size=4096)
    assert max(packing.size, unpacking.size) <= 4 * codes.numel()


@pytest.mark.parametrize("bits", [3, 4])
def test_too_few_words_are_no_zeros(bits: int) -> None:
    words = pack(torch.ones(2, 32, dtype=torch.uint8), bits=bits)
    with pytest.raises(ValueError, match="have no 32 codes"):
        unpack(words[:, :-1], bits=bits, size=32)


GRIDS = [Grid(32, symmetric, bits) for symmetric in (True, False) for bits in range(2, 9)]
GRIDS += [Grid(PER_CHANNEL, True, 8, "int8"), Grid(PER_CHANNEL, False, 4)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_round_trip(grid: Grid) -> None:
    weight = quantize(torch.randn(64, 96, generator=torch.Generator().manual_seed(1)), grid)
    layouts = [(to_compressed_tensors, from_compressed_tensors)]
    if grid.bits == 4 and grid.group_size == 32:
        layouts.append((to_awq, from_awq))
    for write, read in layouts:
        back = read(write(weight, torch.float32), grid)
        assert torch.equal(back.q, weight.q)
        assert torch.equal(back.scale, weight.scale)
        assert torch.equal(back.zero, weight.zero)


def test_awq_agrees_with_vllm() -> None:
    from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack

    weight = quantize(torch.randn(32, 64), Grid(32))
    ours = to_awq(weight)["qweight"]
    assert torch.equal(ours, awq_pack(weight.q.t().int().contiguous(), 4, 64, 32))


def test_shapes() -> None:
    tensors = to_compressed_tensors(quantize(torch.randn(64, 96), Grid(32)))
    assert tensors["weight_packed"].shape == (64, 12)
    assert tensors["weight_scale"].shape == (64, 3)
    assert tensors["weight_zero_point"].shape == (8, 3)
    assert tensors["weight_shape"].tolist() == [64, 96]
    assert "weight_zero_point" not in to_compressed_tensors(
        quantize(torch.randn(64, 96), Grid(32, symmetric=True))
    )
    tensors = to_compressed_tensors(quantize(torch.randn(64, 96), Grid(32, bits=3)))
    assert tensors["weight_packed"].shape == (64, 9)
    assert tensors["weight_zero_point"].shape == (6, 3)
