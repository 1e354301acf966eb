# SPDX-License-Identifier: Apache-2.0
"""What an engine compresses, or how it denoises, as one table in its log."""

from collections.abc import Mapping

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from compress_common.errors import CompressError
from kv_policies.layout.base import Layout
from vllm_plugin.capacity import Footprint, kv_footprint, requests_in_pool, weight_footprint
from vllm_plugin.diffusion.settings import DiffusionSettings
from vllm_plugin.diffusion.support import diffusion_of
from vllm_plugin.kv_cache.budget import layouts_of
from vllm_plugin.quantization.cpu_int4 import resolve_activations
from vllm_plugin.settings import Settings, WeightSettings

logger = init_logger(f"vllm.{__name__}")
Rows = list[tuple[str, str]]


def table(vllm_config: VllmConfig, settings: Settings, num_blocks: int | None = None) -> Rows:
    """Rows ``(what, figures)``, from the config and the headers of the checkpoint.

    num_blocks: blocks of the allocated pool; None leaves out how many requests it holds. What
    cannot be told is said so; nothing is raised for it.
    """
    try:
        rows = _weights(vllm_config, settings)
        if denoised := diffusion_of(vllm_config):
            return rows + _denoising(vllm_config, denoised)
        return rows + _kv(vllm_config, settings, num_blocks)
    except CompressError as error:
        return [("not known", str(error))]


def log_table(vllm_config: VllmConfig, settings: Settings, num_blocks: int | None = None) -> None:
    """Log the table, in one message. Parameters as for ``table``."""
    lines = [f"  {what:20}{figures}" for what, figures in table(vllm_config, settings, num_blocks)]
    logger.info("What is compressed:\n%s", "\n".join(lines))


def weights_of(config: VllmConfig, settings: Settings) -> Footprint | None:
    """Bytes of the weights of all ranks, as this machine's kernels hold them; None: not known."""
    model, chosen = config.model_config, settings.weights or WeightSettings()
    on_cpu = current_platform.is_cpu()
    int8 = on_cpu and resolve_activations(chosen.activations) == "int8"
    return weight_footprint(
        model.model,
        getattr(config.quant_config, "method", model.quantization),
        chosen,
        revision=model.revision,
        download_dir=config.load_config.download_dir,
        tensor_parallel=config.parallel_config.tensor_parallel_size,
        packing="cpu-int8" if int8 else "cpu-bf16" if on_cpu else "checkpoint",
    )


def layouts(config: VllmConfig, settings: Settings) -> Mapping[int, Layout] | None:
    """The layout of each compressed layer; None without ``compress.kv``."""
    if settings.kv is None:
        return None
    model = config.model_config
    return layouts_of(
        settings.kv, config.cache_config.block_size, model.model, model.hf_text_config
    )


def _weights(config: VllmConfig, settings: Settings) -> Rows:
    method = getattr(config.quant_config, "method", None)
    if (found := weights_of(config, settings)) is None:
        return [("weights", f"{method or 'not compressed'}, bytes not known")]
    before, after = (size / 2**20 for size in (found.original, found.compressed))
    if found.ratio == 1:
        return [("weights", f"not compressed, {before:.1f} MiB")]
    return [("weights", f"{method}, {before:.1f} -> {after:.1f} MiB ({found.ratio:.3f})")]


def _kv(config: VllmConfig, settings: Settings, num_blocks: int | None) -> Rows:
    model, cache = config.model_config, config.cache_config
    text = model.hf_text_config
    chosen = layouts(config, settings)
    size = kv_footprint(text, model.dtype, cache.cache_dtype, chosen)
    if chosen is None or settings.kv is None:
        return [("KV cache", f"not compressed, {size.original:,} bytes a token")]
    first = next(iter(chosen.values()))
    windows = f", then every {first.window} generated tokens" if first.window else ""
    rows = [
        ("KV cache", f"{settings.kv.policy}, {len(chosen)} of {text.num_hidden_layers} layers"),
        ("KV bytes a token", f"{size.original:,} -> {size.compressed:,} ({size.ratio:.3f})"),
        ("compacted", f"prompts from {first.min_prompt} tokens on{windows}"),
    ]
    if num_blocks is not None:
        longest = model.max_model_len
        before, after = requests_in_pool(text, chosen, cache.block_size, num_blocks, longest)
        rows.append(("requests that fit", f"{before} -> {after} of {longest:,} tokens"))
    return rows


def _denoising(config: VllmConfig, served: DiffusionSettings) -> Rows:
    model, text = config.model_config, config.model_config.hf_text_config
    policy, decoding = served.build(), served.decoding()
    chosen = [f"{name} {value}" for name, value in policy.settings.model_dump().items()]
    size = kv_footprint(text, model.dtype, config.cache_config.cache_dtype, None)
    rows = [
        ("denoising", ", ".join([served.policy, *chosen])),
        ("commits", str(decoding.rule())),
        ("predicts", str(decoding.schedule())),
        ("KV bytes a token", f"{size.original:,}"),
    ]
    if policy.tracks:
        inputs = text.num_hidden_layers * text.hidden_size * model.dtype.itemsize
        rows.append(("layer inputs", f"{inputs:,} bytes a token more, on each rank"))
    return rows
