# SPDX-License-Identifier: Apache-2.0
"""What ``vllm-compress prune`` noted in a checkpoint. Imports neither torch nor vLLM."""

from collections.abc import Mapping
from typing import Any

from depth_pruning.cutting import MARKER, ranges


def depth_marker(config: Any) -> Mapping[str, Any] | None:
    """Return what was noted of the blocks that are gone; None: none are.

    Args:
        config: The model's ``transformers`` config.
    """
    marker = getattr(config, MARKER, None)
    return marker if isinstance(marker, Mapping) else None


def described(config: Any) -> str | None:
    """Return one line that says which blocks are gone; None: none are.

    Args:
        config: The model's ``transformers`` config.
    """
    marker = depth_marker(config)
    return None if marker is None else _described(marker)


def _described(marker: Mapping[str, Any]) -> str:
    try:
        gone, depth = ranges(map(int, marker["dropped"])), int(marker["source_layers"])
    except (KeyError, TypeError, ValueError):
        return "blocks were dropped; its note of which ones is damaged"
    told = f"blocks {gone} of {depth} are gone, healed by {marker.get('heal', 'none')}"
    before = marker.get("before")
    return f"{told}; before that, {_described(before)}" if isinstance(before, Mapping) else told
