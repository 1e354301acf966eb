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
    if (marker := depth_marker(config)) is None:
        return None
    try:
        gone, before = ranges(map(int, marker["dropped"])), int(marker["source_layers"])
    except (KeyError, TypeError, ValueError):
        return "blocks were dropped; its note of which ones is damaged"
    return f"blocks {gone} of {before} are gone, healed by {marker.get('heal', 'none')}"
