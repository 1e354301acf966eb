# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress demo-model``: where the demo model is."""

from vllm_plugin.demo_model import demo_model_path


def demo_model() -> None:
    """Print the folder of the embedded demo model, converting it on first use."""
    print(demo_model_path())
