# SPDX-License-Identifier: Apache-2.0
"""The evolutionary search: elitist, deterministic, and unmoved by an interruption."""

from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compress_common.calibration.stages import Stages
from compress_common.search.evolution import Evolution, EvolutionSettings, Genome, evolve
from compress_common.store import Store
from tests.support.interrupting import in_parts, random_numbers, stages_of


def mutate(genome: Genome, rng: Random) -> Genome | None:
    """Move one gene up or down."""
    child = list(genome)
    child[rng.randrange(len(child))] += rng.choice((-1, 1))
    return tuple(child) if min(child) >= 0 else None


def distance(genome: Genome, tokens: int | None = None, seed: int | None = None) -> float:
    """To a fixed point: the same on all text."""
    return float(sum((gene - 5) ** 2 for gene in genome))


def noisy(genome: Genome, tokens: int | None = None, seed: int | None = None) -> float:
    """Less noisy on more tokens, as measurements are, and exact on all."""
    noise = 0.0 if tokens is None else Random(f"{genome} {seed}").gauss(0, 30 / tokens)
    return distance(genome) + noise


def given_settings(**more: object) -> EvolutionSettings:
    return EvolutionSettings(
        **{"generations": 12, "offspring": 6, "survivors": (3, 2, 1), "tokens": (1, 4, 16)} | more
    )


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_a_parent_is_replaced_only_by_a_better_one(start: list[int], seed: int) -> None:
    chosen = given_settings(seed=seed, patience=12)
    found = evolve(tuple(start), mutate, distance, chosen)
    assert found.curve[0][0] == distance(tuple(start))
    assert all(after <= before for before, after in found.curve)
    following = zip(found.curve, found.curve[1:], strict=False)
    assert all(this[1] == then[0] for this, then in following)  # the child is the next parent
    assert found.curve[-1][1] == distance(found.best)
    assert evolve(tuple(start), mutate, distance, chosen) == found


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_noise_never_makes_it_lose_to_its_start(start: list[int], seed: int) -> None:
    found = evolve(tuple(start), mutate, noisy, given_settings(seed=seed))
    assert noisy(found.best) <= noisy(tuple(start))
    if found.losses is not None:
        assert noisy(found.best) == min(found.losses)


def test_a_search_that_noise_led_away_returns_its_start() -> None:
    found = evolve((5, 5, 5), mutate, noisy, given_settings(tokens=(1, 1, 1)))
    before, after = found.losses or (0.0, 0.0)
    assert before == 0 < after
    assert found.best == (5, 5, 5)


def test_it_finds_the_best_and_then_stops() -> None:
    found = evolve((0, 9, 2), mutate, distance, given_settings(generations=500, patience=5))
    assert found.best == (5, 5, 5)
    assert len(found.curve) < 60
    assert [after for _, after in found.curve[-5:]] == [0.0] * 5


def test_an_interrupted_search_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Interrupted at every generation, and amid one of them."""
    chosen, random = given_settings(), random_numbers()
    measured: list[Genome] = []
    stop: int | None = None

    def stopping(genome: Genome, tokens: int | None = None, seed: int | None = None) -> float:
        measured.append(genome)
        if len(measured) == stop:
            raise KeyboardInterrupt
        return noisy(genome, tokens, seed)

    def run(folder: str) -> Evolution:
        stages = Stages("0" * 64, Store(tmp_path / folder))
        return evolve((0, 9, 2), mutate, stopping, chosen, stages=stages)

    with stages_of() as names:
        whole = run("whole")
    assert len(names) >= chosen.generations / 2
    resumed, parts = in_parts(lambda: run("parts"), names, random)
    assert resumed == whole and parts == [[name] for name in names]

    measured.clear()
    whole = run("whole")
    assert not measured  # nothing is measured again
    count = len(names)
    stop = random.randrange(2, 6 * count)
    with pytest.raises(KeyboardInterrupt):
        run("amid")
    stop = None
    assert run("amid") == whole


def test_no_neighbors_and_no_numbers() -> None:
    assert evolve((1,), lambda *_: None, distance, given_settings()).best == (1,)
    worse = evolve(
        (5, 5), mutate, lambda g, *_: 0.0 if g == (5, 5) else float("nan"), given_settings()
    )
    assert worse.best == (5, 5)


@pytest.mark.parametrize(
    "wrong",
    [{"survivors": (4, 2)}, {"survivors": (2, 4, 1)}, {"tokens": (1, 2)}, {"tokens": (0, 1, 2)}],
)
def test_stages_that_do_not_fit(wrong: dict) -> None:
    with pytest.raises(ValidationError, match="survivors must fall|tokens must be positive"):
        given_settings(**wrong)
