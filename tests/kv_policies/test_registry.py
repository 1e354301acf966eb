# SPDX-License-Identifier: Apache-2.0
"""Policies of other packages are checked when they are built."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from compress_common.errors import CompressError
from kv_policies import registry
from kv_policies.base import Capabilities, Context, KVPolicy, NoSettings, QueryFreePolicy
from kv_policies.registry import build_policy, policies


class Whole(QueryFreePolicy):
    name: ClassVar[str] = "whole"
    capabilities: ClassVar[Capabilities] = Capabilities(frozenset(), False, False, "")

    def score(self, context: Context) -> torch.Tensor:
        return torch.zeros(len(context.lengths), 1, context.tokens)


class Partial:
    """As ``Whole``, from before policies stated their memory."""

    name = "partial"
    settings_type = NoSettings
    capabilities = Whole.capabilities

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    first_query, observe, score = Whole.first_query, Whole.observe, Whole.score


class PartialLatents(Whole):
    name = "latents"
    capabilities = replace(Whole.capabilities, content="latents")


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = (Whole, Partial, PartialLatents)
    monkeypatch.setattr(registry, "KV_POLICIES", replace(registry.KV_POLICIES, built_in=found))


def test_a_policy_that_is_complete_is_built() -> None:
    assert isinstance(build_policy("whole", {}), KVPolicy) and "partial" in policies()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "partial",
            "'partial' .*Partial. is no KVPolicy: it lacks decode_queries, .*transient; upgrade",
        ),
        ("latents", "is no LatentPolicy: it lacks form, most_tokens, recent;"),
    ],
)
def test_a_policy_that_lacks_members_is_refused(name: str, told: str) -> None:
    with pytest.raises(CompressError, match=told):
        build_policy(name, {})
