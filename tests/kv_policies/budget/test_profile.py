# SPDX-License-Identifier: Apache-2.0
import json
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import pytest

from compress_common.errors import CompressError
from kv_policies.budget.profile import Profile, Provenance, load
from tests.support.kv_files import fingerprint

MODEL = fingerprint(num_hidden_layers=6)
FRACTIONS = tuple(Fraction(n, 1000) for n in (700, 300, 100, 150, 50, 200))


def profile(**changes: Any) -> Profile:
    values: dict[str, Any] = {
        "model": MODEL,
        "keep": "0.25",
        "levels": 3,
        "layers": range(6),
        "fractions": FRACTIONS,
        "provenance": Provenance(
            tool_version="0.1.0",
            created="2026-01-01T00:00:00Z",
            text="t",
            samples=1,
            sample_tokens=9,
        ),
    }
    return Profile(**(values | changes))


def test_round_trip_is_exact_and_stable(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profile().save(path)
    first = path.read_bytes()
    again = load(path, MODEL)
    assert again == profile() and again.fractions == FRACTIONS
    again.save(path)
    assert path.read_bytes() == first
    content = json.loads(first)
    assert content["schema"] == "vllm-compress/kv-profile" and content["version"] == 2
    assert content["keep"] == "1/4" and content["fractions"][4] == "1/20"


def test_an_edited_profile_is_refused_unless_it_says_so(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profile().save(path)
    content = json.loads(path.read_text())
    content["fractions"][:2] = ["1/2", "1/2"]  # the same mean: nothing else would notice
    for digest in (content["sha256"], "", 1):
        path.write_text(json.dumps(content | {"sha256": digest}))
        with pytest.raises(CompressError, match='was changed.*set "sha256" to null; or make it'):
            load(path)
    del content["sha256"]
    path.write_text(json.dumps(content))
    with pytest.raises(CompressError, match="was changed"):
        load(path)
    path.write_text(json.dumps(content | {"sha256": None}))
    assert load(path).fractions[:2] == (Fraction(1, 2), Fraction(1, 2))


def test_a_byte_that_changes_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profile().save(path)
    whole, random = path.read_bytes(), Random(0)
    for at in range(len(whole)):
        path.write_bytes(
            whole[:at] + bytes([whole[at] ^ 1 << random.randrange(8)]) + whole[at + 1 :]
        )
        try:
            found = load(path)
        except CompressError:
            continue
        assert found == profile(), "only what means the same, such as a space, may differ"


def test_a_profile_may_be_written_otherwise(tmp_path: Path) -> None:
    """The digest is of what a profile says, not of spaces and the order of keys."""
    path = tmp_path / "p.json"
    profile().save(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content, sort_keys=True).replace('"1/4"', "0.25"))
    assert load(path) == profile()


def test_cut_keeps_the_budget() -> None:
    levels = profile().cut()
    assert levels.level_of == (2, 2, 0, 1, 0, 1)
    assert levels.fractions == (Fraction(75, 1000), Fraction(175, 1000), Fraction(1, 2))
    assert sum(levels.per_layer) == 6 * Fraction(1, 4)
    assert profile().cut(6).per_layer == list(FRACTIONS)


def test_another_model_is_refused_with_every_difference(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profile().save(path)
    renamed = fingerprint(num_hidden_layers=6, name="/models/my-tiny")
    assert load(path, renamed).model.name == "tiny"
    other = fingerprint(num_hidden_layers=8, head_dim=32, name="big")
    with pytest.raises(CompressError) as caught:
        load(path, other)
    text = str(caught.value)
    assert "2 problems" in text and "num_hidden_layers is 6" in text and "head_dim is 8" in text
    assert "vllm-compress profile big" in text
    with pytest.raises(CompressError, match="layers 0-5, the engine compresses 0-1, 5"):
        load(path, MODEL, layers=[0, 1, 5])


def test_all_problems_of_a_file_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profile().save(path)
    content = json.loads(path.read_text())
    content["keeep"] = 1
    content["fractions"][2] = "7/5"
    del content["provenance"]["samples"]
    path.write_text(json.dumps(content))
    with pytest.raises(CompressError) as caught:
        load(path)
    text = str(caught.value)
    assert "3 problems" in text and "did you mean 'keep'" in text
    assert "fractions.2" in text and "provenance: 'samples' is missing" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": "1/2"}, "mean of the fractions is 1/4, keep is 1/2"),
        ({"layers": (0, 1, 2)}, "3 layers but 6 fractions"),
        ({"layers": (0, 1, 2, 3, 4, 9)}, "outside 0 to 5"),
        ({"layers": (1, 0, 2, 3, 4, 5)}, "not ascending"),
        ({"levels": 4}, "possible: 1, 2, 3, 6"),
    ],
)
def test_inconsistent_profiles(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile(**changes)


def test_files_that_are_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    with pytest.raises(CompressError, match="cannot read .*vllm-compress profile MODEL"):
        load(path)
    for content, message in (
        ("{", "is not JSON"),
        ("[]", "not a KV profile"),
        ('{"schema": "vllm-compress/kv-profile", "version": 1}', "reads version 2"),
    ):
        path.write_text(content)
        with pytest.raises(CompressError, match=message):
            load(path)
