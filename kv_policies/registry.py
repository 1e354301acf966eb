# SPDX-License-Identifier: Apache-2.0
"""Policies by name: ours, and third parties' through an entry-point group."""

from typing import Any, Final

from typing_extensions import get_protocol_members

from compress_common.errors import CompressError
from compress_common.registry import Registry
from kv_policies.base import KVPolicy, LatentPolicy, Policy
from kv_policies.policies.cskv import CSKV
from kv_policies.policies.expected_attention import ExpectedAttention
from kv_policies.policies.h2o import H2O
from kv_policies.policies.key_diff import KeyDiff
from kv_policies.policies.prefix_kv import PrefixKV
from kv_policies.policies.r_kv import RKV
from kv_policies.policies.recent import Recent
from kv_policies.policies.snap_kv import SnapKV

KV_POLICIES: Final = Registry[Policy](
    noun="KV policy",
    group="vllm_compress.kv_policies",
    built_in=(PrefixKV, SnapKV, H2O, RKV, ExpectedAttention, KeyDiff, Recent, CSKV),
)


def policies() -> dict[str, type[Policy]]:
    """Every registered policy; CompressError when two claim one name."""
    return KV_POLICIES.classes()


def build_policy(name: str, settings: dict[str, Any]) -> Policy:
    """The policy with validated settings.

    Args:
        name: Name of the policy.
        settings: Its settings, not yet validated.

    Raises:
        CompressError: Settings are wrong, and the text lists every bad key and value. Or the policy
            lacks members of its protocol, and the text lists these.
    """
    policy = KV_POLICIES.build(name, settings)
    content = getattr(getattr(policy, "capabilities", None), "content", "tokens")
    protocol = LatentPolicy if content == "latents" else KVPolicy
    members = sorted(get_protocol_members(protocol))
    if missing := [member for member in members if not hasattr(policy, member)]:
        raise CompressError(
            f"KV policy {name!r} ({type(policy).__module__}.{type(policy).__qualname__}) is no "
            f"{protocol.__name__}: it lacks {', '.join(missing)}; upgrade or uninstall its package"
        )
    return policy
