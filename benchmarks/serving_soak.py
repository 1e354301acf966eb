# SPDX-License-Identifier: Apache-2.0
"""A bounded soak: the same mixed load on a compressed server and on stock, one after the other.

    .venv/bin/python -m benchmarks.serving_soak [--json] [--out FILE]

2,000 requests to `vllm serve` on the demo model, int4 weights (smoothquant_plus) and prefix_kv at
keep 0.25, in a KV cache of 64 MiB, so that requests queue and are preempted. 16 at a time: chats
and completions, streamed and not, 20 to 700 prompt tokens, 2 to 100 new ones, a third with a shared
prefix; one in ten goes away after a random time. Requests are the same for both servers.

  requests         sent to the compressed server
  errors           of them not aborted by the client and not answered in full
  errors_stock     the same, of stock vLLM
  aborted          requests that the client gave up
  leaked_blocks    blocks in use when all is done (0 before the first request)
  rss_growth_ratio resident bytes of all the server's processes at the end over those after a
                   fifth of the load

Extra keys of the compressed server: compactions, evicted_tokens, preemptions, least_kept_ratio;
rss_growth_ratio_late, from half of the load on, as shapes that come for the first time take memory
early; and both ratios of stock. With --out, resident bytes at each twentieth of the load.

Limits: one machine runs the client too. Speed is not compared: see kv_capacity.
"""

import asyncio
import json
import os
import random
import sys
from dataclasses import dataclass, field
from typing import Any

import openai
import psutil
from tqdm import tqdm

from benchmarks.common import Options, Part, Result, cache_folder, main
from benchmarks.kv_engine import BLOCK, bench_model, contender
from benchmarks.server import Server, serving

KEEP = 0.25
AT_ONCE = 16
REQUESTS = 2000
POOL_BYTES = 64 << 20
KEYS = ("requests", "errors", "errors_stock", "leaked_blocks", "rss_growth_ratio", "aborted")
COUNTERS = {
    "compactions": "vllm_compress_kv_compactions_total",
    "evicted_tokens": "vllm_compress_kv_evicted_tokens_total",
    "preemptions": "vllm:num_preemptions_total",
}
WORDS = ("river", "stone", "light", "under", "wind", "seven", "paper", "city", "wrote", "found")


@dataclass(frozen=True)
class Ask:
    """One request. abort: seconds after which the client goes away, or None."""

    chat: bool
    stream: bool
    text: str
    tokens: int
    abort: float | None


def load(count: int, seed: int) -> list[Ask]:
    """The requests, the same for a seed."""
    draw = random.Random(seed)
    shared = " ".join(draw.choices(WORDS, k=200))
    asks = []
    for number in range(count):
        words = draw.choices(WORDS, k=int(draw.triangular(10, 300, 30)))
        prefix = shared if number % 3 == 0 else f"Request {number}."
        asks.append(
            Ask(
                chat=draw.random() < 0.7,
                stream=draw.random() < 0.5,
                text=f"{prefix} {' '.join(words)}",
                tokens=int(draw.triangular(2, 100, 4)),
                abort=draw.uniform(0.05, 3) if draw.random() < 0.1 else None,
            )
        )
    return asks


async def answered(client: openai.AsyncOpenAI, ask: Ask) -> bool:
    """Send one request; whether it was answered in full."""
    what: dict[str, Any] = {"model": "demo", "max_tokens": ask.tokens, "temperature": 0}
    what |= {"stream": ask.stream, "extra_body": {"ignore_eos": True}}
    if ask.stream:
        what["stream_options"] = {"include_usage": True}
    if ask.chat:
        messages = [{"role": "user", "content": ask.text}]
        answer = await client.chat.completions.create(messages=messages, **what)
    else:
        answer = await client.completions.create(prompt=ask.text, **what)
    if not ask.stream:
        return bool(answer.usage.completion_tokens == ask.tokens and answer.choices)
    usage = None
    async for chunk in answer:
        usage = chunk.usage or usage
    return usage is not None and usage.completion_tokens == ask.tokens


@dataclass
class Soaked:
    """What came of a load. problems: the first of them, in words."""

    errors: int = 0
    aborted: int = 0
    rss: list[int] = field(default_factory=list)  # after each twentieth of the load
    leaked: int = 0
    least_kept: float = 1.0
    problems: tuple[str, ...] = ()


async def soak(server: Server, asks: list[Ask]) -> Soaked:
    """Send all requests, AT_ONCE at a time, then wait until the server is idle."""
    client = openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600
    )
    done, gate, problems = Soaked(), asyncio.Semaphore(AT_ONCE), []
    with tqdm(total=len(asks), desc="soak", leave=False) as bar:

        async def one(ask: Ask) -> None:
            async with gate:
                try:
                    async with asyncio.timeout(ask.abort):
                        if not await answered(client, ask):
                            problems.append("not answered in full")
                except TimeoutError:
                    done.aborted += 1
                except Exception as error:
                    problems.append(f"{type(error).__name__}: {error}")
                bar.update()

        async def watch() -> None:
            while True:
                await asyncio.sleep(2)
                while len(done.rss) < 20 * bar.n // len(asks):
                    done.rss.append(resident(server.pid))
                series = await asyncio.to_thread(server.scrape)
                kept = [s.value for s in series if s.name == "vllm_compress_kv_kept_ratio"]
                done.least_kept = min(done.least_kept, *kept, 1.0)

        watcher = asyncio.create_task(watch())
        await asyncio.gather(*map(one, asks))
        watcher.cancel()
    await client.close()
    for _ in range(60):
        if not server.value("vllm:num_requests_running") + server.value(
            "vllm:num_requests_waiting"
        ):
            break
        await asyncio.sleep(1)
    done.leaked = used_blocks(server)
    done.rss += [resident(server.pid)] * (20 - len(done.rss))
    done.errors, done.problems = len(problems), tuple(problems[:5])
    return done


def resident(pid: int) -> int:
    """Bytes of a process and all below it; pages that they share count for each."""
    process = psutil.Process(pid)
    return sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))


def used_blocks(server: Server) -> int:
    """Blocks that requests hold, of the pool's own usage; the null block is not counted."""
    blocks = next(
        int(s.labels["num_gpu_blocks"])
        for s in server.scrape()
        if s.name == "vllm:cache_config_info"
    )
    return round(server.value("vllm:kv_cache_usage_perc") * (blocks - 1))


def run(options: Options, result: Result) -> None:
    """Both servers, one after the other."""
    count = 40 if options.smoke else REQUESTS
    model, asks = bench_model(options), load(count, options.seed)
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would overrule --kv-cache-memory-bytes
    common = ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(POOL_BYTES)]
    config = json.dumps(contender("prefix_kv", KEEP, model, options)["additional_config"])
    compressed = ["--quantization", "smoothquant_plus", "--additional-config", config]
    soaked = {}
    for name, arguments, env in (
        ("compressed", compressed, {}),
        ("stock", ["--block-size", str(BLOCK)], {"VLLM_PLUGINS": ""}),
    ):
        output = cache_folder() / f"soak-{name}.log"
        with serving(model, *common, *arguments, env=env, output=output) as server:
            soaked[name] = asyncio.run(soak(server, asks))
            if name == "compressed":
                for key, series in COUNTERS.items():
                    result.put(key, server.value(series))
        result.details[name] = vars(soaked[name])
    ours, stock = soaked["compressed"], soaked["stock"]
    result.put("requests", count)
    result.put("errors", ours.errors)
    result.put("errors_stock", stock.errors)
    result.put("aborted", ours.aborted)
    result.put("leaked_blocks", ours.leaked)
    for suffix, rss in (("", ours.rss), ("_stock", stock.rss)):
        result.put(f"rss_growth_ratio{suffix}", rss[-1] / rss[3])
        result.put(f"rss_growth_ratio_late{suffix}", rss[-1] / rss[9])
    result.put("least_kept_ratio", ours.least_kept)


PARTS = {"soak": Part(KEYS, run)}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
