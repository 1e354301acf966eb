# SPDX-License-Identifier: Apache-2.0
"""What scores decode windows, and from how many queries."""

from typing import Final

from kv_policies.base import KVPolicy, Policy
from kv_policies.layout.base import Layout
from kv_policies.policies.key_diff import KeyDiff, KeyDiffSettings
from kv_policies.workspace import QUERIES

_RECENT: Final = 0.125  # share of what stays of a window that is its last tokens


def window_policy(policy: KVPolicy) -> KVPolicy:
    """What scores decode windows: the policy, or key_diff where it needs queries of a prompt.

    key_diff alone forgets what was just generated, which costs more of a text than it gains.
    """
    if policy.capabilities.needs_queries and not policy.decode_queries:
        return KeyDiff(KeyDiffSettings(recent=_RECENT))
    return policy


def window_queries(policy: Policy, layout: Layout) -> int:
    """Last queries of a decode window that score it; 0: none do, or nothing is compacted."""
    if not isinstance(policy, KVPolicy) or not layout.compacts_windows:
        return 0
    return min(policy.decode_queries, layout.window, QUERIES)


def describe_windows(policy: Policy, window: int) -> str:
    """What happens to generated tokens, for a log.

    Args:
        policy: What scores prompts.
        window: Generated tokens per decode window, 0 for none.
    """
    if not window:
        return "generated tokens are kept"
    windows = f"decode windows of {window}"
    if not isinstance(policy, KVPolicy):
        return windows
    scorer, why = window_policy(policy), ""
    if scorer is not policy:
        why = f", because {policy.name} needs queries and decode_queries is 0"
    elif policy.capabilities.needs_queries:
        why = f", from {min(policy.decode_queries, window)} queries each"
    return f"{windows} scored by {scorer.name}{why}"
