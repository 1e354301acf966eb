# SPDX-License-Identifier: Apache-2.0
"""What cannot work is refused before an engine starts: one error with everything in it."""

import json
import os
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from transformers import AutoConfig
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum

import vllm_plugin
from compress_common.errors import CompressError
from quant_methods.formats.checkpoint_formats import MARKER
from tests.vllm_plugin.kv_cache.conftest import save_bases, save_profile
from vllm_plugin.kv_cache import requests
from vllm_plugin.kv_cache.budget import bases_of, layouts_of
from vllm_plugin.kv_cache.latent import latent_problems
from vllm_plugin.kv_cache.requests import (
    KVRequestCheck,
    UncachedKVRequestCheck,
    asked,
    check,
    opts_out,
)
from vllm_plugin.kv_cache.support import WORKER, choose_engine_args, lacks_fp8
from vllm_plugin.settings import KVSettings

SNAP = {"policy": "snap_kv", "keep": 0.25}


def configure(model: Path | str, kv: dict[str, Any] | None = None, **engine: Any) -> VllmConfig:
    vllm_plugin.register()
    args = {"enforce_eager": True, "max_model_len": 512} | engine
    return EngineArgs(
        model=str(model), additional_config={"compress": {"kv": kv or SNAP}}, **args
    ).create_engine_config()


def refusal(model: Path | str, kv: dict[str, Any] | None = None, **engine: Any) -> str:
    with pytest.raises(CompressError) as caught:
        configure(model, kv, **engine)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kv", "expected"),
    [
        ({"policy": "snapkv", "keep": 0.25}, "unknown KV policy 'snapkv'; did you mean 'snap_kv'?"),
        ({"policy_": "snap_kv", "keep": 0.25}, "unknown setting 'policy_'; did you mean 'policy'?"),
        ({"policy": "snap_kv", "keep_": 0.25}, "unknown setting 'keep_'; did you mean 'keep'?"),
        ({"keep": 0.25}, "'policy' is missing"),
        (SNAP | {"decode_window_": 64}, "did you mean 'decode_window'?"),
        (SNAP | {"window_": 3}, "unknown setting 'window_'; did you mean 'window'?"),
        (SNAP | {"window": 0}, "window"),
        ({"policy": "snap_kv", "keep": 0}, "must be in (0, 1], got 0"),
        ({"policy": "snap_kv", "keep": 1.5}, "must be in (0, 1], got 1.5"),
        ({"policy": "snap_kv", "keep": -1}, "must be in (0, 1], got -1"),
        ({"policy": "snap_kv", "keep": "abc"}, "must be a number in (0, 1], got 'abc'"),
        ({"policy": "snap_kv"}, "needs `keep`, the share that stays, or `budget`, the tokens"),
        ({"policy": "cskv"}, "needs `bases`, the file that `vllm-compress calibrate-kv MODEL`"),
        ({"policy": "snap_kv", "budget": 0}, "budget"),
        ({"policy": "snap_kv", "budget": 0.5}, "budget"),
        (SNAP | {"budget": 512}, "`keep` has no use beside `budget`; remove it"),
        (
            {"policy": "cskv", "budget": 64, "min_prompt": 0, "decode_window": 0},
            (
                "`min_prompt` has no use beside `budget`; remove it; cskv keeps every token; "
                "remove `budget`; `budget` bounds generated tokens too; remove `decode_window: 0`"
            ),
        ),
        (
            {"policy": "snap_kv", "budget": 300},
            (
                "less than two decode windows of 256; raise compress.kv.budget to 512, or set "
                "compress.kv.decode_window to at most 160"
            ),
        ),
        ({"policy": "snap_kv", "budget": 40}, "raise compress.kv.budget to 512"),
        ({"policy": "snap_kv", "budget": 8192}, "nothing would ever be compacted"),
        (SNAP | {"min_prompt": 4096, "decode_window": 0}, "nothing would ever be compacted"),
        (SNAP | {"keep": 0.999}, "keep is 0.999, min_prompt 128, and requests have at most"),
        ({"policy": "prefix_kv", "budget": 512}, "vllm-compress profile"),
        ({"policy": "prefix_kv", "keep": 0.25}, "vllm-compress profile"),
        (SNAP | {"levels": 3}, "add `profile`"),
        (SNAP | {"decode_window": 100}, "window must be 0 or a multiple of the block size 32"),
        (SNAP | {"min_blocks": 0}, "min_blocks"),
        (SNAP | {"profile": "/nowhere/kv.json"}, "cannot read the profile /nowhere/kv.json"),
        ({"policy": "cskv", "keep": 0.2}, "vllm-compress calibrate-kv"),
        ({"policy": "cskv", "bases": "/nowhere/kv"}, "cannot read the bases /nowhere/kv"),
        ({"policy": "cskv", "keep": 1, "bits": 8}, "bits"),
        (SNAP | {"bases": "kv.safetensors"}, "unknown setting 'bases'"),
    ],
)
def test_bad_settings(demo_model: Path, kv: dict[str, Any], expected: str) -> None:
    assert expected in refusal(demo_model, kv)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text[: len(text) // 2], "is not JSON"),
        (lambda text: "[]", "is not a KV profile file"),
        (lambda text: text.replace('"version": 2', '"version": 9'), "has version 9"),
        (lambda text: text.replace('"1/4"', '"1/2"'), "the mean of the fractions is 1/4"),
        (lambda text: text.replace('"hidden_size": 576', '"hidden_size": 99'), "hidden_size is 99"),
        (
            lambda text: text.replace('"num_hidden_layers": 30', '"num_hidden_layers": 31'),
            "num_hidden_layers is 31 in the file, 30 in the model",
        ),
    ],
)
def test_bad_profiles(
    demo_model: Path, profile: Path, tmp_path: Path, change: Callable[[str], str], expected: str
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(change(profile.read_text()))
    assert bad.read_text() != profile.read_text()
    text = refusal(demo_model, {"policy": "prefix_kv", "profile": str(bad)})
    assert expected in text


def test_profile_of_another_budget_or_model(
    demo_model: Path, profile: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    given = {"policy": "prefix_kv", "keep": 0.5, "profile": str(profile)}
    assert "was made for 0.25" in refusal(demo_model, given)
    other = save_profile(tiny_model("llama"), tmp_path / "o.json", Fraction(1, 4), 1)
    assert "not for" in refusal(demo_model, {"policy": "prefix_kv", "profile": str(other)})


def changed(file: Path, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> bytes:
    """The bases with some tensors and some of the header replaced."""
    with safe_open(file, framework="pt") as opened:
        told = json.loads(opened.metadata()["vllm-compress"])
    return save(load_file(file) | tensors, {"vllm-compress": json.dumps(told | header)})


NAN = {"layers.3.key.mean": torch.full((192,), torch.nan)}
SHORT = {"layers.4.key.encode": torch.zeros(192, 37)}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda file: file.read_bytes()[:5000], "damaged, cut short or not safetensors"),
        (lambda file: b"[]", "not safetensors"),
        (lambda file: changed(file, {}, {"version": 9}), "has version 9"),
        (lambda file: changed(file, {}, {"schema": "kv"}), "is not a KV bases file"),
        (lambda file: changed(file, NAN, {}), "has NaN or infinity in layers.3.key.mean"),
        (lambda file: changed(file, SHORT, {}), "its header says float32 [192, 38]"),
        (lambda file: changed(file, {}, {"weights": "1" * 64}), "a fine-tune?"),
    ],
)
def test_bad_bases(
    demo_model: Path, bases: Path, tmp_path: Path, change: Callable[[Path], bytes], expected: str
) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(change(bases))
    text = refusal(demo_model, {"policy": "cskv", "bases": str(bad)})
    assert expected in text and "vllm-compress calibrate-kv" in text


def test_bases_of_an_edited_checkpoint(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """One bit of any tensor makes another model, at unchanged size and time."""
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    settings = KVSettings(policy="cskv", bases=str(tmp_path / "kv.safetensors"))
    save_bases(model, tmp_path / "kv.safetensors", Fraction(1, 2))
    config, file = AutoConfig.from_pretrained(model), model / "model.safetensors"
    assert bases_of(settings, str(model), config).ratio == Fraction(1, 2)
    whole, before, random = file.read_bytes(), file.stat(), Random(0)
    length = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:length])
    for begin, end in (t["data_offsets"] for name, t in header.items() if name[0] != "_"):
        at = length + random.randrange(begin, end)
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(CompressError, match="their weights differ"):
            bases_of(settings, str(model), config)
    file.write_bytes(whole)
    made = bases_of(settings, str(model), config)
    config.quantization_config = {MARKER: {"source": made.header.weights}}
    bases_of(settings, str(model), config)
    config.quantization_config = {MARKER: {"source": "1" * 64}}
    with pytest.raises(CompressError, match="their weights differ"):
        bases_of(settings, str(model), config)


def test_bases_of_another_model_or_with_another_budget(
    demo_model: Path, bases: Path, tiny_model: Callable[..., Path], profile: Path
) -> None:
    kv = {"policy": "cskv", "bases": str(bases)}
    assert "not for" in refusal(tiny_model("llama"), kv)
    wrong = {"keep": 0.3, "profile": str(profile), "min_blocks": 2}
    text = refusal(demo_model, kv | wrong)
    assert all(f"leave {name} out" in text for name in wrong)
    text = refusal(demo_model, kv | {"bits": 4})
    assert f"bits is 4, but the bases {bases} are made for latents of 16 bits; leave bits" in text
    assert "calibrate-kv" in text and "--bits 4" in text
    text = refusal(demo_model, kv | {"bits": 16, "decode_window": 48})
    assert "window must be 0 or a multiple of the block size 32, got 48" in text


def test_bases_for_another_number_of_ranks(demo_model: Path, bases: Path, tmp_path: Path) -> None:
    three = save_bases(demo_model, tmp_path / "3.safetensors", Fraction(4, 5), ranks=3)
    config = AutoConfig.from_pretrained(demo_model)
    settings = {
        file: KVSettings(policy="cskv", bases=str(file))  # type: ignore[call-arg]
        for file in (bases, three)
    }
    name = str(demo_model)
    for file, made in ((bases, 1), (three, 3)):
        assert bases_of(settings[file], name, config, made).header.tensor_parallel == made
        with pytest.raises(CompressError) as caught:
            bases_of(settings[file], name, config, 4 - made)
        text = str(caught.value)
        assert f"--tensor-parallel-size is {4 - made}, but the bases {file} are made for" in text
        assert f"set it to {made}, or make bases with `vllm-compress calibrate-kv" in text
        assert f"--tensor-parallel-size {4 - made}`" in text
    with pytest.raises(CompressError) as caught:
        bases_of(settings[three], name, config, 2)
    assert "set it to 3" in str(caught.value) and "calibrate-kv" not in str(caught.value)
    # One rank of an engine is refused a file for three, which holds a third of its heads.
    assert "set it to 3, or make bases" in refusal(
        demo_model, {"policy": "cskv", "bases": str(three)}
    )
    shares = {
        layers[0].share
        for layers in (layouts_of(settings[file], 32, name, config) for file in (bases, three))
    }
    assert all(share < 1 for share in shares)


def test_latents_under_what_changes_values(demo_model: Path, bases: Path) -> None:
    """Scaled values, and half of the heads, are not what the bases were fitted to."""
    config = {
        "compress": {
            "kv": {"policy": "cskv", "bases": str(bases)},
            "weights": {"folds": "all"},
        }
    }
    vllm_plugin.register()
    with pytest.raises(CompressError) as caught:
        EngineArgs(
            model=str(demo_model),
            quantization="smoothquant_plus",
            additional_config=config,
            tensor_parallel_size=3,
            enforce_eager=True,
        ).create_engine_config()
    assert "quantize without folds (the default), or with folds 'norms'" in str(caught.value)
    assert "--tensor-parallel-size" in str(caught.value)


@pytest.mark.parametrize(
    ("method", "told"),
    [("rsq", "with rotation 'none'"), ("fireq", "with key_scale null"), ("x", "by another method")],
)
def test_latents_name_the_setting_of_the_method_that_changed_values(
    demo_model: Path, method: str, told: str
) -> None:
    config = EngineArgs(model=str(demo_model)).create_engine_config()
    marker = {"method": method, "values_scaled": True}
    config.model_config.hf_text_config.quantization_config = {MARKER: marker}
    [problem] = latent_problems(config)
    assert problem.startswith(f"{method} changes") and f"quantize {told}, or" in problem
    marker["values_scaled"] = False
    assert not latent_problems(config)


NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({"kv_cache_dtype": "fp8_per_token_head"}, "--kv-cache-dtype fp8_per_token_head"),
        ({"kv_cache_dtype_skip_layers": ["0"]}, "--kv-cache-dtype-skip-layers"),
        ({"speculative_config": NGRAM}, "--speculative-config"),
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "--worker-cls"),
        ({"attention_backend": AttentionBackendEnum.TRITON_ATTN}, "--attention-backend"),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"shared_storage_path": "/tmp/kv"},
                }
            },
            "--kv-transfer-config",
        ),
    ],
)
def test_unsupported_combinations(demo_model: Path, engine: dict[str, Any], expected: str) -> None:
    assert expected in refusal(demo_model, **engine)


def test_fp8_caches(demo_model: Path, tmp_path: Path) -> None:
    bases = save_bases(demo_model, tmp_path / "kv.safetensors", Fraction(4, 5))
    latents = {"policy": "cskv", "bases": str(bases)}
    text = refusal(demo_model, latents, kv_cache_dtype="fp8")
    assert "--kv-cache-dtype fp8: latents of cskv lie in a 16-bit cache" in text
    if lacks_fp8():
        assert "needs AVX-512 or AMX" in text
        assert "needs AVX-512 or AMX" in refusal(demo_model, SNAP, kv_cache_dtype="fp8_e4m3")
    else:
        assert configure(demo_model, SNAP, kv_cache_dtype="fp8").cache_config.cache_dtype == "fp8"


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("decode_context_parallel_size", 2, "--decode-context-parallel-size"),
        ("prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
        ("enable_dbo", True, "--enable-dbo"),
    ],
)
def test_parallelism(demo_model: Path, field: str, value: Any, expected: str) -> None:
    """vLLM refuses these on a CPU by itself, so a good config is changed."""
    from vllm_plugin.kv_cache.support import config_problems

    config = configure(demo_model)
    config.kv_transfer_config = None  # ours, set after the check
    assert config_problems(config, "auto") == []
    setattr(config.parallel_config, field, value)
    (problem,) = config_problems(config, "auto")
    assert expected in problem


def test_sliding_layers_that_a_flag_makes_full(demo_model: Path) -> None:
    """The flag leaves the list of layers as it was; without such a list it changes nothing."""
    from vllm_plugin.kv_cache.support import config_problems

    config = configure(demo_model)
    config.kv_transfer_config = None
    config.model_config.disable_sliding_window = True
    assert config_problems(config, "auto") == []
    config.model_config.hf_text_config.layer_types = ["sliding_attention", "full_attention"]
    (problem,) = config_problems(config, "auto")
    assert "--disable-sliding-window" in problem


def test_the_rust_front_end_checks_no_request(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert "VLLM_USE_RUST_FRONTEND: it does not check" in refusal(demo_model)


def write_config(folder: Path, base: Path, architecture: str, **fields: Any) -> Path:
    """A folder with a config only, made from that of ``base``."""
    content = json.loads((base / "config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(content | {"architectures": [architecture]} | fields)
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(base / name)
    return folder


def test_models_without_keys_to_keep(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    window = tiny_model("mistral", sliding_window=64)
    assert "no layer with full attention" in refusal(window)
    mla = write_config(
        tmp_path / "mla",
        tiny_model("llama"),
        "DeepseekV2ForCausalLM",
        model_type="deepseek_v2",
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=4,
    )
    assert "MLA" in refusal(mla)
    linear = write_config(
        tmp_path / "linear",
        tiny_model("llama"),
        "LlamaForCausalLM",
        layer_types=["linear_attention", "full_attention"],
    )
    assert "layers of kinds linear_attention" in refusal(linear)


def test_everything_is_listed_at_once(demo_model: Path) -> None:
    text = refusal(
        demo_model,
        SNAP | {"window": 0, "decode_window": 100},
        kv_cache_dtype="fp8_per_token_head",
        disable_hybrid_kv_cache_manager=True,
    )
    assert text.startswith("4 problems")
    for part in (
        "snap_kv.window",
        "multiple of the block size",
        "--kv-cache-dtype",
        "--disable-hybrid",
    ):
        assert part in text


def test_what_works_is_configured(demo_model: Path, tiny_model: Callable[..., Path]) -> None:
    config = configure(demo_model)
    assert config.parallel_config.worker_cls == WORKER
    assert config.cache_config.block_size == 32
    assert config.model_config.logits_processors == [KVRequestCheck]
    config = configure(demo_model, block_size=64, enable_prefix_caching=False)
    assert config.cache_config.block_size == 64
    assert config.model_config.logits_processors == [UncachedKVRequestCheck]
    assert configure(tiny_model("gemma3")).parallel_config.worker_cls == WORKER
    assert configure(demo_model, {"policy": "prefix_kv", "keep": 1})  # nothing to share out


@pytest.mark.parametrize(
    ("policy", "given", "chosen"), [("cskv", None, 64), ("cskv", 32, 32), ("snap_kv", None, None)]
)
def test_latents_have_large_blocks_on_a_gpu(
    policy: str,
    given: int | None,
    chosen: int | None,
    demo_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = EngineArgs(model=str(demo_model), block_size=given)  # vLLM 0.33 looks for it
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    share = {"bases": "unused"} if policy == "cskv" else {"keep": 0.5}
    choose_engine_args(args, KVSettings(policy=policy, **share))
    assert args.block_size == chosen


def test_dotted_form(demo_model: Path) -> None:
    vllm_plugin.register()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    dotted = "--additional-config.compress.kv."
    given = ["--model", str(demo_model), f"{dotted}policy", "snap_kv", f"{dotted}keep", "0.25"]
    config = EngineArgs.from_cli_args(parser.parse_args(given)).create_engine_config()
    assert config.parallel_config.worker_cls == WORKER


def test_stock_is_left_alone(demo_model: Path) -> None:
    vllm_plugin.register()
    vllms_own = EngineArgs.create_engine_config.__wrapped__
    config, stock = (
        create(EngineArgs(model=str(demo_model), enforce_eager=True))
        for create in (EngineArgs.create_engine_config, vllms_own)
    )
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.cache_config.block_size == stock.cache_config.block_size
    assert not config.model_config.logits_processors


@pytest.mark.parametrize("value", [0.5, 0, True, "x", 2, "1/2", "1e-999999999", 1e-12, [1]])
def test_requests_may_keep_everything_or_nothing_special(
    value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "served", requests.Served())
    for whole in (1, 1.0, "1", "1.0"):
        params = SamplingParams(extra_args={"compress_keep": whole})
        check(params, cached=True)
        assert opts_out(params) and asked(params) is None
    check(SamplingParams(), cached=False)
    with pytest.raises(ValueError, match="can only be 1"):
        check(SamplingParams(extra_args={"compress_keep": value}), cached=True)
    with pytest.raises(ValueError, match="needs prefix caching"):
        check(SamplingParams(extra_args={"compress_keep": 1}), cached=False)


def test_requests_may_ask_for_less_than_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "served", requests.Served(keep=Fraction(1, 2)))
    for value in (0.5, "0.25", 0.001):
        params = SamplingParams(extra_args={"compress_keep": value})
        check(params, cached=True)
        assert asked(params) == Fraction(str(value)) and not opts_out(params)
        assert not params.skip_reading_prefix_cache  # its hits are safe
    for value in (0.51, "1e-999999999", "0." + "1" * 30, 0, -0.5):
        with pytest.raises(ValueError, match="1, which keeps its whole KV cache, or a share up to"):
            check(SamplingParams(extra_args={"compress_keep": value}), cached=True)
    with pytest.raises(ValueError, match=r"compress_budget .* needs a server with compress.kv.bu"):
        check(SamplingParams(extra_args={"compress_budget": 512}), cached=True)


def test_requests_may_ask_for_a_smaller_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    served = requests.Served(budget=1024, least_budget=512)
    monkeypatch.setattr(requests, "served", served)
    params = SamplingParams(extra_args={"compress_budget": "700"})
    check(params, cached=True)
    assert asked(params) == 700 and params.skip_reading_prefix_cache
    check(SamplingParams(extra_args={"compress_keep": 1}), cached=True)
    for value in (511, 1025, 0, True, "x", "9" * 5000, 600.0):
        with pytest.raises(ValueError, match="from 512 tokens, two windows of .*, to 1024"):
            check(SamplingParams(extra_args={"compress_budget": value}), cached=True)
    with pytest.raises(ValueError, match="can only be 1, which keeps its whole KV cache, got 0.5"):
        check(SamplingParams(extra_args={"compress_keep": 0.5}), cached=True)
    both = {"compress_keep": 1, "compress_budget": 512}
    with pytest.raises(ValueError, match="each other; set one of them, or neither for what"):
        check(SamplingParams(extra_args=both), cached=True)
    with pytest.raises(ValueError, match="compress_budget needs prefix caching"):
        check(SamplingParams(extra_args={"compress_budget": 512}), cached=False)


def test_prompt_windows_leave_no_request_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is larger than the pool would wait forever."""
    served = requests.Served(budget=1024, least_budget=512, whole=False)
    monkeypatch.setattr(requests, "served", served)
    for value in (1, "1.0", 0.5):
        with pytest.raises(ValueError, match="has no use beside prompt windows"):
            check(SamplingParams(extra_args={"compress_keep": value}), cached=True)
    check(SamplingParams(extra_args={"compress_budget": 700}), cached=True)


@pytest.mark.parametrize(
    ("kv", "told"),
    [
        ({"keep": 0.25, "prompt_window": 2048}, "`prompt_window` needs `budget`"),
        ({"budget": 1024, "prompt_window": 1024}, "raise compress.kv.prompt_window to 1056"),
        ({"budget": 1024, "prompt_window": 5000}, "at most 4096 tokens .* no prompt would ever"),
        ({"budget": 1024, "prompt_window": 0}, "prompt_window.* greater than or equal to 1"),
    ],
)
def test_prompt_windows_that_mean_nothing_are_refused(
    demo_model: Path, kv: dict[str, Any], told: str
) -> None:
    with pytest.raises(CompressError, match=told):
        configure(demo_model, {"policy": "snap_kv"} | kv, max_model_len=4096)


def test_what_is_served_is_known_where_requests_arrive(demo_model: Path) -> None:
    for kv, expected in (
        ({"policy": "snap_kv", "keep": 0.25}, requests.Served(keep=Fraction(1, 4))),
        ({"policy": "snap_kv", "keep": 1}, requests.Served()),
        ({"policy": "h2o", "budget": 600}, requests.Served(budget=608, least_budget=512)),
        (
            {"policy": "h2o", "budget": 600, "prompt_window": 2000},
            requests.Served(budget=608, least_budget=512, whole=False),
        ),
    ):
        configure(demo_model, kv, max_model_len=4096)
        assert requests.served == expected
