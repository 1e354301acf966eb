# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress demo-model``: where the demo model is."""


def demo_model() -> None:
    """Print the folder of the embedded demo model, converting it on first use."""
    from vllm_plugin.demo_model import demo_model_path

    print(demo_model_path())
