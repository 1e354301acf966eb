# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from compress_common.errors import CompressError, explain, joined, nearest


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: int
    share: float = 0.5

    @field_validator("share")
    @classmethod
    def _is_a_share(cls, share: float) -> float:
        if share > 9:
            raise ValueError("too much by far")
        if share > 1:
            raise ValueError(f"must be at most 1, got {share}")
        return share

    @model_validator(mode="after")
    def _fits(self) -> "Inner":
        if self.size > 100:
            raise ValueError("does not fit")
        return self


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    inner: Inner
    sizes: list[int] = []


def problems(kind: type[BaseModel], values: dict[str, Any]) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        kind(**values)
    return explain(caught.value, "top", kind.model_fields)


def test_one_problem_is_the_message_and_more_are_a_list() -> None:
    assert isinstance(joined(["a"]), CompressError) and str(joined(["a"])) == "a"
    assert str(joined(["a", "b"])) == "2 problems:\n  - a\n  - b"


def test_nearest() -> None:
    assert nearest("groupsize", ["alpha", "group_size"]) == "; did you mean 'group_size'?"
    assert nearest("groupsize", ["alpha"]) == nearest("x", []) == ""


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"size": 1, "shar": 1},
            "top: unknown setting 'shar'; did you mean 'share'? (valid: size, share)",
        ),
        ({"share": 1}, "top: 'size' is missing"),
        ({"size": 1, "share": 2}, "top.share: must be at most 1, got 2.0"),
        ({"size": 1, "share": 10}, "top.share: too much by far, got 10"),
        ({"size": 101}, "top: does not fit"),
    ],
)
def test_each_problem_is_one_line(values: dict[str, Any], expected: str) -> None:
    assert problems(Inner, values) == [expected]
    nested = expected.partition("; did you mean")[0]  # pydantic does not say what a section allows
    assert problems(Outer, {"inner": values}) == [nested.replace("top", "top.inner", 1)]


def test_all_problems_are_listed() -> None:
    lines = problems(Outer, {"inner": {"share": 2}, "sizes": [1, None], "more": 1})
    assert lines == [
        "top.inner: 'size' is missing",
        "top.inner.share: must be at most 1, got 2.0",
        "top.sizes.1: Input should be a valid integer, got None",
        "top: unknown setting 'more' (valid: inner, sizes)",
    ]


def test_a_model_without_settings_allows_none() -> None:
    class Empty(BaseModel):
        model_config = ConfigDict(extra="forbid")

    assert problems(Empty, {"a": 1}) == ["top: unknown setting 'a' (valid: none)"]
