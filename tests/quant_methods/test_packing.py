# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32

from quant_methods.grid import Grid, quantize
from quant_methods.packing import (
    from_awq,
    from_compressed_tensors,
    pack_int32,
    to_awq,
    to_compressed_tensors,
    unpack_int32,
)


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


def test_pack_agrees_with_compressed_tensors() -> None:
    codes = torch.randint(0, 16, (8, 64), dtype=torch.uint8)
    theirs = pack_to_int32(codes.to(torch.int8) - 8, num_bits=4)  # they store code + 8
    assert torch.equal(pack_int32(codes), theirs)
    assert torch.equal(unpack_int32(theirs), codes)


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
