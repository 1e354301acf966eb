# SPDX-License-Identifier: Apache-2.0
"""What this plugin noted in a checkpoint that it wrote, whichever config of vLLM serves it."""

from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig

from quant_methods.formats.checkpoint_formats import MARKER


def marker_of(config: VllmConfig) -> Mapping[str, Any] | None:
    """Return the marker of the checkpoint; None: this plugin did not write it.

    It is read from the model's config: vLLM's own AWQ serves the awq format, without our config.

    Args:
        config: vLLM's own, of this engine.
    """
    model = config.model_config
    for hf_config in (model.hf_config, model.hf_text_config):
        written = getattr(hf_config, "quantization_config", None)
        if isinstance(written, Mapping) and isinstance(written.get(MARKER), Mapping):
            return written[MARKER]
    return None
