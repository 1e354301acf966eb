# SPDX-License-Identifier: Apache-2.0
"""Whether LoRA adapters of the original model fit the quantized one."""

from vllm.config import VllmConfig

from compress_common.errors import CompressError
from quant_methods.formats.checkpoint_formats import MARKER
from vllm_plugin.quantization.config import MethodConfig
from vllm_plugin.settings import WeightSettings

_HINT = (
    "quantize without them (smoothquant_plus does by default, rtn always does), or remove the flag"
)


def lora_problems(
    config: VllmConfig, quant_config: MethodConfig, settings: WeightSettings
) -> list[str]:
    """List what keeps an engine with quantized linears from adapters.

    An adapter reads what its linear reads. Where a fold or a rotation has changed that, it would
    give other numbers, and nothing would say so.

    Args:
        config: vLLM's own, of this engine.
        quant_config: has the method, and the marker of a checkpoint that this plugin wrote.
        settings: ``compress.weights``, which decide at load.
    """
    method = quant_config.method
    if config.lora_config is None or not quant_config.capabilities.smooths:
        return []
    if quant_config.quantizes_at_load:
        try:
            chosen = settings.request(method, tensor_parallel=1).build().settings
        except CompressError:  # among the problems already
            return []
        kept = chosen.keeps_inputs
        problem = f"with these settings {method} changes the inputs of linears"
    else:
        kept = ((quant_config.config or {}).get(MARKER) or {}).get("inputs_kept", False)
        problem = f"{method} changed the inputs of linears in this checkpoint, or did not note it"
    told = f"--enable-lora: {problem} (by folds, alpha or a rotation), which adapters do not expect"
    return [] if kept else [f"{told}; {_HINT}"]
