# SPDX-License-Identifier: Apache-2.0
"""The reference against plain loops that share no code with it but ``predict`` and ``Canvas``."""

from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from dllm_denoising.base import Plan
from dllm_denoising.canvas import Canvas
from dllm_denoising.commit import predict
from dllm_denoising.denoiser import Denoiser
from dllm_denoising.dense import DenseLLaDA, Shape
from dllm_denoising.reference import CachedForward, Generated, generate
from dllm_denoising.registry import build_policy, policies
from dllm_denoising.settings import Decoding

LAYERS, MASK, LENGTH = 4, 19, 24
STOPS, FILL = (3, 11), 3
PROMPT = [4, 8, 15, 16, 2, 0]


@cache
def dense() -> DenseLLaDA:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = DenseLLaDA(Shape(64, LAYERS, 4, 2, 128, 20)).eval()
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(3)  # or attention is nearly flat, and nothing drifts
    return model


def denoiser(
    name: str, values: dict[str, Any] | None = None, prompt: int = 0, **how: Any
) -> Denoiser:
    decoding = how.pop("decoding", None) or Decoding(window_length=6, threshold=0.3)
    policy = build_policy(name, values or {})
    how = {"mask": MASK, "layers": LAYERS, "fill": FILL} | how
    return Denoiser([prompt, *PROMPT], LENGTH, decoding, policy, **how)


def run(name: str, values: dict[str, Any] | None = None, **how: Any) -> Generated:
    in_step = how.pop("in_step", False)
    return generate(dense(), denoiser(name, values, **how), in_step)


@torch.inference_mode()
def uncached(prompt: int, least: float, window: int | None, block: int, stops: Any) -> list[int]:
    """LLaDA's loop: the whole model on the whole canvas in each step."""
    canvas = Canvas([prompt, *PROMPT], LENGTH, MASK, stops, FILL)
    while not canvas.finished:
        active = np.flatnonzero(canvas.masked)
        if window:
            active = active[:window]
        else:
            first = canvas.prompt + (active[0] - canvas.prompt) // block * block
            active = active[active < first + block]
        logits = dense()(torch.from_numpy(canvas.tokens)[None])[0, active]
        confidence, tokens = (part.numpy() for part in predict(logits, MASK))
        chosen = confidence >= min(least, confidence.max())
        canvas.commit(active[chosen], tokens[chosen])
    return canvas.tokens[canvas.prompt : canvas.limit].tolist()


def test_full_is_the_uncached_loop() -> None:
    lengths = set()
    for prompt, stops in product(range(4), ((), STOPS)):
        window = Decoding(window_length=6, threshold=0.3)
        got = run("full", prompt=prompt, stops=stops, decoding=window).tokens
        assert got == uncached(prompt, 0.3, 6, 0, stops)
        blocks = Decoding(block_length=7, threshold=0.4)
        got = run("full", prompt=prompt, stops=stops, decoding=blocks).tokens
        assert got == uncached(prompt, 0.4, None, 7, stops)
        lengths.add(len(got))
    assert LENGTH in lengths and len(lengths) > 2  # stop tokens ended some


def test_period_one_is_full() -> None:
    for prompt in range(3):
        want = run("full", prompt=prompt)
        assert run("fixed_period", {"period": 1}, prompt=prompt).tokens == want.tokens
        stale = run("fixed_period", {"period": LENGTH}, prompt=prompt).tokens
        assert stale == run("never", prompt=prompt).tokens


@torch.inference_mode()
def published(
    prompt: int, gamma: float, track: int, late: bool = False
) -> tuple[list[int], list[int]]:
    """Tokens and starts of Elastic-Cache as its authors' code has it, with its cache of queries.

    late: what a step shows changes the next one instead of itself.
    """
    canvas, layers = Canvas([prompt, *PROMPT], LENGTH, MASK), dense().blocks
    everything = torch.arange(len(canvas))
    inputs: list[torch.Tensor] = [torch.empty(0)] * LAYERS
    qs, ks, vs = inputs.copy(), inputs.copy(), inputs.copy()
    tracked = new = torch.empty(0, dtype=torch.int64)
    starts: list[int] = []
    planned = LAYERS
    while not canvas.finished:
        active = torch.from_numpy(np.flatnonzero(canvas.masked)[:6])
        first = not starts
        query = everything if first else torch.cat((tracked, new, active))
        start, planned = -1 if first else planned, LAYERS
        x, found = dense().embed(torch.from_numpy(canvas.tokens)[query][None]), set()
        for at, layer in enumerate(layers):
            if at > start:
                inputs[at] = x
            else:
                inputs[at][:, query] = x
                x = inputs[at].clone() if at == start else x
            q, k, v = layer.attention_inputs(x, everything if at >= start else query)
            old_q, old_k = qs[at], ks[at].clone()
            if at >= start:
                qs[at], ks[at], vs[at] = q, k, v
            else:
                old_q = old_q[:, :, tracked]
                qs[at][:, :, query], ks[at][:, :, query], vs[at][:, :, query] = q, k, v
            now = attention(q, ks[at])
            x = layer.finish(x, now @ vs[at].repeat_interleave(2, 1))
            rows = active if at >= start else torch.arange(len(query))[-len(active) :]
            mass = now[:, :, rows].sum((0, 1, 2))
            mass[torch.from_numpy(canvas.masked)] = 0
            found |= set(mass.topk(track).indices.tolist())
            if at < start:
                past = attention(old_q, old_k)
                same = cosine_similarity(past, now[:, :, : len(tracked)], dim=1).mean()
                if same < gamma and late:
                    planned = min(planned, at + 1)
                elif same < gamma:
                    start = at + 1
        starts.append(max(start, 0))
        logits = dense().logits(x)[0, rows if start == LAYERS else active]
        confidence, tokens = predict(logits, MASK)
        chosen = confidence >= min(0.3, confidence.max())
        new, tracked = active[chosen], torch.tensor(sorted(found))
        canvas.commit(new.numpy(), tokens[chosen].numpy())
    return canvas.tokens[canvas.prompt :].tolist(), starts


def attention(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    logits = queries @ keys.repeat_interleave(2, 1).transpose(-1, -2)
    return (logits / queries.shape[-1] ** 0.5).softmax(-1)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("gamma", "track"), [(0.0, 1), (0.9, 1), (0.95, 3), (0.98, 2)])
def test_elastic_is_the_published_loop(gamma: float, track: int, late: bool) -> None:
    middle = 0
    for prompt in range(4):
        settings = {"gamma": gamma, "track": track, "similarity": "heads"}
        got = run("elastic", settings, prompt=prompt, in_step=not late)
        tokens, starts = published(prompt, gamma, track, late)
        assert [plan.start for plan in got.plans] == starts and got.tokens == tokens
        middle += sum(0 < start < LAYERS for start in starts)
    assert middle if gamma else not middle


def test_without_drift_it_does_not_matter_when_it_is_seen() -> None:
    for over in ("heads", "row"):
        values = {"gamma": 0.0, "similarity": over}
        late, in_step = run("elastic", values), run("elastic", values, in_step=True)
        assert late.tokens == in_step.tokens
        for result in (late, in_step):
            assert [p.start for p in result.plans] == [0] + [LAYERS] * (len(result.plans) - 1)


@torch.inference_mode()
def test_starting_at_the_first_layer_is_the_dense_model() -> None:
    one = denoiser("elastic")
    forward = CachedForward(dense(), one, in_step=False)
    while not one.finished:
        active = one.plan.active
        logits, seen, start = forward(Plan(np.arange(len(one.canvas)), 0, active))
        want = dense()(torch.from_numpy(one.canvas.tokens)[None])[0, active]
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)
        assert start == 0 and seen is not None and np.isnan(seen.similarity).all()
        one.advance(*(part.numpy() for part in predict(logits, MASK)), seen)


@pytest.mark.parametrize("start", range(1, LAYERS + 1))
@torch.inference_mode()
def test_starting_in_the_middle_takes_kept_inputs(start: int) -> None:
    one, layers = denoiser("elastic"), dense().blocks
    positions = torch.arange(len(one.canvas))
    forward = CachedForward(dense(), one, in_step=False)
    logits, seen, _ = forward(one.plan)
    x, inputs, keys, values = dense().embed(torch.from_numpy(one.canvas.tokens))[None], [], [], []
    for layer in layers:
        q, k, v = layer.attention_inputs(x, positions)
        inputs, keys, values = [*inputs, x], [*keys, k], [*values, v]
        x = layer.finish(x, attention(q, k) @ v.repeat_interleave(2, 1))
    torch.testing.assert_close(logits, dense().logits(x)[0, one.plan.active], atol=1e-4, rtol=1e-4)

    one.advance(*(part.numpy() for part in predict(logits, MASK)), seen)
    plan = one.plan
    rows = torch.from_numpy(plan.rows)
    logits, seen, _ = forward(Plan(plan.rows, start, plan.active, plan.tracked))
    x, similarity = dense().embed(torch.from_numpy(one.canvas.tokens)[rows])[None], []
    for layer, k, v in zip(layers[:start], keys, values, strict=False):
        q, k_rows, v_rows = layer.attention_inputs(x, rows)
        mine = torch.isin(rows, torch.from_numpy(plan.tracked))
        old = layer.attention_inputs(inputs[len(similarity)], positions)[0][:, :, plan.tracked]
        past = attention(old, k)
        k[:, :, rows], v[:, :, rows] = k_rows, v_rows
        now = attention(q, k)
        similarity.append(cosine_similarity(past, now[:, :, mine], dim=-1).mean().item())
        x = layer.finish(x, now @ v.repeat_interleave(2, 1))
    if start < LAYERS:  # all positions from here on, those that are no rows as they were before
        whole = inputs[start].clone()
        whole[:, rows] = x
        x, rows = whole, positions
        for layer in layers[start:]:
            q, k, v = layer.attention_inputs(x, positions)
            x = layer.finish(x, attention(q, k) @ v.repeat_interleave(2, 1))
    at = torch.isin(rows, torch.from_numpy(plan.active))
    torch.testing.assert_close(logits, dense().logits(x)[0, at], atol=1e-4, rtol=1e-4)
    assert seen is not None and np.isnan(seen.similarity[start:]).all()
    np.testing.assert_allclose(seen.similarity[:start], similarity, atol=1e-4)


@pytest.mark.parametrize("name", sorted(policies()))
@pytest.mark.parametrize("per_step", [None, 1, 3])
def test_every_policy_ends_by_the_same_rules(name: str, per_step: int | None) -> None:
    decoding = Decoding(block_length=8, tokens_per_step=per_step)
    for prompt, stops in product(range(3), ((), STOPS)):
        one = denoiser(name, prompt=prompt, stops=stops, decoding=decoding)
        result = generate(dense(), one)
        assert one.finished and len(result.plans) == one.steps <= LENGTH
        assert result.tokens == one.canvas.tokens[one.canvas.prompt : one.canvas.limit].tolist()
        assert MASK not in result.tokens and not set(result.tokens[:-1]) & set(stops)
        assert len(result.tokens) == LENGTH or result.tokens[-1] in stops
        if not stops and per_step:
            assert one.steps == -(-8 // per_step) * 3  # blocks of 8


def test_sampling_is_of_its_seed() -> None:
    def sampled(seed: int) -> list[int]:
        return run("never", temperature=1.0, seed=seed).tokens

    assert sampled(1) == sampled(1) != sampled(2)


def test_computed_positions_are_counted() -> None:
    rows = np.array([1, 4, 5])
    counts = [Plan(rows, start, rows[1:]).token_layers(10, LAYERS) for start in range(LAYERS + 1)]
    assert counts == [40, 33, 26, 19, 12]
    full, never = (
        [plan.token_layers(len(PROMPT) + 1 + LENGTH, LAYERS) for plan in run(name).plans]
        for name in ("full", "never")
    )
    assert set(full) == {31 * LAYERS} == {never[0]} and max(never[1:]) < 31 * LAYERS / 2
