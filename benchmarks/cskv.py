# SPDX-License-Identifier: Apache-2.0
"""CSKV: what a token costs as a latent, what reading it costs, and how good the bases are.

    .venv/bin/python -m benchmarks.cskv [--part bytes|decode|error|quality|ranks] [--json]

Demo model, blocks of 32 tokens, bases of the first half of Newton's Opticks: at ratio 0.8 in 16
bits, and at ratio 0.86 in 4 bits, which is the default.

bytes   bytes_per_token_ratio_080, bytes_per_token_ratio_086_int4: bytes of live blocks that another
        1,600 tokens of prompt take (330 against 1,930, 394 against 1,994, ...: eight such pairs),
        over the full cache's; scales and what is lost to whole blocks are in it.
decode  decode_ratio_b8_2000: new tokens per second of 8 requests that go from 1,950 to 2,000
        tokens, over stock vLLM in blocks of 32. Extra: decode_ratio_b8_2000_int4;
        attend_ms and attend_torch_ms, one layer's attention of such a step by the kernel and
        without it; attend_share, what the kernel takes of a step.
error   recon_error_vs_svd_max, recon_error_vs_asvd_max: squared error of keys or values restored
        by the closed form (``--objective reconstruction``) over that of SVD and of ASVD at the same
        rank, on the last quarter of the text, which nothing was fitted to. The largest over layers,
        of keys and values.
quality cskv_nats, cskv_passkey, cskv_locker, cskv_record, cskv_dialogue: at ratio 0.86 in 4 bits,
        nats and recall as in ``kv_quality``, of 8 windows, and of 4 prompts of 300 and 700
        tokens for each of four wordings of a key. Extra: the same for cskv_16bit_020 (ratio 0.8 in
        16 bits), cskv_020 (in 4 bits) and cskv_006 (ratio 0.94); cskv_share: what a token takes
        of the full cache's bytes in whole blocks of 32. In float32 on x86 without AVX-512, else in
        bfloat16.
ranks   tpN_BITSbit_key_error, tpN_BITSbit_value_error: share of the energy of keys and values that
        bases for N ranks of tensor parallelism lose on the text that they were fitted to, in the
        metric of attention, mean over layers; N is 1 or 3, at ratio 0.8 in 16 bits and 0.86 in 4.
        tpN_16bit_nats, tpN_16bit_passkey, _locker, _record, _dialogue: as for ``quality``. One rank
        serves bases that keep exactly what those of N ranks do.

Limits. Timings need a machine that does nothing else. Without AVX-512 there is no kernel.
"""

import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.common import ROOT, Options, Part, Result, alternate, cache_folder, main
from benchmarks.cskv_quality import QUALITY, quality
from benchmarks.cskv_ranks import MEASURES, RANKS, RATIOS, SERVED, ranks
from benchmarks.engine import in_process
from benchmarks.kv_engine import BLOCK, KVEngine, NotMeasured, contender, shape_of
from benchmarks.texts import opticks
from kv_policies.latents.bases_header import SIDES
from vllm_plugin.demo_model import demo_model_path

KEEP = {"full": 1, "cskv_16bit": 0.2, "cskv": 0.14}
SHORT, LONG = 330, 1930
OFFSETS = range(0, 512, 64)
NAMES = {"cskv_16bit": "", "cskv": "_int4"}


def _engine(name: str, options: Options, cached: bool = False) -> KVEngine:
    """cached: prompts of earlier rounds are in the prefix cache; decoding is the same."""
    model = demo_model_path()
    return KVEngine(
        model,
        block_size=BLOCK,
        max_model_len=2560,
        kv_cache_memory_bytes=1 << 29,
        skip_tokenizer_init=True,
        enable_prefix_caching=cached,
        **({"plugin": False} if name == "full" else contender(name, KEEP[name], model, options)),
    )


def bytes_per_token(options: Options, result: Result) -> None:
    """Fill bytes_per_token_ratio_*."""
    grown, block_bytes = {}, shape_of(demo_model_path()).block_bytes
    for name in ("full", *NAMES):
        with _engine(name, options) as engine:
            grown[name] = 0
            for offset in OFFSETS:
                for length, sign in ((SHORT + offset, -1), (LONG + offset, 1)):
                    seen = engine.ask("run", lengths=[length], tokens=8, seed=options.seed)
                    live = -(-length // BLOCK) * block_bytes - seen["freed_bytes"]
                    grown[name] += sign * live
    for name, suffix in NAMES.items():
        ratio = "086" if suffix else "080"
        result.put(f"bytes_per_token_ratio_{ratio}{suffix}", grown[name] / grown["full"])


def decode(options: Options, result: Result) -> None:
    """Fill decode_ratio_*, attend_ms and share_of_*."""
    request = {"batch": 8, "prompt": 1950, "tokens": 50, "seed": options.seed}
    if options.smoke:
        request |= {"batch": 2, "prompt": 200, "tokens": 3}
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(_engine(name, options, cached=True))
            for name in ("full", *NAMES)
        }
        speed = alternate(
            list(engines),
            options.rounds,
            lambda name: engines[name].ask("decode", **request),
            "decode",
        )
    result.details["tokens_per_s"] = speed
    for name, suffix in NAMES.items():
        result.ratio(f"decode_ratio_b8_2000{suffix}", speed[name], speed["full"])
    parts = in_process(_parts, request["batch"], request["prompt"])
    for key, value in parts.items():
        result.put(key, value)
    if "attend_ms" in parts:
        layers = shape_of(demo_model_path()).layers
        steps_per_s = statistics.median(speed["cskv_16bit"]) / request["batch"]
        result.put("attend_share", parts["attend_ms"] / 1000 * layers * steps_per_s)


def _parts(requests: int, tokens: int) -> dict[str, float]:
    """Times of one layer's attention, on tensors of the demo model's shape."""
    from vllm.platforms import current_platform

    from kv_policies.latents.cache import LatentCache
    from kv_policies.latents.columns import Contents
    from kv_policies.latents.format import LatentFormat
    from kv_policies.latents.low_rank import Factor
    from kv_policies.latents.reading import Reading
    from vllm_plugin.kv_cache.latent import KernelRope
    from vllm_plugin.kv_cache.latent_cpu import CPULatentCache
    from vllm_plugin.kv_cache.latent_cpu_build import load, why_not
    from vllm_plugin.kv_cache.pages import Order, Pages

    assert current_platform.is_cpu()
    heads, shape = 9, (3, BLOCK, 64)
    features, elements = 3 * 64, 2 * 3 * BLOCK * 64
    form = LatentFormat(25, 51, 16, 160)  # ranks on average
    factors = [
        Factor(torch.zeros(features, rank), torch.randn(rank, features), torch.randn(features))
        for rank in (form.key_rank, form.value_rank)
    ]
    angles = torch.randn(2048, 32)
    rope = KernelRope(torch.cat((angles.cos(), angles.sin()), -1))
    columns = -(-tokens // form.tokens)
    blocks = torch.arange(requests * (columns + 2)).view(requests, -1)
    pages = Pages(
        torch.randn(blocks.numel(), elements).bfloat16(),
        *(Order.of(side, torch.bfloat16) for side in torch.arange(elements).view(2, 3, -1)),
        shape,
    )
    first = (torch.arange(columns) * form.tokens).repeat(requests, 1)
    reading = Reading(
        tokens=torch.arange(requests)[:, None],
        seen=torch.full((requests, 1), 2 * BLOCK),
        raw=blocks[:, columns:].contiguous(),
        blocks=blocks[:, :columns].contiguous(),
        contents=Contents(first, (tokens - first).clamp(max=form.tokens), form.tokens, tokens),
        whole=True,
    )
    query = torch.randn(requests, heads, 64).bfloat16()
    output = torch.empty_like(query)
    caches = {"attend_torch_ms": LatentCache(pages.blocks, form, *factors, rope)}
    if why_not(torch.bfloat16) is None:
        caches["attend_ms"] = CPULatentCache(pages, form, *factors, rope, kernel=load())
    times: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(60):
        for name, cache in caches.items():
            start = time.perf_counter()
            cache.attend(reading, pages, query, 0.125, output)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(taken) for name, taken in times.items()}


def error(options: Options, result: Result) -> None:
    """Fill recon_error_vs_*."""
    text, file = cache_folder() / "opticks-1.txt", cache_folder() / "reconstruction.safetensors"
    text.write_text(opticks()[0], encoding="utf-8")
    command = [sys.executable, "-m", "vllm_plugin.cli", "calibrate-kv", str(demo_model_path())]
    command += ["--ratio", "0.8", "--bits", "16", "--objective", "reconstruction"]
    command += ["--text", str(text)]
    command += ["--out", str(file), "--json"]
    if options.smoke:
        command += ["--samples", "4", "--length", "128"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if told.returncode:
        raise NotMeasured(told.stderr[-400:])
    layers: list[dict[str, Any]] = json.loads(told.stdout)["held_out"]
    result.details["held_out"] = layers
    for other in ("svd", "asvd"):
        ratios = [
            layer[side]["closed_form"] / layer[side][other]
            for layer in layers
            for side in ("key", "value")
        ]
        result.put(f"recon_error_vs_{other}_max", max(ratios))


ERRORS = tuple(f"tp{n}_{bits}bit_{side}_error" for n in RANKS for bits in RATIOS for side in SIDES)
OF_RANKS = tuple(f"tp{n}_{SERVED}bit_{what}" for n in RANKS for what in MEASURES)
PARTS = {
    "bytes": Part(("bytes_per_token_ratio_080", "bytes_per_token_ratio_086_int4"), bytes_per_token),
    "decode": Part(("decode_ratio_b8_2000",), decode),
    "error": Part(("recon_error_vs_svd_max", "recon_error_vs_asvd_max"), error),
    "quality": Part(tuple(f"cskv_{what}" for what in QUALITY), quality),
    "ranks": Part((*ERRORS, *OF_RANKS), ranks),
}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
