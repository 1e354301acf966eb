# SPDX-License-Identifier: Apache-2.0
"""Whether LoRA adapters of the original model fit the quantized or pruned one."""

from vllm.config import VllmConfig

from compress_common.errors import CompressError
from depth_pruning.cutting import MARKER
from quant_methods.registry import methods
from vllm_plugin.depth import described
from vllm_plugin.quantization.config import MethodConfig
from vllm_plugin.quantization.marker import marker_of
from vllm_plugin.settings import WeightSettings

_HINT = (
    "quantize without them (smoothquant_plus does by default, rtn always does), or remove the flag"
)


def lora_problems(config: VllmConfig, settings: WeightSettings) -> list[str]:
    """List what keeps an engine with quantized linears or dropped blocks from adapters.

    An adapter reads what its linear reads. Where a fold or a rotation has changed that, it would
    give other numbers, and nothing would say so. In a pruned model vLLM would add it to other
    blocks, by their new numbers. Checkpoints of other tools are vLLM's affair.

    Args:
        config: vLLM's own, of this engine.
        settings: ``compress.weights``, which decide at load.
    """
    if config.lora_config is None:
        return []
    return _pruned_problems(config) + _input_problems(config, settings)


def _pruned_problems(config: VllmConfig) -> list[str]:
    """List what keeps adapters from a pruned model: blocks have other numbers than before."""
    if (told := described(config.model_config.hf_config)) is None:
        return []
    why = "vLLM would add adapters of the original model to the wrong blocks"
    hint = "merge the adapter into the original and prune the result, or remove the flag"
    own = f"for adapters trained on this checkpoint, remove {MARKER} from its config.json"
    return [f"--enable-lora: this checkpoint is pruned ({told}), and {why}; {hint}; {own}"]


def _input_problems(config: VllmConfig, settings: WeightSettings) -> list[str]:
    """List what keeps adapters from linears whose inputs have changed."""
    marker, quant_config = marker_of(config), config.quant_config
    if marker is not None:
        method = str(marker.get("method"))
        kept = marker.get("inputs_kept", False)
        problem = f"{method} changed the inputs of linears in this checkpoint, or did not note it"
    elif isinstance(quant_config, MethodConfig):
        method = quant_config.method
        try:
            chosen = settings.request(method, tensor_parallel=1).build().settings
        except CompressError:  # among the problems already
            return []
        kept = chosen.keeps_inputs
        problem = f"with these settings {method} changes the inputs of linears"
    else:
        return []
    kind = methods().get(method)
    if kept or (kind is not None and not kind.capabilities.smooths):
        return []
    told = f"--enable-lora: {problem} (by folds, alpha or a rotation), which adapters do not expect"
    return [f"{told}; {_HINT}"]
