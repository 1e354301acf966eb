# SPDX-License-Identifier: Apache-2.0
"""The table in an engine's log that says what it compresses, or how it denoises."""

from collections.abc import Callable, Mapping

from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.platforms import current_platform

from compress_common.structure.wrapper import language_config
from kv_policies.base import KVPolicy
from kv_policies.layout.base import Layout
from kv_policies.layout.bounded import BoundedLayout
from quant_methods.formats.checkpoint_formats import EMBEDDING_TARGETS
from vllm_plugin.capacity.blocks import requests_in_pool
from vllm_plugin.capacity.footprint import Footprint, kv_footprint, weight_footprint
from vllm_plugin.depth import described
from vllm_plugin.diffusion.settings import DiffusionSettings
from vllm_plugin.diffusion.support import diffusion_of
from vllm_plugin.kv_cache.beside import beside_of
from vllm_plugin.kv_cache.budget import layouts_of
from vllm_plugin.page_sizes import full_block_size
from vllm_plugin.quantization.cpu_int4 import resolve_activations
from vllm_plugin.settings import KEY, KVSettings, Settings, WeightSettings

logger = init_logger(f"vllm.{__name__}")
Rows = list[tuple[str, str]]


def table(vllm_config: VllmConfig, settings: Settings, num_blocks: int | None = None) -> Rows:
    """Describe what an engine compresses, from its config and the headers of the checkpoint.

    Args:
        vllm_config: of the engine, after the config edge.
        settings: the ``compress`` section.
        num_blocks: blocks of the allocated pool; None leaves out how many requests it holds.

    Returns:
        Rows ``(what, figures)``. A part that is not known has a row that says why. Nothing is
        raised: a table must not keep an engine from starting.
    """
    denoised = diffusion_of(vllm_config)
    parts: dict[str, Callable[[], Rows]] = {"weights": lambda: _weights(vllm_config, settings)}
    if denoised:
        parts["denoising"] = lambda: _denoising(vllm_config, denoised)
    else:
        parts["KV cache"] = lambda: _kv(vllm_config, settings, num_blocks)
        parts["depth"] = lambda: _depth(vllm_config)
    rows: Rows = []
    for name, part in parts.items():
        try:
            rows += part()
        except Exception as error:
            rows.append((name, f"not known: {error}"))
    return rows


def log_table(vllm_config: VllmConfig, settings: Settings, num_blocks: int | None = None) -> None:
    """Log the table, in one message. Parameters as for ``table``."""
    rows = table(vllm_config, settings, num_blocks)
    logger.info("What is compressed:\n%s", "\n".join(f"  {what:20}{told}" for what, told in rows))


def log_nothing() -> None:
    """Log that a ``compress`` section was given from which nothing follows."""
    sections = ", ".join(name for name in Settings.model_fields if name != "metrics")
    logger.warning(
        "What is compressed:\n  nothing: the section %r of --additional-config is empty; give it "
        "one of %s, or remove it",
        KEY,
        sections,
    )


def weights_of(config: VllmConfig, settings: Settings) -> Footprint | None:
    """Compute how many bytes the weights take.

    Args:
        config: of the engine.
        settings: the ``compress`` section.

    Returns:
        Bytes of the weights of all ranks, as this machine's kernels store them. None where they are
        not known: the checkpoint is not on this machine, or its files are not safetensors, or
        ``--load-format dummy`` reads none.
    """
    model, chosen = config.model_config, settings.weights or WeightSettings()
    if config.load_config.load_format == "dummy":
        return None
    on_cpu = current_platform.is_cpu()
    int8 = on_cpu and resolve_activations(chosen.activations) == "int8"
    try:
        return weight_footprint(
            model.model,
            getattr(config.quant_config, "method", model.quantization),
            chosen,
            revision=model.revision,
            download_dir=config.load_config.download_dir,
            tensor_parallel=config.parallel_config.tensor_parallel_size,
            packing="cpu-int8" if int8 else "cpu-bf16" if on_cpu else "checkpoint",
        )
    except Exception as error:  # the loader reports what is wrong with weights
        logger.debug("bytes of the weights are not known: %s", error)
        return None


def layouts(config: VllmConfig, settings: Settings) -> Mapping[int, Layout] | None:
    """Return the layout of each compressed layer; None without ``compress.kv``."""
    if settings.kv is None:
        return None
    model = config.model_config
    text = language_config(model.hf_config)
    ranks = config.parallel_config.tensor_parallel_size
    block_size = full_block_size(text, config.cache_config.block_size, ranks)
    return layouts_of(settings.kv, block_size, model.model, text, ranks)


def stages(config: VllmConfig) -> list[range]:
    """Return the layers of each pipeline stage."""
    count = config.parallel_config.pipeline_parallel_size
    layers = config.model_config.get_total_num_hidden_layers()
    return [range(*get_pp_indices(layers, stage, count)) for stage in range(count)]


def _weights(config: VllmConfig, settings: Settings) -> Rows:
    method = getattr(config.quant_config, "method", None)
    if (found := weights_of(config, settings)) is None:
        return [("weights", f"{method or 'not compressed'}, bytes not known")]
    before, after = (size / 2**20 for size in (found.original, found.compressed))
    rows: Rows = []
    if (weights := getattr(config.quant_config, "embedding_weights", None)) is not None:
        rows.append(("embeddings, lm_head", f"int{weights.num_bits}, in the bytes above"))
    if found.ratio == 1:
        return [("weights", f"not compressed, {before:.1f} MiB")]
    told = f"{method}{_bits(config)}, {before:.1f} -> {after:.1f} MiB ({found.ratio:.3f})"
    return [("weights", told), *rows]


def _bits(config: VllmConfig) -> str:
    """Say which bits codes have, where that is not 4."""
    schemes = getattr(config.quant_config, "target_scheme_map", {})
    linears = {target: each for target, each in schemes.items() if target not in EMBEDDING_TARGETS}
    bits = sorted({each["weights"].num_bits for each in linears.values() if each})
    if bits in ([], [4]):
        return ""
    unpacks = current_platform.is_cpu() and bits[0] < 4
    unpacked = ", those below 4 unpacked to 4" if unpacks else ""
    return f" of {' and '.join(map(str, bits))} bits{unpacked}"


def _depth(config: VllmConfig) -> Rows:
    told = described(config.model_config.hf_config)
    return [] if told is None else [("depth", told)]


def _kv(config: VllmConfig, settings: Settings, num_blocks: int | None) -> Rows:
    model, cache = config.model_config, config.cache_config
    text = language_config(model.hf_config)
    chosen = layouts(config, settings)
    size = kv_footprint(text, model.dtype, cache.cache_dtype, chosen, model.max_model_len)
    if chosen is None or settings.kv is None:
        return [("KV cache", f"not compressed, {size.original:,} bytes a token")]
    first = next(iter(chosen.values()))
    windows = f", then every {first.window} generated tokens" if first.window else ""
    # A budget is the smaller a share, the longer the request.
    of_length = f" of {model.max_model_len:,}" if settings.kv.budget else ""
    longest = model.max_model_len
    cut = ""
    if (head := first.head(longest)) < longest:
        cut = f", those of more than {head} while they are computed"
    rows = [
        ("KV cache", f"{settings.kv.policy}, {len(chosen)} of {text.num_hidden_layers} layers"),
        (
            "KV bytes a token",
            f"{size.original:,} -> {size.compressed:,} ({size.ratio:.3f}){of_length}",
        ),
        *_budget(settings.kv, chosen, size.original // len(chosen)),
        ("compacted", f"prompts from {first.compacted_from} tokens on{cut}{windows}"),
        *_beside(config, settings.kv, chosen),
    ]
    if num_blocks is not None:
        ranks = config.parallel_config.tensor_parallel_size
        before, after = requests_in_pool(
            text, chosen, cache.block_size, num_blocks, longest, stages(config), ranks
        )
        rows.append(("requests that fit", f"{before} -> {after} of {longest:,} tokens"))
    return rows


def _budget(settings: KVSettings, layouts: Mapping[int, Layout], token_bytes: int) -> Rows:
    """What a budget leaves of a request; ``token_bytes``: of a token in one layer."""
    bounded = [one for one in layouts.values() if isinstance(one, BoundedLayout)]
    if not bounded:
        return []
    stays, at_most = (
        sum(map(tokens, bounded)) * token_bytes / 2**20
        for tokens in (lambda one: one.budget, lambda one: one.most_tokens)
    )
    told = f"{settings.budget:,} tokens of a request in each layer"
    if len({one.budget for one in bounded}) > 1:
        told += " on average"
    return [("budget", f"{told}, {stays:.1f} MiB; {at_most:.1f} MiB at most while it generates")]


def _beside(config: VllmConfig, settings: KVSettings, layouts: Mapping[int, Layout]) -> Rows:
    """What an engine keeps free beside the cache, on the rank where that is most."""
    policy = settings.build()
    if not isinstance(policy, KVPolicy):
        return []
    every = [beside_of(config, policy, layouts, stage) for stage in stages(config)]
    found = max(every, key=lambda beside: beside.total)
    if not found.total:
        return []
    told = f"{found.total / 2**20:.1f} MiB on each rank"
    if found.queries:
        requests = config.scheduler_config.max_num_seqs
        told += (
            f", {found.queries / 2**20:.1f} MiB of it for queries that score decode windows, of "
            f"{requests} requests (--max-num-seqs)"
        )
    return [("beside the KV cache", told)]


def _denoising(config: VllmConfig, served: DiffusionSettings) -> Rows:
    model = config.model_config
    text = language_config(model.hf_config)
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
