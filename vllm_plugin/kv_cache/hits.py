# SPDX-License-Identifier: Apache-2.0
"""Where a prefix-cache hit in a prompt ends, when layers are compressed.

A hit is as long as the shortest of all groups of layers. A compressed group hits up to its first
block that is overwritten. vLLM keeps a sliding window, or a state, only where a request ends and
where it has seen two requests part. Both lie behind that block, so a repeated prompt would hit
nothing. ``windows`` and ``states`` keep them where the hit ends, too.
"""

from collections.abc import Iterable

from kv_policies.layout.base import Layout


def hit_end(layouts: Iterable[Layout], prompt: int) -> int:
    """Find the longest hit, in tokens, that all compressed layers can have.

    Args:
        layouts: Of all compressed layers, at least one.
        prompt: Tokens of the prompt.
    """
    return min(layout.hit_limit(layout.head(prompt)) for layout in layouts)
