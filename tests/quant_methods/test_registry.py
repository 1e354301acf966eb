# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from pathlib import Path

import pytest

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from quant_methods.plan_request import PlanRequest
from quant_methods.registry import build_method, methods


def test_built_in_methods() -> None:
    assert {"smoothquant_plus", "rtn"} <= methods().keys()
    for name, method in methods().items():
        assert method.name == name
        assert method.__doc__


def test_messages_name_the_nearest_method_and_setting() -> None:
    with pytest.raises(
        CompressError, match="method 'smoothquant'; did you mean 'smoothquant_plus'"
    ):
        build_method("smoothquant", {})
    with pytest.raises(CompressError, match="did you mean 'group_size'"):
        build_method("smoothquant_plus", {"groupsize": 64})


def test_a_new_revision_does_not_reuse_cached_plans(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tiny_model("llama"))
    before = PlanRequest().key(checkpoint)
    assert PlanRequest().key(checkpoint) == before
    monkeypatch.setattr(methods()["smoothquant_plus"], "revision", 99)
    assert PlanRequest().key(checkpoint) != before
    assert PlanRequest(settings={"alpha": 0.5}).key(checkpoint) != before
