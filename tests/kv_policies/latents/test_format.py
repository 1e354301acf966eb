# SPDX-License-Identifier: Apache-2.0
"""Latents packed into blocks and read back: exactly, or within half a step of 4 bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kv_policies.latents.format import GROUP, LatentFormat

RANKS = st.integers(1, 40)


@given(st.sampled_from([16, 32, 64]), RANKS, RANKS, st.sampled_from([4, 16]))
def test_most_tokens_fit_and_one_group_more_does_not(
    block: int, key_rank: int, value_rank: int, bits: int
) -> None:
    elements = block * 128
    tokens = LatentFormat.most_tokens(elements, key_rank, value_rank, bits)
    group = GROUP if bits == 4 else 16
    assert tokens % group == 0
    fits = LatentFormat(key_rank, value_rank, bits, tokens)
    more = LatentFormat(key_rank, value_rank, bits, tokens + group)
    assert fits.bytes(2) <= 2 * elements < more.bytes(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "tokens"), [(16, 48), (4, 96)])
def test_what_is_written_is_read(bits: int, tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    form = LatentFormat(7, 5, bits, tokens)  # type: ignore[arg-type]
    cache = torch.full((6, 700), torch.nan, dtype=dtype)
    keys, values = torch.randn(3, tokens, 7) * 5 + 9, torch.randn(3, tokens, 5) - 30
    blocks = torch.tensor([4, 1, 2])
    # A unit at a time, in any order: those of a block come from several windows.
    count = tokens // form.unit
    for some in torch.randperm(3 * count).split(4):
        row, unit = some // count, some % count
        given = (x.unflatten(1, (-1, form.unit))[row, unit] for x in (keys, values))
        form.write(cache, blocks[row], unit, form.encode(*given, dtype))
    assert bool(cache[[0, 3, 5]].isnan().all())
    got_keys, got_values = form.read(cache, blocks.flip(0))
    assert got_keys.dtype == dtype
    for got, want, dims in ((got_keys, keys, (-2,)), (got_values, values, (-1,))):
        error = (got.flip(0).float() - want).abs()
        if bits == 16:
            assert torch.equal(got.flip(0), want.to(dtype))
            continue
        groups = want.unflatten(1, (-1, GROUP)) if dims == (-2,) else want
        step = (groups.amax(dims, keepdim=True) - groups.amin(dims, keepdim=True)) / 15
        allowed = (step / 2).expand_as(groups).reshape(want.shape)
        assert bool((error <= allowed * 1.01 + want.abs() * 2**-7).all())  # and a float's rounding


def test_groups_that_do_not_straddle_zero_are_not_clipped() -> None:
    form = LatentFormat(1, 1, 4, GROUP)
    cache = torch.zeros(1, 64)
    keys = torch.linspace(100, 115, GROUP).view(1, GROUP, 1)
    got, _ = written(form, cache, keys)
    assert float((got - keys).abs().max()) < 0.6


@pytest.mark.parametrize("spread", [1e-3, 5e-4, 1e-4, 1e-5, 0])
def test_small_ranges_keep_their_codes(spread: float) -> None:
    """Scales this small are subnormal in float16: few bits, but the codes must be of the same."""
    form = LatentFormat(1, 1, 4, GROUP)
    keys = torch.linspace(0, spread, GROUP).view(1, GROUP, 1)
    for got in written(form, torch.zeros(1, 64), keys, keys.mT.reshape(1, GROUP, 1)):
        error = float((got - keys).abs().max())
        assert error <= 1.02 * spread / 30 + 15 * 2**-25  # half a step, and 15 roundings of a scale


def written(
    form: LatentFormat,
    cache: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One unit, written into block 0 and read back."""
    zero = torch.tensor([0])
    form.write(
        cache, zero, zero, form.encode(keys, keys if values is None else values, cache.dtype)
    )
    return form.read(cache, zero)
