# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ConfigDict, Field

from compress_common.errors import CompressError
from compress_common.registry import Named, Registry


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    group_size: int = 128
    alpha: float = Field(0.5, le=1)


class First:
    name: ClassVar[str] = "first"
    settings_type: ClassVar[Any] = Settings

    def __init__(self, settings: Any) -> None:
        self.settings = settings


class Second(First):
    name = "second"


class Entry:
    """Stands in for an entry point of another package."""

    def __init__(self, target: Any) -> None:
        self.name = self.value = "other"
        self.target = target

    def load(self) -> Any:
        if isinstance(self.target, Exception):
            raise self.target
        return self.target


REGISTRY = Registry[Named](noun="method", group="tests.no_such_group", built_in=(First, Second))


def install(monkeypatch: pytest.MonkeyPatch, *targets: Any) -> Registry[Named]:
    """A registry that has not looked yet; it looks once."""

    def entry_points(group: str) -> list[Entry]:
        assert group == REGISTRY.group
        return [Entry(target) for target in targets]

    monkeypatch.setattr("compress_common.registry.entry_points", entry_points)
    return replace(REGISTRY)


def test_built_in_classes_are_built_with_validated_settings() -> None:
    assert REGISTRY.classes() == {"first": First, "second": Second}
    built = REGISTRY.build("second", {"group_size": "64"})
    assert isinstance(built, Second) and built.settings == Settings(group_size=64)


def test_classes_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    third = type("Third", (First,), {"name": "third"})
    registry = install(monkeypatch, third, third, First)  # the same class twice is no conflict
    assert registry.classes() == {"first": First, "second": Second, "third": third}
    assert isinstance(registry.build("third", {}), third)


def test_two_classes_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = install(monkeypatch, type("Other", (First,), {"name": "second"}))
    with pytest.raises(CompressError, match="registers method 'second', which exists"):
        registry.classes()


@pytest.mark.parametrize(
    "target", [ImportError("no module 'x'"), TypeError("unexpected keyword 'y'"), object()]
)
def test_an_entry_point_that_cannot_be_used_is_refused(
    monkeypatch: pytest.MonkeyPatch, target: Any
) -> None:
    registry = install(monkeypatch, target)
    with pytest.raises(CompressError, match="'other'.*gives no method: .*; repair or uninstall"):
        registry.build("first", {})


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(CompressError) as caught:
        REGISTRY.build("firs", {})
    expected = "unknown method 'firs'; did you mean 'first'? (registered: first, second)"
    assert str(caught.value) == expected


def test_all_bad_settings_are_listed_at_once() -> None:
    with pytest.raises(CompressError) as caught:
        REGISTRY.build("first", {"groupsize": 64, "alpha": 3})
    assert str(caught.value) == (
        "2 problems:\n"
        "  - first.alpha: Input should be less than or equal to 1, got 3\n"
        "  - first: unknown setting 'groupsize'; did you mean 'group_size'? "
        "(valid: group_size, alpha)"
    )


def test_neither_torch_nor_vllm_is_imported() -> None:
    check = "import sys, compress_common.registry; assert not {'torch', 'vllm'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", check], check=True)
