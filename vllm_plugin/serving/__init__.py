# SPDX-License-Identifier: Apache-2.0
"""Compressed models behind Ray Serve. ``ray.serve.llm`` serves; this package prepares its config.

Ray is imported when it is used, so the package loads without the extra ``ray``.
"""

from vllm_plugin.serving.config import llm_config

__all__ = ["llm_config"]
