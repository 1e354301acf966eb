# SPDX-License-Identifier: Apache-2.0
import ast
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kv_policies
from compress_common.errors import CompressError
from kv_policies.attention import attention_received
from kv_policies.base import Context, KVPolicy, LatentPolicy, first_observed
from kv_policies.layout.tokens import TokenLayout
from kv_policies.policies.r_kv import redundancy
from kv_policies.registry import build_policy, policies
from kv_policies.select import select
from kv_policies.workspace import Heads

HEADS, KV_HEADS, DIM = 6, 3, 8
SCALE = DIM**-0.5
SHAPE = Heads(KV_HEADS, HEADS // KV_HEADS, DIM, 4, "cpu")
CHOOSING = sorted(n for n, kind in policies().items() if kind.capabilities.content == "tokens")


def inputs(tokens: int, requests: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(requests, HEADS, tokens, DIM, generator=generator) * 2
    keys = torch.randn(requests, KV_HEADS, tokens, DIM, generator=generator) * 2
    return queries, keys


def dense(
    queries: torch.Tensor,
    keys: torch.Tensor,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The whole causal attention matrix in float64, [R, Hq, T, T], written the plain way."""
    keys = keys.double().repeat_interleave(HEADS // KV_HEADS, dim=1)
    logits = queries.double() @ keys.transpose(-1, -2) * SCALE
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    logits = logits.masked_fill(future, -torch.inf)
    if sinks is None:
        return logits.softmax(-1)
    column = sinks.double()[None, :, None, None].expand(*logits.shape[:3], 1)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1]


def scored(policy: KVPolicy, queries: torch.Tensor, keys: torch.Tensor, cuts: Any) -> torch.Tensor:
    """Scores of one request as an engine gets them: chunk by chunk, keys only as far as known."""
    tokens = keys.shape[2]
    first = policy.first_query(tokens)
    total: torch.Tensor | None = None
    for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True):
        start = max(start, first)
        if start >= stop:
            continue
        at = torch.arange(start, stop)[None]
        if policy.capabilities.needs_queries:
            part = policy.observe(queries[:, :, start:stop], at, keys[:, :, :stop], SCALE)
            assert part.shape[2] == policy.observed_numbers(SHAPE, stop)
            missing = policy.observed_numbers(SHAPE, tokens) - part.shape[2]
            part = torch.nn.functional.pad(part, (0, missing))
            total = part if total is None else total + part
    return score(policy, total, keys, torch.tensor([tokens]))


def score(
    policy: KVPolicy, observed: torch.Tensor | None, keys: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """As the engine asks: with what the policy needs, and no more."""
    needs = policy.capabilities.needs
    if observed is not None and not policy.capabilities.per_head:
        observed = observed.mean(1, keepdim=True)
    given = keys if "keys" in needs else None
    values = keys.flip(-1) + 1 if "values" in needs else None
    kept = lengths // 2
    return policy.score(
        Context(0, lengths, keys.shape[2], observed, given, values, kept, scale=SCALE)
    )


@pytest.mark.parametrize("name", CHOOSING)
@given(st.integers(1, 40), st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=30)
def test_scores_do_not_depend_on_the_chunks(
    name: str, tokens: int, seed: int, data: st.DataObject
) -> None:
    policy = build_policy(name, {})
    queries, keys = inputs(tokens, seed=seed)
    cuts = sorted(data.draw(st.sets(st.integers(1, tokens - 1)))) if tokens > 1 else []
    whole = scored(policy, queries, keys, [])
    heads = KV_HEADS if policy.capabilities.per_head else 1
    assert whole.shape == (1, heads, tokens) and bool(torch.isfinite(whole).all())
    assert torch.allclose(whole, scored(policy, queries, keys, cuts), atol=1e-4)


@pytest.mark.parametrize("name", CHOOSING)
def test_padding_changes_nothing(name: str) -> None:
    """Requests of several lengths in one batch; queries behind their end may be anything."""
    policy = build_policy(name, {})
    lengths = torch.tensor([33, 50, 2])
    queries, keys = inputs(50, requests=3)
    at = torch.arange(50).expand(3, 50).clone()
    for row, length in enumerate(lengths.tolist()):
        keys[row, :, length:] = 0
        queries[row, :, length:] = torch.nan
        at[row, length:] = -1
        at[row, : policy.first_query(length)] = -1
    observed = None
    if policy.capabilities.needs_queries:
        observed = policy.observe(queries, at, keys, SCALE)
    batch = score(policy, observed, keys, lengths)
    for row, length in enumerate(lengths.tolist()):
        one = scored(
            policy, queries[row : row + 1, :, :length], keys[row : row + 1, :, :length], []
        )
        assert torch.allclose(batch[row, :, :length], one[0], atol=1e-4)


@pytest.mark.parametrize("block", [1, 500, 1 << 24])
def test_attention_received_is_the_column_sum(block: int) -> None:
    queries, keys = inputs(45, requests=2)
    at = torch.arange(45).expand(2, 45)
    got = attention_received(queries, at, keys, SCALE, block=block)
    want = dense(queries, keys).unflatten(1, (KV_HEADS, -1)).mean(2).sum(2)
    assert torch.allclose(got.double(), want, atol=1e-5)
    assert torch.allclose(got.sum(-1), torch.full((2, KV_HEADS), 45.0))


@pytest.mark.parametrize("block", [1, 1 << 24])
@pytest.mark.parametrize("sink", [-40.0, 0.5, 200.0])
def test_sinks_take_their_share(block: int, sink: float) -> None:
    queries, keys = inputs(45, requests=2)
    sinks = sink + torch.arange(HEADS).float()
    at = torch.arange(45).expand(2, 45)
    got = attention_received(queries, at, keys, SCALE, sinks, block=block)
    want = dense(queries, keys, sinks).unflatten(1, (KV_HEADS, -1)).mean(2).sum(2)
    assert torch.allclose(got.double(), want, atol=1e-5)
    assert (sink < -30) == bool(torch.allclose(got.sum(-1), torch.full((2, KV_HEADS), 45.0)))


@pytest.mark.parametrize("block", [1, 1 << 24])
@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_a_soft_cap_limits_what_a_key_receives(block: int, softcap: float) -> None:
    queries, keys = inputs(45, requests=2)
    at = torch.arange(45).expand(2, 45)
    got = attention_received(queries, at, keys, SCALE, softcap=softcap, block=block)
    want = dense(queries, keys, softcap=softcap).unflatten(1, (KV_HEADS, -1)).mean(2).sum(2)
    assert torch.allclose(got.double(), want, atol=1e-5)
    plain = attention_received(queries, at, keys, SCALE)
    assert not torch.allclose(got, plain, atol=1e-3)


def test_scores_that_come_from_attention_cap_logits() -> None:
    """As the model does: of two caps, the votes differ, and each query has one vote."""
    capping = [name for name in CHOOSING if policies()[name].capabilities.caps_logits]
    assert capping == [name for name in CHOOSING if policies()[name].capabilities.counts_sinks]
    queries, keys = inputs(45)
    at = torch.arange(45)[None]
    for name in capping:
        observe = build_policy(name, {}).observe
        capped = observe(queries, at, keys, SCALE, softcap=1.0)
        assert not torch.allclose(capped, observe(queries, at, keys, SCALE), atol=1e-3)
        assert torch.allclose(capped.sum(-1), torch.full((1, KV_HEADS), 45.0))


def test_scores_that_come_from_attention_count_sinks() -> None:
    counting = [name for name in CHOOSING if policies()[name].capabilities.counts_sinks]
    assert {"prefix_kv", "snap_kv"} <= set(counting)
    queries, keys = inputs(45)
    at, sinks = torch.arange(45)[None], torch.linspace(0, 4, HEADS)
    for name in counting:
        observe = build_policy(name, {}).observe
        assert not torch.allclose(
            observe(queries, at, keys, SCALE, sinks=sinks), observe(queries, at, keys, SCALE)
        )


@pytest.mark.parametrize("name", CHOOSING)
def test_large_numbers_of_float16_do_not_overflow(name: str) -> None:
    """Queries and keys of some models are hundreds; their products do not fit float16."""
    policy = build_policy(name, {})
    queries, keys = (300 * x for x in inputs(40))
    narrow = scored(policy, queries.half(), keys.half(), [])
    wide = scored(policy, queries.half().float(), keys.half().float(), [])
    assert bool(torch.isfinite(narrow).all())
    torch.testing.assert_close(narrow, wide, atol=1e-3, rtol=1e-3)


def test_prefix_kv_against_the_dense_reference() -> None:
    queries, keys = inputs(60)
    got = scored(build_policy("prefix_kv", {"queries": 0, "pool": 1}), queries, keys, [7, 31])
    want = dense(queries, keys).mean(1, keepdim=True).sum(2)  # the paper: mean heads, sum queries
    assert torch.allclose(got.double(), want, atol=1e-5)


def test_prefix_kv_pools_where_it_is_asked_to() -> None:
    queries, keys = inputs(60)
    plain, wide = (
        scored(build_policy("prefix_kv", {"queries": 9, "pool": pool}), queries, keys, [55])
        for pool in (1, 5)
    )
    for token in range(60):
        near = plain[..., max(0, token - 2) : token + 3].amax(-1)
        assert torch.equal(wide[..., token], near)
    assert build_policy("prefix_kv", {}).settings.pool == 15


def test_snap_kv_against_the_dense_reference() -> None:
    tokens, window, pool = 60, 8, 5
    queries, keys = inputs(tokens)
    got = scored(build_policy("snap_kv", {"window": window, "pool": pool}), queries, keys, [55])
    past = tokens - window
    votes = dense(queries, keys)[:, :, past:, :past].unflatten(1, (KV_HEADS, -1)).mean(2).sum(2)
    for token in range(past):
        near = votes[..., max(0, token - pool // 2) : token + pool // 2 + 1].amax(-1)
        assert torch.allclose(got[..., token].double(), near, atol=1e-5)
    chosen = select(got, torch.tensor([tokens]), torch.tensor([window + 3]))
    assert chosen[0, :, -window:].tolist() == [list(range(past, tokens))] * KV_HEADS
    fewer = select(got, torch.tensor([tokens]), torch.tensor([4]))  # the sink and the latest
    assert fewer[0].tolist() == [[0, tokens - 3, tokens - 2, tokens - 1]] * KV_HEADS


def test_key_diff_against_the_dense_reference() -> None:
    _, keys = inputs(60)
    got = score(build_policy("key_diff", {}), None, keys, torch.tensor([60]))
    unit = keys.double() / keys.double().norm(dim=-1, keepdim=True)
    want = -torch.cosine_similarity(unit, unit.mean(2, keepdim=True), dim=-1)
    assert torch.allclose(got.double(), want, atol=1e-5)


@given(st.integers(4, 40), st.integers(1, 12), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_h2o_against_the_dense_reference(tokens: int, window: int, seed: int) -> None:
    queries, keys = inputs(tokens, seed=seed)
    policy = build_policy("h2o", {"queries": window})
    got = scored(policy, queries, keys, [tokens // 2])
    votes = dense(queries, keys)[:, :, -window:].unflatten(1, (KV_HEADS, -1)).mean(2).sum(2)
    recent = tokens // 2 // 2  # of tokens // 2 that stay
    torch.testing.assert_close(
        got[..., : tokens - recent].double(), votes[..., : tokens - recent], atol=1e-5, rtol=0
    )
    chosen = select(got, torch.tensor([tokens]), torch.tensor([max(2, tokens // 2)]))
    for head in range(KV_HEADS):
        others = votes[0, head, 1 : tokens - max(1, recent)]
        best = others.topk(max(0, tokens // 2 - 1 - max(1, recent))).indices + 1
        want = {0, *best.tolist(), *range(tokens - max(1, recent), tokens)}
        assert set(chosen[0, head].tolist()) == want


def one_by_one(keys: torch.Tensor, threshold: float) -> torch.Tensor:
    """What R-KV says of the keys of a head, [T, D]: a matrix of cosines, row by row."""
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    cosines = (unit @ unit.T).fill_diagonal_(0)
    for row in cosines:
        if len(alike := (row > threshold).nonzero()):
            row[alike[-1]] = 0
    return cosines.mean(0).softmax(-1)


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.3, 0.5]),
    st.sampled_from([1, 70, None]),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_redundancy_against_all_pairs(
    lengths: list[int], threshold: float, block: int | None, seed: int
) -> None:
    _, keys = inputs(max(lengths), requests=len(lengths), seed=seed)
    keys += 1  # so that some are alike
    for row, length in enumerate(lengths):
        keys[row, :, length:] = 0
    got = redundancy(keys, torch.tensor(lengths), threshold, block)
    for row, length in enumerate(lengths):
        assert bool((got[row, :, length:] == 0).all())
        for head in range(KV_HEADS):
            want = one_by_one(keys[row, head, :length], threshold)
            torch.testing.assert_close(got[row, head, :length].double(), want, atol=1e-6, rtol=0)


def test_r_kv_against_the_dense_reference() -> None:
    tokens, window, pool = 60, 8, 5
    queries, keys = inputs(tokens)
    got = scored(build_policy("r_kv", {"window": window, "pool": pool}), queries, keys, [55])
    past = tokens - window
    votes = dense(queries, keys)[:, :, past:, :past].unflatten(1, (KV_HEADS, -1)).mean(2).sum(2)
    votes /= votes.sum(-1, keepdim=True)
    for head in range(KV_HEADS):
        alike = one_by_one(keys[0, head], 0.5)
        for token in range(past):
            near = votes[0, head, max(0, token - pool // 2) : token + pool // 2 + 1].amax()
            want = 0.1 * near - 0.9 * alike[token]
            assert abs(float(got[0, head, token]) - float(want)) < 1e-5
    assert bool((got[..., past:] > got[..., :past].amax()).all())


def test_r_kv_keeps_the_last_copy() -> None:
    """Of equal keys that nobody attends to, the last counts as the least redundant."""
    queries, keys = inputs(60)
    queries[:] = 0
    keys[:, :, [10, 20, 30]] = keys[:, :, 10:11]
    got = scored(build_policy("r_kv", {"threshold": 0.99}), queries, keys, [])
    assert bool((got[..., 30] > got[..., 10]).all()) and bool((got[..., 30] > got[..., 20]).all())


@given(st.integers(3, 40), st.integers(2, 12), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_expected_attention_against_the_plain_formula(tokens: int, last: int, seed: int) -> None:
    queries, keys = inputs(tokens, seed=seed)
    policy = build_policy("expected_attention", {"queries": last, "sinks": 1})
    got = scored(policy, queries, keys, [tokens // 2])
    values = (keys.flip(-1) + 1).double()
    for head in range(KV_HEADS):
        expected = torch.zeros(tokens, dtype=torch.float64)
        for at in range(2 * head, 2 * head + 2):
            some = queries[0, at, -last:].double()
            logits = (some @ keys[0, head].double().T) * SCALE  # [queries, tokens]
            expected += (logits.mean(0) + logits.var(0, correction=0) / 2).softmax(-1)
        want = expected * values[0, head].norm(dim=-1)
        torch.testing.assert_close(got[0, head, 1:].double(), want[1:], atol=1e-4, rtol=1e-3)
        assert got[0, head, 0] == got[0, head].amax()


def test_key_diff_keeps_its_share_of_the_last_tokens() -> None:
    _, keys = inputs(60)
    plain, recent = (
        score(build_policy("key_diff", {"recent": share}), None, keys, torch.tensor([60]))
        for share in (0, 0.2)  # of the 30 that stay
    )
    assert torch.equal(plain[..., :54], recent[..., :54])
    chosen = select(recent, torch.tensor([60]), torch.tensor([30]))
    assert chosen[0, :, -6:].tolist() == [list(range(54, 60))] * KV_HEADS
    few = select(recent, torch.tensor([60]), torch.tensor([4]))  # the first, then the latest
    assert few[0].tolist() == [[0, 57, 58, 59]] * KV_HEADS


def test_recent_keeps_sinks_and_the_end() -> None:
    keys = torch.zeros(1, KV_HEADS, 20, DIM)
    scores = score(build_policy("recent", {"sinks": 2}), None, keys, torch.tensor([20]))
    chosen = select(scores, torch.tensor([20]), torch.tensor([5]))
    assert chosen.tolist() == [[[0, 1, 17, 18, 19]]]


@pytest.mark.parametrize(
    ("name", "values", "keep", "expected"),
    [
        ("prefix_kv", {"queries": 0}, Fraction(1, 4), 736),
        ("prefix_kv", {}, Fraction(1, 4), 968),
        ("snap_kv", {"window": 32}, Fraction(1, 4), 968),
        ("snap_kv", {"window": 512}, Fraction(1, 4), 736),
        ("key_diff", {}, Fraction(1, 4), 999),
    ],
)
def test_queries_of_a_cached_prefix_are_never_observed(
    name: str, values: dict[str, int], keep: Fraction, expected: int
) -> None:
    layout = TokenLayout(16, keep)
    assert layout.hit_limit(1000) == 736
    assert first_observed(build_policy(name, values), layout, 1000) == expected


def test_registry() -> None:
    assert set(policies()) >= {"prefix_kv", "snap_kv", "key_diff", "recent", "cskv"}
    assert set(policies()) >= {"h2o", "r_kv", "expected_attention"}
    for name, kind in policies().items():
        assert kind.name == name and kind.__doc__
        policy = build_policy(name, {})
        assert isinstance(policy, KVPolicy) == (name in CHOOSING)
        assert isinstance(policy, LatentPolicy) == (name not in CHOOSING)
        assert kind.capabilities.paper.startswith("https://")
    with pytest.raises(CompressError, match="KV policy 'snapkv'; did you mean 'snap_kv'"):
        build_policy("snapkv", {})
    with pytest.raises(CompressError, match="did you mean 'window'"):
        build_policy("snap_kv", {"windows": 3})


def test_imports_neither_vllm_nor_the_other_packages() -> None:
    for path in Path(kv_policies.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            tops = {name.split(".")[0] for name in names}
            assert not tops & {"vllm", "vllm_plugin", "quant_methods", "transformers"}, path
