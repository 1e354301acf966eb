# SPDX-License-Identifier: Apache-2.0
"""What cannot be denoised is refused: engines at start, requests when they arrive."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config import (
    AttentionConfig,
    CompilationConfig,
    CompilationMode,
    CUDAGraphMode,
    VllmConfig,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.sampling_params import StructuredOutputsParams

import vllm_plugin
from compress_common.errors import CompressError
from tests.support.llada import random_llada
from vllm_plugin.diffusion.requests import DiffusionRequestCheck, check
from vllm_plugin.diffusion.settings import DiffusionSettings
from vllm_plugin.diffusion.support import SCHEDULER, WORKER, choose_engine_args


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llada")
    random_llada(folder, layers=2)
    return folder


def configure(model: Path, section: dict[str, Any] | None = None, **engine: Any) -> VllmConfig:
    vllm_plugin.register()
    compress = {"diffusion": section} if section is not None else {}
    args = {"max_model_len": 256, "skip_tokenizer_init": True, "dtype": "float32"}
    extra = engine.pop("compress", {})
    return EngineArgs(
        model=str(model), additional_config={"compress": compress | extra}, **(args | engine)
    ).create_engine_config()


def refusal(model: Path, section: dict[str, Any] | None = None, **engine: Any) -> str:
    with pytest.raises(CompressError) as caught:
        configure(model, section, **engine)
    return str(caught.value)


def test_plain_serving_works(model: Path) -> None:
    config = configure(model)
    assert config.parallel_config.worker_cls == WORKER
    assert config.scheduler_config.scheduler_cls == SCHEDULER
    assert config.cache_config.block_size == 32
    assert config.model_config.get_diff_sampling_param()["temperature"] == 0
    assert config.model_config.logits_processors == [DiffusionRequestCheck]
    DiffusionRequestCheck.validate_params(SamplingParams(temperature=0))


# What LLaDA-8B-Instruct's config.json has beside the sizes.
PUBLISHED = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "block_type": "llama",
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "rope": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "use_cache": False,
    "weight_tying": False,
}


def test_the_callers_configs_are_left_alone(model: Path) -> None:
    attention, compilation = AttentionConfig(), CompilationConfig()
    args = EngineArgs(model=str(model), attention_config=attention, compilation_config=compilation)
    given = args.kernel_config
    choose_engine_args(args)
    assert args.attention_config.use_non_causal and not attention.use_non_causal
    assert compilation.mode is compilation.cudagraph_mode is None
    assert given.enable_jit_warmup and not args.kernel_config.enable_jit_warmup


@pytest.mark.parametrize("eager", [False, True])
def test_vllm_captures_nothing(model: Path, eager: bool) -> None:
    """Whether the worker captures its own steps is what the user says."""
    config = configure(model, enforce_eager=eager)
    assert config.compilation_config.mode == CompilationMode.NONE
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE
    assert config.model_config.enforce_eager is eager


def test_published_config_is_read_without_remote_code(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= PUBLISHED | {"vocab_size": 60}  # embedding_size, 64, is what counts
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = configure(tmp_path).model_config
    assert found.hf_config.hidden_size == 128
    assert found.get_vocab_size() == 64 and found.max_model_len == 256
    assert found.hf_config.rope_parameters["rope_theta"] == 500000.0


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"policy": "elastc"}, "unknown diffusion cache policy 'elastc'; did you mean 'elastic'?"),
        ({"policy": "elastic", "gama": 0.9}, "unknown setting 'gama'; did you mean 'gamma'?"),
        ({"policy": "never", "gamma": 0.9}, "unknown setting 'gamma'"),
        ({"policy": "elastic", "gamma": 2}, "gamma: Input should be less than or equal to 1"),
        ({"policy": "fixed_period", "period": 0}, "greater than or equal to 1"),
        ({"threshold": 0}, "threshold: Input should be greater than 0"),
        ({"threshold": 0.5, "tokens_per_step": 2}, "exclude each other"),
        ({"window_length": 8, "block_length": 8}, "exclude each other"),
        ({"policy": "dual_cache", "window_length": 8}, "give `block_length` instead"),
    ],
)
def test_bad_settings(model: Path, section: dict[str, Any], expected: str) -> None:
    assert expected in refusal(model, section)


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "--worker-cls"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
        ({"enable_prefix_caching": True}, "--enable-prefix-caching"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"long_prefill_token_threshold": 64}, "--long-prefill-token-threshold 64"),
        ({"enable_chunked_prefill": True, "max_num_batched_tokens": 100}, "raise one or lower"),
        ({"compilation_config": {"mode": 3}}, "--compilation-config with mode "),
        ({"compress": {"kv": {"policy": "recent", "keep": 0.5}}}, "compress.kv"),
    ],
)
def test_unsupported_engines(model: Path, engine: dict[str, Any], expected: str) -> None:
    assert expected in refusal(model, **engine)


def test_lora_is_refused(model: Path) -> None:
    """By vLLM itself from 0.33 on, before our check."""
    with pytest.raises(ValueError, match="enable.lora"):
        configure(model, enable_lora=True)


def test_all_problems_in_one_error(model: Path) -> None:
    text = refusal(model, {"policy": "elastc"}, kv_cache_dtype="fp8", enable_prefix_caching=True)
    assert text.startswith("3 problems:")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"alibi": True}, "config.json has alibi True"),
        ({"include_qkv_bias": True}, "include_qkv_bias True"),
        ({"weight_tying": True}, "weight_tying True"),
        ({"mask_token_id": 126336}, "mask_token_id 126336, outside of the vocabulary"),
    ],
)
def test_other_llada_configs(
    model: Path, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    assert expected in refusal(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llada2_moe", "block-causal"),
        ("Dream", "shifts its logits"),
        ("llama", "does not denoise"),
    ],
)
def test_other_models(tmp_path: Path, model_type: str, expected: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    assert expected in refusal(tmp_path, {"policy": "elastic"})


DEFAULTS = {"repetition_penalty": 1.2, "top_p": 0.9, "top_k": 20, "temperature": 0.7}


def test_defaults_of_the_checkpoint_are_no_request(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps(DEFAULTS), encoding="utf-8")
    defaults = configure(tmp_path).model_config.get_diff_sampling_param()
    assert defaults == {"temperature": 0.0}
    check(SamplingParams.from_optional(**defaults), DiffusionSettings())  # as LLM takes them
    asked = CompletionRequest(prompt="1", temperature=0.7)
    check(asked.to_sampling_params(8, defaults), DiffusionSettings())
    asked = CompletionRequest(prompt="1", temperature=0.7, top_p=0.9)
    with pytest.raises(ValueError, match="^top_p 0.9"):
        check(asked.to_sampling_params(8, defaults), DiffusionSettings())


def test_defaults_of_the_operator_are_refused_at_start(model: Path) -> None:
    asked = {"top_p": 0.9, "min_p": 0, "temperature": 0.5, "max_new_tokens": 9}
    text = refusal(model, override_generation_config=asked)
    assert "--override-generation-config has top_p 0.9" in text and "min_p" not in text
    config = configure(model, override_generation_config=asked | {"top_p": 1.0})
    assert config.model_config.get_diff_sampling_param()["temperature"] == 0.5


@pytest.mark.parametrize(
    "params",
    [
        {"logprobs": 1},
        {"prompt_logprobs": 1},
        {"min_tokens": 2},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"logit_bias": {5: 1.0}},
        {"allowed_token_ids": [5]},
        {"bad_words": ["no"]},
        {"structured_outputs": StructuredOutputsParams(regex="a+")},
    ],
)
def test_requests_for_what_there_is_not(params: dict[str, Any]) -> None:
    (name,) = params
    with pytest.raises(ValueError, match=f"^{name} "):
        check(SamplingParams(temperature=0, **params), DiffusionSettings())


def test_sampling_filters_are_refused_where_they_mean_something() -> None:
    params = {"top_p": 0.9, "top_k": 5, "min_p": 0.1}
    check(SamplingParams(temperature=0, **params), DiffusionSettings())
    with pytest.raises(ValueError, match="3 problems"):
        check(SamplingParams(temperature=0.5, **params), DiffusionSettings())


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"compress_threshold": 0}, "greater than 0, got 0"),
        ({"compress_threshold": "high"}, "valid number"),
        ({"compress_gamma": 1.5}, "less than or equal to 1, got 1.5"),
        ({"compress_period": 3}, "unknown key 'compress_period' (a request may set"),
        ({"compres_gamma": 0.5}, "unknown key 'compres_gamma', did you mean 'compress_gamma'"),
        ({"compress_policy": "full"}, "cannot choose the policy"),
        ({"compress_threshold": 0.5, "compress_tokens_per_step": 1}, "exclude each other"),
        ({"compress_nothing": 1}, "compress_block_length, compress_gamma, compress_track"),
    ],
)
def test_bad_request_settings(extra: dict[str, Any], expected: str) -> None:
    served = DiffusionSettings(policy="elastic")
    with pytest.raises(ValueError) as caught:
        check(SamplingParams(temperature=0, extra_args=extra), served)
    assert expected in str(caught.value)


def test_request_settings_take_the_place_of_the_servers() -> None:
    served = DiffusionSettings(policy="elastic", threshold=0.8, window_length=8)
    asked = served.for_request({"tokens_per_step": "2", "block_length": 4, "gamma": 0.5})
    assert asked.decoding().tokens_per_step == 2 and asked.decoding().threshold is None
    assert asked.decoding().block_length == 4 and asked.build().settings.gamma == 0.5
