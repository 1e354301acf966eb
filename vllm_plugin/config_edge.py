# SPDX-License-Identifier: Apache-2.0
"""The config edge: our only wrapper around vLLM, of ``EngineArgs.create_engine_config``.

vLLM's own plugins wrap the same method. The wrapper reads the ``compress`` section of
``--additional-config``, refuses what cannot work before any worker starts, and sets what the user
left unset: load format, block size, worker class. Without that section, and for models that need
nothing of ours, it returns vLLM's config unchanged.
"""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.folder import CONFIG
from compress_common.checkpoints.local import local_folder
from compress_common.errors import MISSING, CompressError, joined, nearest
from compress_common.structure.derive import structure_of
from compress_common.structure.wrapper import language_config
from quant_methods.formats.source_check import check_source
from quant_methods.plan_request import PlanRequest
from vllm_plugin.command_line import mixed_forms, name_problems
from vllm_plugin.compatibility import refuse_diffusion
from vllm_plugin.diffusion import support as diffusion
from vllm_plugin.exits import end_command
from vllm_plugin.kv_cache.support import apply_kv, choose_engine_args
from vllm_plugin.metrics.connector import report
from vllm_plugin.metrics.cpu_cores import restore
from vllm_plugin.quantization.config import CONFIGS, MethodConfig
from vllm_plugin.quantization.embedding import embedding_problems
from vllm_plugin.quantization.fp8 import fp8_problems
from vllm_plugin.quantization.kernels import kernel_problems
from vllm_plugin.quantization.loader import LOAD_FORMAT
from vllm_plugin.quantization.lora import lora_problems
from vllm_plugin.quantization.pooling import pooling_problems
from vllm_plugin.quantization.source import source_problem
from vllm_plugin.quantization.speculative import speculative_problems
from vllm_plugin.self_check import log_nothing
from vllm_plugin.settings import (
    KEY,
    Settings,
    WeightSettings,
    method_problems,
    no_method_problem,
    parse_settings,
)

# The load formats of vLLM that read safetensors.
_LOAD_FORMATS = ("auto", "hf", "safetensors")
_OURS = tuple(config.method for config in CONFIGS)
_MARK = "vllm_compress_edge"


def install() -> None:
    """Wrap ``EngineArgs.create_engine_config``, once per process."""
    original = EngineArgs.create_engine_config
    if getattr(original, _MARK, False):  # also where another plugin has wrapped us since
        return

    @wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        try:
            return _configured(self, lambda: original(self, *args, **kwargs))
        except (CompressError, ValidationError) as error:
            refusal = _refusal_in(error)
            if refusal is None:
                raise
            end_command(refusal)
            raise refusal from error

    setattr(create_engine_config, _MARK, True)
    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]


def _configured(args: EngineArgs, create: Callable[[], VllmConfig]) -> VllmConfig:
    """Create an engine config and apply our settings to it.

    Args:
        args: the engine arguments. Unset ones are changed where compression needs another default.
        create: vLLM's own function, bound to ``args``. It reads the model's config. Nothing here
            reads a file for an engine that does not use this plugin.

    Returns:
        The config; vLLM's own where nothing is configured.

    Raises:
        CompressError: lists every problem found.
    """
    restore()
    settings = _settings(args)
    if settings.kv is not None:
        choose_engine_args(args, settings.kv)
    if settings.diffusion is not None:
        refuse_diffusion(diffusion.model_type_of(args))
    given, worker = vars(args).copy(), args.worker_cls
    config = create()
    if diffusion.denoises(config):
        # Only the model's config, which vLLM has just read, shows that the model denoises. By now
        # vLLM has set defaults for an autoregressive model, so start again from the user's values.
        vars(args).update(given)
        diffusion.choose_engine_args(args)
        worker = args.worker_cls
        config = create()
        diffusion.apply_diffusion(config, settings.diffusion)
    elif settings.diffusion is not None:
        refuse_diffusion(getattr(config.model_config.hf_config, "model_type", None))
    compressed = apply_settings(config, settings, worker)
    if (
        not compressed
        and isinstance(args.additional_config, dict)
        and KEY in args.additional_config
    ):
        log_nothing()
    return config


def _settings(args: EngineArgs) -> Settings:
    """Validate the ``compress`` section, and names for which vLLM would print a traceback.

    Raises:
        CompressError: lists every problem found.
    """
    mixed, settings = mixed_forms(sys.argv), Settings()
    problems = list(mixed)
    given = args.additional_config
    section = given.get(KEY) if isinstance(given, dict) else None
    try:
        settings = parse_settings(given)
    except CompressError as error:
        # What seems to be missing can be in the form that vLLM has dropped.
        problems += [each for each in error.problems if not (mixed and each.endswith(MISSING))]
        # The settings of a weight method are validated later, so do it here for one whole list.
        problems += method_problems(given, args.quantization)
    problems += _name_problems(args, bool(section))
    if problems:
        raise joined(problems)
    return settings


def _name_problems(args: EngineArgs, configured: bool) -> list[str]:
    problems = []
    method = args.quantization
    unknown = isinstance(method, str) and method not in QUANTIZATION_METHODS
    if unknown and (hint := nearest(str(method), _OURS)):
        problems.append(f"--quantization {method!r} is unknown{hint}")
    if method in _OURS or configured:
        problems += name_problems(args.model)
    return problems


def _refusal_in(error: Exception) -> CompressError | None:
    """Return our own error, also from inside a pydantic error; None for an error of vLLM's."""
    if isinstance(error, CompressError):
        return error
    assert isinstance(error, ValidationError)
    causes = (problem.get("ctx", {}).get("error") for problem in error.errors())
    return next((cause for cause in causes if isinstance(cause, CompressError)), None)


def apply_settings(config: VllmConfig, settings: Settings, worker: str = "auto") -> bool:
    """Complete a VllmConfig from our settings.

    Args:
        config: vLLM's own, of this engine.
        settings: the ``compress`` section.
        worker: ``--worker-cls`` as the user gave it.

    Returns:
        Whether this engine compresses something, or denoises.

    Raises:
        CompressError: lists every problem found.
    """
    if settings.kv is not None:
        apply_kv(config, settings.kv, worker)
    if isinstance(config.quant_config, MethodConfig):
        _apply_weights(config, config.quant_config, settings.weights or WeightSettings())
    elif settings.weights is not None:
        raise no_method_problem(config.model_config.quantization)
    elif problems := _problems_without_config(config):
        raise joined(problems)
    quantized = isinstance(config.quant_config, MethodConfig)
    compressed = settings.kv is not None or quantized or diffusion.denoises(config)
    if compressed:
        report(config, settings)
    return compressed


def _apply_weights(
    config: VllmConfig, quant_config: MethodConfig, settings: WeightSettings
) -> None:
    quant_config.activations = settings.activations
    problems = _file_problems(config, quant_config)
    if quant_config.quantizes_at_load:
        problems += _problems_at_load(config, quant_config, settings)
    else:
        problems += settings.fixed_problems()
    problems += fp8_problems(config, quant_config)
    problems += kernel_problems(config)
    problems += embedding_problems(config, quant_config.embedding_weights)
    problems += lora_problems(config, settings)
    problems += speculative_problems(config)
    problems += pooling_problems(config)
    if problems:
        raise joined(problems)
    if config.load_config.load_format in _LOAD_FORMATS:
        config.load_config.load_format = LOAD_FORMAT


def _problems_without_config(config: VllmConfig) -> list[str]:
    """List problems where vLLM's own config serves the weights, also those of our awq format."""
    problems = lora_problems(config, WeightSettings())
    return problems + speculative_problems(config) + pooling_problems(config)


def _file_problems(config: VllmConfig, quant_config: MethodConfig) -> list[str]:
    """List what is wrong with the files of a folder. A hub id may not be downloaded yet."""
    folder = Path(config.model_config.model)
    if config.load_config.load_format not in _LOAD_FORMATS or not (folder / CONFIG).is_file():
        return []
    try:
        check_source(folder, quant_config.method if quant_config.quantizes_at_load else None)
    except CompressError as error:
        return error.problems
    return []


def _problems_at_load(
    config: VllmConfig, quant_config: MethodConfig, settings: WeightSettings
) -> list[str]:
    """List what keeps a 16-bit checkpoint from being quantized at load."""
    hf_config = language_config(config.model_config.hf_config)
    parallel = config.parallel_config
    problems = []
    if not quant_config.capabilities.at_load:
        problems.append(
            f"--quantization {quant_config.method} takes too long to run while an engine starts; "
            f"write a checkpoint with `vllm-compress quantize --method {quant_config.method}` and "
            "serve that without the flag"
        )
    try:
        structure_of(hf_config)
        request = settings.request(quant_config.method, parallel.tensor_parallel_size)
        chosen = request.build().settings
        embedding = chosen.embedding_grid(hf_config)
        quant_config.describe(chosen.grids(hf_config), hf_config, embedding)
        problems += _head_problems(config, request)
    except CompressError as error:
        problems += error.problems
    if problem := source_problem(config.model_config):
        problems.append(problem)
    if config.load_config.load_format not in (*_LOAD_FORMATS, "dummy", LOAD_FORMAT):
        problems.append(
            f"--load-format {config.load_config.load_format} cannot be quantized at load; leave it "
            "at auto or quantize offline with `vllm-compress quantize`"
        )
    skipped = None
    experts = config.model_config.is_moe and parallel.enable_expert_parallel
    if experts and parallel.enable_ep_weight_filter and not parallel.enable_eplb:
        skipped = "--enable-ep-weight-filter reads the experts of one rank alone"
    elif config.is_mm_encoder_only:
        skipped = "an engine of the encoder alone (--mm-encoder-only) reads no decoder"
    if skipped is not None:
        problems.append(
            f"{skipped}, and quantizing at load reads the whole checkpoint; remove the flag or "
            "--quantization, or quantize offline with `vllm-compress quantize`"
        )
    return problems


def _head_problems(config: VllmConfig, request: PlanRequest) -> list[str]:
    """List what calibration lacks in a model that gives no logits, where it is on this machine."""
    model = config.model_config
    folder = local_folder(model.model, model.revision, config.load_config.download_dir)
    if folder is None:  # the loader asks
        return []
    try:
        checkpoint = Checkpoint(folder, hf_config=language_config(model.hf_config))
    except CompressError:  # see _file_problems; of a hub id, the loader refuses it
        return []
    try:
        request.check_head(checkpoint)
    except CompressError as error:
        return error.problems
    return []
