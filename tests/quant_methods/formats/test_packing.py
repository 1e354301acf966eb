# SPDX-License-Identifier: Apache-2.0
from typing import Literal

import pytest
import torch

from quant_methods.formats.packing import (
    from_awq,
    from_compressed_tensors,
    pack,
    to_awq,
    to_compressed_tensors,
    unpack,
)
from quant_methods.grid import Grid, quantize


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "layout", [(to_compressed_tensors, from_compressed_tensors), (to_awq, from_awq)]
)
def test_round_trip(symmetric: bool, layout: tuple) -> None:
    grid = Grid(32, symmetric)
    weight = quantize(torch.randn(64, 96, generator=torch.Generator().manual_seed(1)), grid)
    write, read = layout
    back = read(write(weight, torch.float32), grid)
    assert torch.equal(back.q, weight.q)
    assert torch.equal(back.scale, weight.scale)
    assert torch.equal(back.zero, weight.zero)


@pytest.mark.parametrize("packed_dim", [0, 1])
def test_lowest_bits_come_first(packed_dim: Literal[0, 1]) -> None:
    codes = torch.randint(0, 16, (16, 64), dtype=torch.uint8)
    words = pack(codes, packed_dim)
    assert torch.equal(unpack(words, packed_dim), codes)
    first = words[0, 0].item()
    column = codes[:8, 0] if packed_dim == 0 else codes[0, :8]
    assert [first >> 4 * i & 15 for i in range(8)] == column.tolist()


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
