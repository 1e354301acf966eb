# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that an engine loads, as calibration is to see it: vLLM's own choice of files,
config and tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from vllm.config import ModelConfig
from vllm.tokenizers import get_tokenizer

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from compress_common.structure.wrapper import language_config

PrepareWeights = Callable[..., tuple[str, list[str], bool, str]]


def source_problem(model_config: ModelConfig) -> str | None:
    """Say why a model cannot be quantized because of how its config was read; None: it can.

    vLLM reads Mistral's params.json into a config that ``transformers`` has no model for.
    """
    if type(model_config.hf_text_config) is PreTrainedConfig:
        return (
            f"the config of {model_config.model} was read from params.json, Mistral's own format; "
            "int4 needs the Hugging Face files: add --config-format hf --load-format hf "
            "--tokenizer-mode hf"
        )
    return None


def source_of(model_config: ModelConfig, prepare_weights: PrepareWeights) -> Checkpoint:
    """Return the checkpoint of an engine.

    Args:
        model_config: With ``--revision``, ``--tokenizer``, ``--hf-overrides`` and
            ``--hf-config-path`` already in it.
        prepare_weights: The loader's ``_prepare_weights``. Downloads the weights if need be, with
            ``--download-dir``, and chooses files by ``--load-format``.

    Raises:
        CompressError: The weights are no safetensors files, or the config is Mistral's.
    """
    if problem := source_problem(model_config):
        raise CompressError(problem)
    folder, files, safetensors, _ = prepare_weights(
        model_config.model,
        subfolder=None,
        revision=model_config.revision,
        fall_back_to_pt=False,
        allow_patterns_overrides=None,
    )
    if not safetensors:
        raise CompressError(
            f"{folder} has no *.safetensors files; pickled weights are not read: convert them to "
            "safetensors"
        )

    def load_tokenizer() -> Any:
        try:
            return get_tokenizer(
                model_config.tokenizer,
                tokenizer_mode=model_config.tokenizer_mode,
                revision=model_config.tokenizer_revision,
                trust_remote_code=False,
            )
        except Exception as error:  # a damaged tokenizer.json raises a bare Exception
            reason = str(error).strip().splitlines()[0]
            raise CompressError(
                f"calibration cannot load the tokenizer {model_config.tokenizer}: {reason}"
            ) from error

    return Checkpoint(
        Path(folder),
        map(Path, files),
        hf_config=language_config(model_config.hf_config),
        load_tokenizer=load_tokenizer,
    )
