# SPDX-License-Identifier: Apache-2.0
"""How vLLM groups the layers of a model into KV caches: 0.33 moved it to a module of its own."""

try:
    from vllm.v1.core.kv_cache_planning import (
        _project_kv_cache_groups_to_worker as projected,
    )
    from vllm.v1.core.kv_cache_planning import (
        get_kv_cache_config_from_groups,
        get_kv_cache_groups,
    )
except ImportError:
    from vllm.v1.core.kv_cache_utils import (
        _project_kv_cache_groups_to_worker as projected,
    )
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups

__all__ = ["get_kv_cache_config_from_groups", "get_kv_cache_groups", "projected"]
