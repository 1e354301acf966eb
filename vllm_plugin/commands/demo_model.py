# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress demo-model``: the folder of the demo model."""


def demo_model() -> None:
    """Print the folder of the demo model. The first call converts it, which takes 20 seconds."""
    from vllm_plugin.demo_model import demo_model_path

    print(demo_model_path())
