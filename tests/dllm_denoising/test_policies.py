# SPDX-License-Identifier: Apache-2.0
import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import dllm_denoising
from compress_common.errors import CompressError
from dllm_denoising.base import NoSettings, Observation, Plan
from dllm_denoising.canvas import Canvas
from dllm_denoising.commit import Fixed, Threshold
from dllm_denoising.denoiser import Denoiser
from dllm_denoising.elastic import next_start
from dllm_denoising.registry import build_policy, policies
from dllm_denoising.schedule import Blocks, Window
from dllm_denoising.settings import Decoding

MASK, STOP, LAYERS = 99, 7, 6
BLOCKS = Decoding(block_length=4, tokens_per_step=2)
WINDOW = Decoding(window_length=5, tokens_per_step=2)


def seen(canvas: Canvas, plan: Plan, track: int, random: np.random.Generator) -> Observation:
    """What a forward of this plan could show."""
    similarity = np.where(np.arange(LAYERS) < plan.start, random.random(LAYERS), np.nan)
    known = np.flatnonzero(~canvas.masked[: canvas.limit])
    attended = np.full((LAYERS, track), -1)
    count = min(track, len(known))
    for layer in range(LAYERS):
        attended[layer, :count] = random.permutation(known)[:count]
    return Observation(similarity if len(plan.tracked) else np.full(LAYERS, np.nan), attended)


def steps(
    policy: Any, decoding: Decoding, length: int = 12, stops: tuple[int, ...] = (), seed: int = 0
) -> Iterator[tuple[Plan, np.ndarray, Canvas, Observation]]:
    """Plans of a request whose tokens are random, what the last step committed, and saw."""
    random = np.random.default_rng(seed)
    one = Denoiser([1, 2, 3], length, decoding, policy, mask=MASK, layers=LAYERS, stops=stops)
    new, shown = np.empty(0, dtype=np.int64), None
    while not one.finished:
        plan, before = one.plan, one.canvas.masked.copy()
        yield plan, new, one.canvas, shown  # type: ignore[misc]
        shown = seen(one.canvas, plan, max(policy.tracks, 1), random)
        one.advance(random.random(len(plan.active)), random.integers(0, 9, len(plan.active)), shown)
        new = np.flatnonzero(before[: one.canvas.limit] & ~one.canvas.masked[: one.canvas.limit])
    assert one.steps <= length


def starts(name: str, values: dict[str, Any], decoding: Decoding) -> list[int]:
    return [plan.start for plan, *_ in steps(build_policy(name, values), decoding)]


@pytest.mark.parametrize("name", sorted(policies()))
@given(st.integers(0, 999), st.integers(1, 30), st.booleans(), st.sampled_from([1, 3]))
@settings(deadline=None, max_examples=40)
def test_plans_are_sound(name: str, seed: int, length: int, stop: bool, track: int) -> None:
    policy = build_policy(name, {"track": track} if name == "elastic" else {})
    decoding = BLOCKS if policy.blocks_only or seed % 2 else Decoding(threshold=0.8)
    for step, (plan, new, canvas, _) in enumerate(
        steps(policy, decoding, length, (STOP,) if stop else (), seed)
    ):
        for positions in (plan.rows, plan.active, plan.tracked):
            assert positions.dtype == np.int64 and (np.diff(positions) > 0).all()
        assert plan.start == 0 if step == 0 else 0 <= plan.start <= LAYERS
        assert len(plan.active) and canvas.masked[plan.active].all()
        assert plan.active.tolist() == decoding.schedule().active(canvas).tolist()
        assert not canvas.masked[plan.tracked].any()
        if plan.start == 0:
            assert plan.rows.tolist() == list(range(len(canvas)))
        # Tokens that the last step committed are computed again, or the cache keeps their mask.
        assert {*new, *plan.active, *plan.tracked} <= set(plan.rows.tolist())


def test_starts_by_policy() -> None:
    for decoding in (BLOCKS, WINDOW):  # 12 tokens, two a step
        assert starts("full", {}, decoding) == [0] * 6
        assert starts("never", {}, decoding) == [0] + [LAYERS] * 5
        assert starts("fixed_period", {"period": 1}, decoding) == [0] * 6
        assert starts("fixed_period", {"period": 4}, decoding) == [0, *[LAYERS] * 3, 0, LAYERS]
    assert starts("dual_cache", {}, BLOCKS) == [0, LAYERS] * 3


def test_only_new_and_active_positions_between_refreshes() -> None:
    fewer = 0
    for seed in range(20):
        for plan, new, *_ in steps(build_policy("never", {}), WINDOW, 12, (STOP,), seed):
            if plan.start:
                assert plan.rows.tolist() == sorted({*new, *plan.active})
                fewer += len(new) < 2
    assert fewer  # the other one was behind a stop token of the same step


def test_dual_cache_computes_its_block() -> None:
    """The first step of each block everything, the others all of the block."""
    plans = [plan for plan, *_ in steps(build_policy("dual_cache", {}), BLOCKS, length=10)]
    assert [plan.rows.tolist() for plan in plans if plan.start] == [[3, 4, 5, 6], [7, 8, 9, 10]]
    assert [len(plan.active) for plan in plans] == [4, 2, 4, 2, 2]  # the last block is short
    last = [plan for plan, *_ in steps(build_policy("dual_cache", {}), BLOCKS, length=11)][-1]
    assert last.rows.tolist() == [11, 12, 13] and last.start == LAYERS


def test_elastic_starts_behind_the_first_drift() -> None:
    nothing = np.full(4, np.nan)
    assert next_start(nothing, 0.9) == 4
    assert next_start(np.array([0.95, 0.9, 1, 1]), 0.9) == 4  # equal is no drift
    assert next_start(np.array([0.8, 0.1, 1, 1]), 0.9) == 1
    assert next_start(np.array([1, 0.95, 0.89, np.nan]), 0.9) == 3
    assert next_start(np.array([1, 1, 1, 0.2]), 0.9) == 4  # nothing is behind the last layer


def test_elastic_plans() -> None:
    policy = build_policy("elastic", {"gamma": 0.5, "track": 2})
    assert policy.tracks == 2
    middle = 0
    for plan, new, _, shown in steps(policy, WINDOW, length=40):
        if shown is None:
            assert plan.start == 0 and len(plan.tracked) == 0
            continue
        low = [layer for layer, value in enumerate(shown.similarity) if value < 0.5]
        assert plan.start == (low[0] + 1 if low else LAYERS)
        middle += 0 < plan.start < LAYERS
        assert plan.tracked.tolist() == sorted({*shown.attended.ravel()} - {-1})  # of all layers
        assert plan.rows.tolist() == sorted({*plan.tracked, *new, *plan.active})
    assert middle


def test_registry() -> None:
    assert {"full", "never", "fixed_period", "dual_cache", "elastic"} <= set(policies())
    for name, kind in policies().items():
        policy = build_policy(name, {})
        assert kind.name == name and isinstance(policy, kind) and kind.paper
        assert issubclass(kind.settings_type, NoSettings)
        assert isinstance(policy.settings, kind.settings_type)
    assert [name for name, kind in policies().items() if kind.blocks_only] == ["dual_cache"]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("elastik", {}, r"policy 'elastik'; did you mean 'elastic'\? \(registered: dual_cache, "),
        ("full", {"gamma": 1}, r"full: unknown setting 'gamma' \(valid: none\)"),
        ("elastic", {"gama": 1}, r"did you mean 'gamma'\? \(valid: gamma, track, similarity\)"),
        ("elastic", {"gamma": 1.5}, r"elastic.gamma: .*less than or equal to 1, got 1.5"),
        ("elastic", {"gamma": -0.1}, r"elastic.gamma: .*greater than or equal to 0, got -0.1"),
        ("elastic", {"gamma": float("nan")}, r"elastic.gamma: .*, got nan"),
        ("elastic", {"track": 0}, r"elastic.track: .*greater than or equal to 1, got 0"),
        ("elastic", {"track": 17}, r"elastic.track: .*less than or equal to 16, got 17"),
        ("elastic", {"similarity": "key"}, r"elastic.similarity: .*'row' or 'heads', got 'key'"),
        ("fixed_period", {"period": 0}, r"fixed_period.period: .*equal to 1, got 0"),
        ("elastic", {"gamma": 2, "track": 0}, "2 problems"),
    ],
)
def test_refused_settings(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressError, match=message):
        build_policy(name, values)


def test_decoding_gives_rule_and_schedule() -> None:
    assert (Decoding().rule(), Decoding().schedule()) == (Threshold(0.9), Window(16))
    other = Decoding(tokens_per_step=3, block_length=8)
    assert (other.rule(), other.schedule()) == (Fixed(3), Blocks(8))
    assert Decoding(threshold=0.5, window_length=4).rule() == Threshold(0.5)
    assert Decoding(window_length=4).schedule() == Window(4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 0.9, "tokens_per_step": 1}, "`threshold` and `tokens_per_step` exclude"),
        ({"window_length": 16, "block_length": 8}, "`window_length` and `block_length` exclude"),
        ({"threshold": 0}, "greater than 0"),
        ({"threshold": 1.1}, "less than or equal to 1"),
        ({"tokens_per_step": 0}, "greater than or equal to 1"),
        ({"window_length": 0}, "greater than or equal to 1"),
        ({"block_length": 0}, "greater than or equal to 1"),
        ({"steps": 3}, "Extra inputs are not permitted"),
    ],
)
def test_refused_decoding(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Decoding(**values)


def test_imports_neither_vllm_nor_the_other_packages() -> None:
    for path in Path(dllm_denoising.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            tops = {name.split(".")[0] for name in names}
            allowed = {"collections", "dataclasses", "typing", "compress_common", "dllm_denoising"}
            assert tops <= allowed | {"numpy", "pydantic", "torch"}, path
