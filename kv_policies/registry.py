# SPDX-License-Identifier: Apache-2.0
"""Policies by name: ours, and third parties' through an entry-point group."""

from typing import Any, Final

from compress_common.registry import Registry
from kv_policies.base import Policy
from kv_policies.policies.cskv import CSKV
from kv_policies.policies.key_diff import KeyDiff
from kv_policies.policies.prefix_kv import PrefixKV
from kv_policies.policies.recent import Recent
from kv_policies.policies.snap_kv import SnapKV

KV_POLICIES: Final = Registry[Policy](
    noun="KV policy",
    group="vllm_compress.kv_policies",
    built_in=(PrefixKV, SnapKV, KeyDiff, Recent, CSKV),
)


def policies() -> dict[str, type[Policy]]:
    """Every registered policy; CompressError when two claim one name."""
    return KV_POLICIES.classes()


def build_policy(name: str, settings: dict[str, Any]) -> Policy:
    """The policy with validated settings; CompressError lists every bad key and value at once."""
    return KV_POLICIES.build(name, settings)
