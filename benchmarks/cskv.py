# SPDX-License-Identifier: Apache-2.0
"""CSKV: what a token costs as a latent, what reading it costs, and how good the bases are.

    .venv/bin/python -m benchmarks.cskv [--part bytes|decode|error] [--json] [--out FILE]

Demo model, blocks of 32 tokens, bases of the first half of Newton's Opticks at ratio 0.8.

bytes   bytes_per_token_ratio_080, bytes_per_token_ratio_080_int4: bytes of live blocks that another
        1,600 tokens of prompt take (330 against 1,930; four such pairs), over the full cache's;
        scales and what is lost to whole blocks are in it.
decode  decode_ratio_b8_2000: new tokens per second of 8 requests that go from 1,950 to 2,000
        tokens, ratio 0.8 over stock vLLM in blocks of 32. Extra: decode_ratio_b8_2000_int4;
        attend_ms, one layer's attention of such a step, and share_of_OP, what each of torch's
        operations takes of it.
error   recon_error_vs_svd_max, recon_error_vs_asvd_max: squared error of keys or values restored
        by the closed form (``--objective reconstruction``) over that of SVD and of ASVD at the same
        rank, on the last quarter of the text, which nothing was fitted to. The largest over layers,
        of keys and values.

Limits. Timings need a machine that does nothing else. On a CPU keys are rebuilt in float32.
"""

import json
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.common import ROOT, Options, Part, Result, alternate, cache_folder, main
from benchmarks.engine import in_process
from benchmarks.kv_engine import BLOCK, KVEngine, NotMeasured, contender, shape_of
from benchmarks.texts import opticks
from vllm_plugin.demo_model import demo_model_path

KEEP = 0.2
SHORT, LONG = 330, 1930
OFFSETS = (0, 32, 64, 96)
NAMES = {"cskv": "", "cskv_int4": "_int4"}


def _engine(name: str, options: Options, cached: bool = False) -> KVEngine:
    """cached: prompts of earlier rounds are in the prefix cache; decoding is the same."""
    model = demo_model_path()
    return KVEngine(
        model,
        block_size=BLOCK,
        max_model_len=2048,
        kv_cache_memory_bytes=1 << 29,
        skip_tokenizer_init=True,
        enable_prefix_caching=cached,
        **({"plugin": False} if name == "full" else contender(name, KEEP, model, options)),
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
        result.put(f"bytes_per_token_ratio_080{suffix}", grown[name] / grown["full"])


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
    for key, value in in_process(_parts, request["batch"], request["prompt"]).items():
        result.put(key, value)


def _parts(requests: int, tokens: int) -> dict[str, float]:
    """Where the time of one layer's attention goes, on tensors of the demo model's shape."""
    from torch.profiler import ProfilerActivity, profile
    from vllm.platforms import current_platform

    from kv_policies.latent_attention import Decoder, Latents, Raw, attend
    from vllm_plugin.kv_cache.latent import KernelRope

    assert current_platform.is_cpu()
    heads, kv_heads, width, recent = 9, 3, 64, 64
    ranks = 25, 51  # of keys and values, on average
    features = kv_heads * width
    angles = torch.randn(2048, width // 2)
    rope = KernelRope(torch.cat((angles.cos(), angles.sin()), -1))
    decoders = [Decoder(torch.randn(rank + 1, features)) for rank in ranks]
    latents = Latents(
        *(torch.randn(requests, tokens, rank).bfloat16() for rank in ranks),
        torch.arange(tokens).expand(requests, -1),
        torch.zeros(requests, tokens),
    )
    raw = Raw(
        *torch.randn(2, requests, kv_heads, recent, width).bfloat16(),
        torch.full((requests, 1), recent),
    )
    query = torch.randn(requests, heads, 1, width).bfloat16()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(60):
            attend(query, latents, raw, *decoders, rope, width**-0.5)
    spent = {event.key: event.self_cpu_time_total for event in recorded.key_averages()}
    total = sum(spent.values())
    found = {"attend_ms": total / 60 / 1000}
    for name, time in sorted(spent.items(), key=lambda item: -item[1])[:6]:
        found[f"share_of_{name.rpartition('::')[2]}"] = time / total
    return found


def error(options: Options, result: Result) -> None:
    """Fill recon_error_vs_*."""
    text, file = cache_folder() / "opticks-1.txt", cache_folder() / "reconstruction.safetensors"
    text.write_text(opticks()[0], encoding="utf-8")
    command = [sys.executable, "-m", "vllm_plugin.cli", "calibrate-kv", str(demo_model_path())]
    command += ["--ratio", "0.8", "--objective", "reconstruction", "--text", str(text)]
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


PARTS = {
    "bytes": Part(tuple(f"bytes_per_token_ratio_080{s}" for s in NAMES.values()), bytes_per_token),
    "decode": Part(("decode_ratio_b8_2000",), decode),
    "error": Part(("recon_error_vs_svd_max", "recon_error_vs_asvd_max"), error),
}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
