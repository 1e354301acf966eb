# SPDX-License-Identifier: Apache-2.0
"""The C++ kernel against the same attention in torch."""

import pytest
import torch

from kv_policies.latent_attention import Decoder, Latents, Raw, attend
from kv_policies.rope import Rope
from tests.kv_policies.test_rope import table
from vllm_plugin.kv_cache import latent_cpu_build
from vllm_plugin.kv_cache.latent_cpu import NativeLatents, packed

pytestmark = pytest.mark.skipif(
    "AVX512" not in torch.backends.cpu.get_cpu_capability(),
    reason="the kernel needs AVX-512",
)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(("neox", "turned"), [(True, 32), (True, 20), (False, 32), (False, 20)])
@pytest.mark.parametrize(("ranks", "tokens"), [((25, 51), 48), ((8, 6), 96), ((1, 1), 160)])
def test_it_is_attention(
    ranks: tuple[int, int], tokens: int, neox: bool, turned: int, queries: int
) -> None:
    torch.manual_seed(0)
    heads, group, size, blocks, recent = 2, 3, 32, 9, 32
    rope = Rope(table(700, turned), neox)
    latents = [torch.randn(blocks, tokens, rank).bfloat16() for rank in ranks]
    # Rounded already, so that both have the same decoder; the mean is not.
    of_keys, of_values = (
        Decoder(torch.cat((torch.randn(rank, heads * size).bfloat16(), torch.randn(1, 64) * 5)))
        for rank in ranks
    )
    places = torch.randperm(blocks)[:6].view(2, 3)
    count = torch.tensor([[tokens, tokens, 17], [tokens, tokens - 16, 0]])
    first = torch.tensor([[0, tokens, 2 * tokens], [64, 64 + tokens, 0]])
    at = torch.arange(tokens)
    there = at < count[..., None]
    reference = Latents(
        *(x[places].flatten(1, 2) for x in latents),
        (first[..., None] + at).where(there, 0).flatten(1),
        torch.where(there, 0.0, -torch.inf).flatten(1),
        of_keys,
        rope,
    )
    for x in latents:  # nothing may depend on what lies behind the last token
        x[places[0, 2], 17:] = torch.nan
        x[places[1, 2]] = torch.nan
    kernel = latent_cpu_build.load()
    decode = packed(of_keys, rope, size)
    native = NativeLatents(*latents, places, first, count, decode, rope, kernel)

    rows = torch.randn(2, heads, group * queries, size) / size**0.5
    logits = torch.empty(2, 2, heads, group * queries, native.length + 5)[..., : native.length]
    for old, out in zip((reference, native), logits, strict=True):
        old.logits(rows, out)
    # Keys are turned from float32 to sums of float32: what is left is the rounding of the mean.
    torch.testing.assert_close(logits[1], logits[0], atol=2e-4, rtol=1e-4)
    weights = logits[0].softmax(-1)
    torch.testing.assert_close(native.sums(weights), reference.sums(weights), atol=1e-5, rtol=1e-4)

    raw = Raw(*torch.randn(2, 2, heads, recent, size), torch.zeros(2, queries, recent))
    query = torch.randn(2, heads * group, queries, size)
    ours, theirs = (attend(query, old, raw, of_values, 0.2) for old in (native, reference))
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_it_compiles_once(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    ...


def test_what_rules_it_out_is_said() -> None:
    assert "holds float32" in str(latent_cpu_build.why_not(torch.float32))
    assert latent_cpu_build.why_not(torch.bfloat16) is None
