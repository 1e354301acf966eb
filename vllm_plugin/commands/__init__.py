# SPDX-License-Identifier: Apache-2.0
"""The commands of ``vllm-compress``, one per file; ``vllm_plugin.cli`` lists them."""
