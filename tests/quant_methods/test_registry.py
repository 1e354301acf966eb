# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from pathlib import Path

import pytest

from quant_methods.checkpoint import Checkpoint
from quant_methods.errors import CompressError
from quant_methods.planning import PlanRequest
from quant_methods.registry import build_method, methods


def test_built_in_methods() -> None:
    assert {"smoothquant_plus", "rtn"} <= methods().keys()
    for name, method in methods().items():
        assert method.name == name
        assert method.__doc__


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(CompressError, match="did you mean 'smoothquant_plus'"):
        build_method("smoothquant", {})


def test_all_bad_settings_are_listed_at_once() -> None:
    with pytest.raises(CompressError) as caught:
        build_method("smoothquant_plus", {"groupsize": 64, "alpha": 3})
    text = str(caught.value)
    assert "did you mean 'group_size'" in text
    assert "smoothquant_plus.alpha" in text
    assert "2 problems" in text


def test_a_new_revision_does_not_reuse_cached_plans(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tiny_model("llama"))
    before = PlanRequest().key(checkpoint)
    assert PlanRequest().key(checkpoint) == before
    monkeypatch.setattr(methods()["smoothquant_plus"], "revision", 99)
    assert PlanRequest().key(checkpoint) != before
    assert PlanRequest(settings={"alpha": 0.5}).key(checkpoint) != before
