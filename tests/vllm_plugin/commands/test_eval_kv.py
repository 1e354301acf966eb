# SPDX-License-Identifier: Apache-2.0
"""`vllm-compress eval-kv`: its figures, its refusals, and what it measures of a real model."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from compress_common.errors import CompressError
from vllm_plugin.commands.judging.figures import recall
from vllm_plugin.commands.judging.questions import WORDINGS, ask_for_keys, is_answered

SMALL = ("--windows", 2, "--keys", 1, "--context", 320)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_recall_is_a_share_of_what_is_known_and_its_error_is_never_0(
    pairs: list[tuple[bool, bool]],
) -> None:
    ours, known = (list(each) for each in zip(*pairs, strict=True))
    share, error, count = recall(ours, known)
    assert count == sum(known)
    if not count:
        assert (share, error) == (None, None)
        return
    assert share == sum(a for a, b in pairs if b) / count
    assert error is not None and 0 < error <= 0.25


def test_more_answers_make_the_error_smaller() -> None:
    errors = [recall([True] * n, [True] * n)[1] for n in (1, 4, 16, 64)]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == 4
    # 16 of 16: 18 of 20 are assumed.
    assert errors[2] == pytest.approx((0.9 * 0.1 / 20) ** 0.5)


def test_settings_are_read_and_named() -> None:
    from vllm_plugin.commands.common import kv_setting
    from vllm_plugin.commands.kv_evaluation import setting_name

    section = kv_setting("r_kv,budget=1024, importance=0.2")
    assert section == {"policy": "r_kv", "budget": 1024, "importance": 0.2}
    assert setting_name(section) == "r_kv, budget 1024, importance 0.2"
    assert kv_setting("cskv,bases=a/b.safetensors") == {
        "policy": "cskv",
        "bases": "a/b.safetensors",
    }
    assert setting_name({"policy": "cskv", "bases": "a/b.safetensors"}) == (
        "cskv, bases b.safetensors"
    )
    with pytest.raises(CompressError, match="'0.25' is not KEY=VALUE"):
        kv_setting("snap_kv,0.25")


def test_settings_with_files_of_one_name_are_told_apart() -> None:
    from vllm_plugin.commands.kv_evaluation import named_settings

    sections = [{"policy": "cskv", "bases": f"{place}/b.safetensors"} for place in ("x", "y", "x")]
    sections[2]["policy"] = "other"
    assert named_settings(sections) == [
        ("cskv, bases x/b.safetensors", sections[0]),
        ("cskv, bases y/b.safetensors", sections[1]),
        ("other, bases b.safetensors", sections[2]),
    ]


def test_the_table_fits_80_columns() -> None:
    from vllm_plugin.commands.evaluate_kv import comparison
    from vllm_plugin.commands.kv_evaluation import KVEvaluation

    worse = dict.fromkeys(WORDINGS, 1.0) | {"dialogue": 0.25}
    rows = [
        KVEvaluation("full cache", 1, 2.5, 0, 0, 14, 0.9, 0.1, worse, 0.5, 0.1),
        KVEvaluation("snap_kv", 0.25, 2.6, 0.1234, 0.0321, 14, 0.8125, 0.1, worse, 0.5, 0.12),
        KVEvaluation("recent", 0.25, 2.6, 0.1234, None, 0, None, None, {"a": None}, None, None),
    ]
    console = Console(width=80, file=io.StringIO())
    console.print(comparison(rows))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "+0.1234 ± 0.0321" in text and "0.81 ± 0.10" in text and "0.25 dialogue" in text
    lines = [line for line in text.splitlines() if line.lstrip().startswith("#")]
    assert len(lines) == 3 and lines[2].split() == ["#3", "0.25", "+0.1234", "-", "-", "-"]


def test_each_wording_hides_its_key_and_asks_for_it(demo_model: Path) -> None:
    import random

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    assert len(WORDINGS) >= 4
    for wording in WORDINGS:
        draw = random.Random(1)
        for question in ask_for_keys(tokenizer, wording, [(300, 0.1), (600, 0.9)], draw):
            told = tokenizer.decode(question.told)
            before = len(tokenizer.encode(told[: told.index(question.answer)]))
            assert told.count(question.answer) == 1
            assert before / question.length == pytest.approx(question.depth, abs=0.1)
            assert question.answer not in tokenizer.decode(question.ask)
            assert question.prompt == question.told + question.ask
            assert is_answered(f' "{question.answer}" is 7', question.answer)
            assert not is_answered(f"7 or {question.answer}", question.answer)


def test_everything_wrong_is_said_before_an_engine_starts(
    run: Callable, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_plugin.commands import kv_evaluation

    monkeypatch.setattr(kv_evaluation, "judge", lambda *_: pytest.fail("an engine was started"))
    model = tiny_model("llama")
    settings = (
        *("snapkv,keep=0.5", "snap_kv,keep=2", "r_kv,budget=1024", "cskv,bases=nowhere"),
        "snap_kv,keep=0.5,min_prompt=400",
    )
    flags = [word for setting in settings for word in ("--kv", setting)]
    code, _, err = run("eval-kv", model, "--keep", 0.5, *flags, *SMALL)
    assert code == 1
    for problem in (
        "no policy, keep 0.5: ",
        "did you mean 'snap_kv'",
        "snap_kv, keep 2: ",
        "r_kv, budget 1024: compress.kv.budget is 1024, and requests have at most 448 tokens",
        "snap_kv, keep 0.5, min_prompt 400 keeps all of a prompt of 320 tokens",
        "cskv, bases nowhere: ",
    ):
        assert problem in err, (problem, err)
    _, _, err = run("eval-kv", "./nowhere", "--text", "nowhere.txt", "--engine-args", "{")
    for problem in (
        "no setting is given",
        "./nowhere does not exist",
        "--text nowhere.txt is not a file",
        "--engine-args is not JSON",
    ):
        assert problem in err, (problem, err)
    _, _, err = run("eval-kv", model, "--kv", "snap_kv,keep=0.5", "--context", 2000)
    assert "2,048 positions; lower --context" in err
    _, _, err = run("eval-kv", model, "--kv", "snap_kv,keep=0.5", "--engine-args", '{"x": 1}')
    assert "--engine-args: " in err and "'x'" in err
    _, _, err = run("eval-kv", model, "--kv", "snap_kv", "--kv", "recent,0.5")
    assert "'0.5' is not KEY=VALUE" in err


def test_a_tiny_model_is_judged(run: Callable, tiny_model: Callable[..., Path]) -> None:
    """A random model recalls no key, which is said; its nats are those of other blocks."""
    model = tiny_model("llama")
    code, output, errors = run("eval-kv", model, "--kv", "recent,keep=0.25", *SMALL, "--json")
    assert code == 0, errors
    answer = json.loads(output)
    assert (answer["model"], answer["windows"], answer["keys"]) == (str(model), 2, 1)
    full, ours = answer["settings"]
    assert (full["setting"], ours["setting"]) == ("full cache", "recent, keep 0.25")
    assert full["nats_difference"] == full["standard_error"] == 0
    assert ours["kept"] == pytest.approx(0.3)  # 3 of 10 blocks of 32
    assert ours["nats_difference"] != 0 and ours["standard_error"] > 0
    assert ours["nats"] == pytest.approx(full["nats"] + ours["nats_difference"])
    assert full["keys"] == 0 and ours["recall"] is None and ours["later"] is None


@pytest.mark.slow
def test_the_demo_model_forgets_what_recent_drops(run: Callable, demo_model: Path) -> None:
    settings = ("snap_kv,keep=0.25", "recent,keep=0.25")
    flags = [word for setting in settings for word in ("--kv", setting)]
    code, output, errors = run(
        "eval-kv", demo_model, *flags, "--windows", 6, "--context", 512, "--json"
    )
    assert code == 0, errors
    rows: list[dict[str, Any]] = json.loads(output)["settings"]
    full, snap, recent = rows
    assert full["keys"] >= 14 and full["recall"] == full["keys"] / 16
    assert snap["recall"] > 0.8 > recent["recall"]
    # Asked for later, snap_kv has chosen by the end of the filler.
    assert full["later"] > 0.8 > snap["later"]
    for row in (snap, recent):
        assert row["kept"] == pytest.approx(0.25)
        assert 0 < row["nats_difference"] < 0.6 and 0 < row["standard_error"] < 0.2
