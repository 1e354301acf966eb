# SPDX-License-Identifier: Apache-2.0
"""The commands of ``vllm-compress``, one a file; ``vllm_plugin.cli`` puts them together."""
