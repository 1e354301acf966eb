# SPDX-License-Identifier: Apache-2.0
"""Policies by name: ours, and third parties' through an entry-point group. Fails closed."""

from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

from kv_policies.base import KVPolicy
from kv_policies.errors import KVPolicyError, joined
from kv_policies.key_diff import KeyDiff
from kv_policies.prefix_kv import PrefixKV
from kv_policies.recent import Recent
from kv_policies.snap_kv import SnapKV

ENTRY_POINT_GROUP = "vllm_compress.kv_policies"
_BUILT_IN: tuple[type[KVPolicy], ...] = (PrefixKV, SnapKV, KeyDiff, Recent)


def policies() -> dict[str, type[KVPolicy]]:
    """Every registered policy; KVPolicyError when two claim one name."""
    found: dict[str, type[KVPolicy]] = {policy.name: policy for policy in _BUILT_IN}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        policy = entry.load()
        if found.setdefault(policy.name, policy) is not policy:
            raise KVPolicyError(
                f"entry point {entry.name!r} ({entry.value}) registers KV policy {policy.name!r}, "
                "which exists; rename or uninstall it"
            )
    return found


def nearest(name: str, valid: list[str]) -> str:
    """``; did you mean 'x'?`` when a valid name is close, else nothing."""
    close = get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def build_policy(name: str, settings: dict[str, Any]) -> KVPolicy:
    """The policy with validated settings; KVPolicyError lists every bad key and value at once."""
    known = policies()
    if name not in known:
        raise KVPolicyError(
            f"unknown KV policy {name!r}{nearest(name, list(known))} "
            f"(registered: {', '.join(sorted(known))})"
        )
    kind = known[name]
    try:
        return kind(kind.settings_type(**settings))
    except ValidationError as error:
        raise joined(explain(error, name, list(kind.settings_type.model_fields))) from error


def explain(error: ValidationError, where: str, valid: list[str]) -> list[str]:
    """One line per problem of a pydantic error, with the nearest valid name for unknown keys."""
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(
                f"{where}: unknown setting {path!r}{nearest(path, valid)} "
                f"(valid: {', '.join(valid) or 'none'})"
            )
        elif problem["type"] == "missing":
            lines.append(f"{where}: {path!r} is missing")
        else:
            at = f"{where}.{path}" if path else where
            lines.append(f"{at}: {problem['msg']}, got {problem['input']!r}")
    return lines
