# SPDX-License-Identifier: Apache-2.0
"""The one wrapper around vLLM: ``EngineArgs.create_engine_config``, as vLLM's own plugins have it.

It reads our section of ``--additional-config`` once, refuses what cannot work before any worker
starts, and sets what the user left alone: load format, block size, worker class. Nothing else of
vLLM is wrapped.
"""

from functools import wraps
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from compress_common.errors import CompressError, joined
from quant_methods.architecture import architecture_of
from vllm_plugin.diffusion import support as diffusion
from vllm_plugin.diffusion.config import MODEL_TYPE
from vllm_plugin.kv_cache.support import apply_kv, choose_engine_args
from vllm_plugin.metrics.connector import report
from vllm_plugin.quantization.config import SmoothQuantPlusConfig
from vllm_plugin.quantization.loader import LOAD_FORMAT
from vllm_plugin.quantization.source import source_problem
from vllm_plugin.settings import KEY, Settings, WeightSettings, parse_settings

# Safetensors under any name that vLLM has for them.
_LOAD_FORMATS = ("auto", "hf", "safetensors")
_MARK = "vllm_compress_edge"


def install() -> None:
    """Wrap ``EngineArgs.create_engine_config``, once per process."""
    original = EngineArgs.create_engine_config
    if getattr(original, _MARK, False):  # also when another plugin has wrapped ours since
        return

    @wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        settings = parse_settings(self.additional_config)
        if settings.kv is not None:
            choose_engine_args(self)
        model_type = diffusion.model_type_of(self)
        denoises = model_type == MODEL_TYPE
        if denoises:
            diffusion.choose_engine_args(self)
        else:
            diffusion.refuse_other(model_type, settings.diffusion)
        config = original(self, *args, **kwargs)
        if denoises:
            diffusion.apply_diffusion(config, settings.diffusion)
        apply_settings(config, settings, self.worker_cls)
        return config

    setattr(create_engine_config, _MARK, True)
    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]


def apply_settings(config: VllmConfig, settings: Settings, worker: str = "auto") -> None:
    """Complete a VllmConfig from our settings; CompressError lists every problem found.

    worker: ``--worker-cls`` as the user gave it.
    """
    if settings.kv is not None:
        apply_kv(config, settings.kv, worker)
    if isinstance(config.quant_config, SmoothQuantPlusConfig):
        _apply_weights(config, config.quant_config, settings.weights or WeightSettings())
    elif settings.weights is not None:
        raise CompressError(
            f"{KEY}.weights is set but the model is not served by one of our methods "
            f"(quantization: {config.model_config.quantization}); add "
            "--quantization smoothquant_plus or remove the section"
        )
    quantised = isinstance(config.quant_config, SmoothQuantPlusConfig)
    if settings.kv is not None or quantised or diffusion.diffusion_of(config) is not None:
        report(config)


def _apply_weights(
    config: VllmConfig, quant_config: SmoothQuantPlusConfig, settings: WeightSettings
) -> None:
    quant_config.activations = settings.activations
    problems = []
    if quant_config.quantizes_at_load:
        problems += _problems_at_load(config, quant_config, settings)
    elif fixed := settings.model_fields_set - {"activations"}:
        problems.append(
            f"{KEY}.weights.{', '.join(sorted(fixed))}: the checkpoint is already quantised, these "
            "settings were fixed when it was written; remove them"
        )
    if config.lora_config is not None:
        problems.append("LoRA adapters do not fit smoothed weights; remove --enable-lora")
    if problems:
        raise joined(problems)
    if config.load_config.load_format in _LOAD_FORMATS:
        config.load_config.load_format = LOAD_FORMAT


def _problems_at_load(
    config: VllmConfig, quant_config: SmoothQuantPlusConfig, settings: WeightSettings
) -> list[str]:
    """What keeps a 16-bit checkpoint from being quantised at load; empty when nothing does."""
    hf_config = config.model_config.hf_text_config
    parallel = config.parallel_config
    problems = []
    try:
        architecture_of(hf_config)
        request = settings.request(quant_config.method, parallel.tensor_parallel_size)
        quant_config.describe(request.build().settings.grids(hf_config))
    except CompressError as error:
        problems.append(str(error))
    if problem := source_problem(config.model_config):
        problems.append(problem)
    if config.load_config.load_format not in (*_LOAD_FORMATS, "dummy", LOAD_FORMAT):
        problems.append(
            f"--load-format {config.load_config.load_format} cannot be quantised at load; leave it "
            "at auto or quantise offline with `vllm-compress quantize`"
        )
    if parallel.pipeline_parallel_size > 1:
        problems.append(
            "--pipeline-parallel-size above 1 was never tested with quantising at load; quantise "
            "offline with `vllm-compress quantize` or use --tensor-parallel-size"
        )
    return problems
