# SPDX-License-Identifier: Apache-2.0
"""The matrix of models: how cells are judged, and the table in the docs."""

from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import models_table
from benchmarks.architectures import FAMILIES
from benchmarks.models_cells import BAD, FAILED, kv_cell, shortened, stock_cell, weights_cell
from benchmarks.models_kv import Kept
from kv_policies.base import Context
from kv_policies.layout.tokens import TokenLayout
from kv_policies.registry import build_policy
from kv_policies.select import select
from tests.support.benchmark import smoke
from tests.support.child import ROOT

DOCUMENT = ROOT / "docs" / "models.md"
ACCEPTED = dict.fromkeys(("doctor", "plan", "edge"))
REFUSED = dict.fromkeys(ACCEPTED, "CompressError: no layer with full attention")
STOCK: dict[str, Any] = {
    "tokens": [[5, 6], [7, 8]],
    "nats": [[1.0, 2.0], [3.0, 4.0]],
    "judged": {"tokens": [[5, 6], [7, 8]], "nats": [[1.0, 2.0], [3.0, 4.0]]},
}
CLEAN = {"freed": 0, "leaked": 0, "remembers": 0}
WHOLE = CLEAN | {"tokens": STOCK["tokens"]}
QUARTER = CLEAN | {"tokens": [[5, 9], [7, 9]], "freed": 7, "nats": [[1.0, 2.0], [3.0, 4.0]]}
CHOSEN, PLAIN = [[1.0, 2.0001], [3.0, 4.0]], [[1.0, 2.1], [3.0, 4.1]]
INT4 = {"nats": [[1.0, 2.0]], "rounded": [[1.01, 2.01]], "plain": [[1.3, 2.3]]}


@pytest.mark.parametrize(
    ("whole", "quarter", "state"),
    [
        ({}, {}, "ok"),
        ({}, {"nats": [[1.0, 2.01], [3.0, 4.0]]}, "wrong"),  # not what the kept tokens give
        ({}, {"nats": PLAIN}, "wrong"),  # what the whole cache gives
        ({"tokens": [[5, 6], [7, 7]]}, {}, "wrong"),
        ({"freed": 1}, {}, "wrong"),
        ({}, {"freed": 0}, "wrong"),  # it silently did nothing
        ({}, {"leaked": 1}, "wrong"),
        ({}, {"remembers": 1}, "wrong"),
        ({}, {"tokens": [[5, 9], [8, 9]]}, "wrong"),
    ],
)
def test_a_policy_is_judged(whole: dict, quarter: dict, state: str) -> None:
    ours = {"whole": WHOLE | whole, "quarter": QUARTER | quarter, "chosen": CHOSEN, "plain": PLAIN}
    assert kv_cell(ACCEPTED, STOCK, ours, sixteen=False).state == state


def test_in_bfloat16_other_tokens_may_be_chosen() -> None:
    ours = {"whole": WHOLE, "quarter": QUARTER, "chosen": [[1.0, 2.05], [3.0, 4.0]], "plain": PLAIN}
    assert kv_cell(ACCEPTED, STOCK, ours, sixteen=False).state == "wrong"
    assert kv_cell(ACCEPTED, STOCK, ours, sixteen=True).state == "ok"
    assert kv_cell(ACCEPTED, STOCK, ours | {"chosen": [[1.5, 2.0], [3.0, 4.0]]}, True).state != "ok"


@given(st.integers(128, 400), st.sampled_from([16, 32, 48]), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_the_reference_keeps_what_snap_kv_keeps(tokens: int, block: int, seed: int) -> None:
    votes = torch.rand(2, tokens, generator=torch.Generator().manual_seed(seed))
    lengths, layout = torch.tensor([tokens]), TokenLayout(block, Fraction(1, 4), min_prompt=0)
    scores = build_policy("snap_kv", {}).score(
        Context(0, lengths, tokens, observed=votes[None], kept=lengths // 4)
    )
    whole = tokens // block * block
    count = layout.kept(tokens // block) * block if tokens >= -(-128 // block) * block else whole
    chosen = select(scores, torch.tensor([whole]), torch.tensor([count]))[0].tolist()
    kept = Kept(Fraction(1, 4), block).of_prompt(votes)
    for head in range(2):
        assert kept[head].nonzero()[:, 0].tolist() == [*chosen[head], *range(whole, tokens)]


@pytest.mark.parametrize(
    ("rounded", "plain", "state"),
    [
        ([[1.01, 2.01]], [[1.3, 2.3]], "ok"),
        ([[1.07, 2.07]], [[1.3, 2.3]], "wrong"),
        ([[1.05, 2.05]], [[1.06, 2.06]], "wrong"),  # as far from what it should be as from 16 bits
        ([[1.01, 2.01]], [[2.1, 3.1]], "wrong"),  # rounded as it should be, and destroyed
    ],
)
def test_weights_are_judged(rounded: list, plain: list, state: str) -> None:
    ours = INT4 | {"rounded": rounded, "plain": plain}
    assert weights_cell(ACCEPTED, STOCK, ours).state == state


@pytest.mark.parametrize("judge", [partial(kv_cell, sixteen=False), weights_cell])
@pytest.mark.parametrize(
    ("said", "stock", "ours", "state"),
    [
        (REFUSED, STOCK, {}, "refused"),
        (REFUSED | {"plan": None}, STOCK, {}, "late"),
        (ACCEPTED | {"edge": "CompressError: no"}, STOCK, {}, "late"),
        (dict.fromkeys(ACCEPTED, "KeyError: 'x'"), STOCK, {}, "crash"),
        (REFUSED | {"plan": "KeyError: 'x'"}, STOCK, {}, "crash"),
        (ACCEPTED | {"plan": "KeyError: 'x'"}, STOCK, {}, "crash"),
        (REFUSED | {"doctor": "no layer", "plan": "problem: no layer"}, STOCK, {}, "refused"),
        (ACCEPTED, {FAILED: "IndexError: 3"}, {}, "stock fails"),
        (ACCEPTED, STOCK, {FAILED: "KeyError: 'x'"}, "crash"),
        (ACCEPTED, STOCK, {FAILED: "compress_common.errors.CompressError: no"}, "late"),
        (
            {"unavailable": "ImportError: librosa"},
            {FAILED: "ImportError: librosa"},
            {},
            "stock fails",
        ),
    ],
)
def test_models_that_are_not_served_are_judged(
    judge: Any, said: dict, stock: dict, ours: dict, state: str
) -> None:
    assert judge(said, stock, ours).state == state


def test_stock_is_compared_with_transformers() -> None:
    assert stock_cell(STOCK, sixteen=False).state == "ok"
    near = STOCK | {"nats": [[1.01, 2.0], [3.0, 4.0]]}
    assert stock_cell(near, sixteen=False).state == "differs"
    assert stock_cell(near, sixteen=True).state == "ok"
    other = STOCK | {"tokens": [[5, 6], [7, 9]]}
    assert str(stock_cell(other, sixteen=False)) == "differs: 0 nats, 3 of 4 tokens"
    assert stock_cell({FAILED: "IndexError: 3"}, sixteen=True).state == "stock fails"


def test_a_reason_fits_a_table() -> None:
    assert shortened("x.CompressError: a |\n b") == "a / b"
    assert len(shortened("a" * 1000)) < 200


def test_the_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    document = tmp_path / "models.md"
    document.write_text("before\n<!-- benchmarks.models -->\nold\n<!-- end -->\nafter\n")
    rows = {name: {"stock": "ok", "kv": "ok: 7 freed", "weights": name} for name in FAMILIES}
    models_table.write(document, rows)
    assert models_table.read(document) == rows
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text


def test_the_documented_table_has_every_family_and_nothing_wrong() -> None:
    rows = models_table.read(DOCUMENT)
    assert list(rows) == list(FAMILIES)
    for family, cells in rows.items():
        assert not any(cell.startswith(BAD) for cell in cells.values()), family
    for column in ("kv", "weights"):
        assert sum(cells[column].startswith("ok") for cells in rows.values()) >= 20


@pytest.mark.slow
def test_models(demo_model: Path, tmp_path: Path) -> None:
    contract = {"families", "families_kv", "families_int4", "families_refused_clearly"}
    contract |= {"families_wrong", "fold_derivation_s_max", "fold_derivation_share"}
    line, details = smoke("models", contract, tmp_path / "models.json")
    assert line["families"] == 2 and line["families_wrong"] == 0
    assert line["families_kv"] == line["families_int4"] == line["families_refused_clearly"] == 1
    assert line["fold_derivation_s_max"] < 12
    assert details["gemma2"]["snap_kv"]["quarter"]["freed"] > 0
