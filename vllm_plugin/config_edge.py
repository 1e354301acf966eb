# SPDX-License-Identifier: Apache-2.0
"""The one wrapper around vLLM: ``EngineArgs.create_engine_config``, as vLLM's own plugins have it.

It reads our section of ``--additional-config`` once, refuses what cannot work before any worker
starts, and sets the load format that the user left alone. Nothing else of vLLM is wrapped.
"""

from functools import wraps
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from quant_methods.architecture import architecture_of
from quant_methods.errors import CompressError, joined
from vllm_plugin.quantization.config import SmoothQuantPlusConfig
from vllm_plugin.quantization.loader import LOAD_FORMAT
from vllm_plugin.settings import KEY, WeightSettings, parse_settings


def install() -> None:
    """Wrap ``EngineArgs.create_engine_config``, once per process."""
    original = EngineArgs.create_engine_config
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        config = original(self, *args, **kwargs)
        apply_settings(config)
        return config

    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]


def apply_settings(config: VllmConfig) -> None:
    """Complete a VllmConfig from our settings; CompressError lists every problem found."""
    settings = parse_settings(config.additional_config)
    if isinstance(config.quant_config, SmoothQuantPlusConfig):
        _apply_weights(config, config.quant_config, settings.weights or WeightSettings())
    elif settings.weights is not None:
        raise CompressError(
            f"{KEY}.weights is set but the model is not served by one of our methods "
            f"(quantization: {config.model_config.quantization}); add "
            "--quantization smoothquant_plus or remove the section"
        )


def _apply_weights(
    config: VllmConfig, quant_config: SmoothQuantPlusConfig, settings: WeightSettings
) -> None:
    quant_config.activations = settings.activations
    if not quant_config.quantises_at_load:
        if changed := settings.model_fields_set - {"activations"}:
            raise CompressError(
                f"{KEY}.weights.{', '.join(sorted(changed))}: the checkpoint is already quantised, "
                "these settings were fixed when it was written; remove them"
            )
        return
    problems = []
    hf_config = config.model_config.hf_text_config
    for check in (
        lambda: architecture_of(hf_config),
        lambda: quant_config.describe(
            settings.request(quant_config.method, config.parallel_config.tensor_parallel_size)
            .build()
            .settings.grids(hf_config)
        ),
    ):
        try:
            check()
        except CompressError as error:
            problems.append(str(error))
    if config.load_config.load_format not in ("auto", "hf", "safetensors", "dummy", LOAD_FORMAT):
        problems.append(
            f"--load-format {config.load_config.load_format} cannot be quantised at load; "
            "leave it at auto or quantise offline with `vllm-compress quantize`"
        )
    if config.lora_config is not None:
        problems.append("LoRA adapters do not fit smoothed weights; remove --enable-lora")
    if problems:
        raise joined(problems)
    if config.load_config.load_format != "dummy":
        config.load_config.load_format = LOAD_FORMAT
