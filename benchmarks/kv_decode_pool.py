# SPDX-License-Identifier: Apache-2.0
"""What a budget in tokens does to a pool: blocks of one long request, and many at once."""

from typing import Any

from benchmarks.common import Options, Result
from benchmarks.kv_decode_quality import BUDGETS, POLICIES, WINDOW
from benchmarks.kv_engine import (
    BLOCK,
    FORCED_TOKENS,
    KVEngine,
    bench_model,
    computed_dtype,
    policy,
    shape_of,
)
from benchmarks.random_models import TINY, random_llama

_PROMPT = 64


def peaks(options: Options, result: Result) -> None:
    """Fill P_B_peak_blocks, full_peak_blocks and long_peak_growth."""
    short, long = (600, 1200) if options.smoke else (2000, 8000)
    whole = _peaks({"plugin": False}, [short], options)
    result.put("full_peak_blocks", whole[0])
    for budget in (256,) if options.smoke else BUDGETS:
        arguments = policy("key_diff", budget=budget, decode_window=WINDOW)
        both = budget == min(BUDGETS)
        seen = _peaks(arguments, [short, long] if both else [short], options)
        for name in POLICIES:
            result.put(f"{name}_{budget}_peak_blocks", seen[0])
        if both:
            details = {"peak_blocks": seen, "tokens": [short, long]}
            result.put("long_peak_growth", seen[1] / seen[0], **details)


def _peaks(arguments: dict[str, Any], generated: list[int], options: Options) -> list[int]:
    """The most live blocks of a request that generates so many tokens."""
    longest = max(generated)
    with KVEngine(
        random_llama(TINY, options),
        block_size=BLOCK,
        max_model_len=_PROMPT + longest + BLOCK,
        hf_overrides={"max_position_embeddings": 2 * longest},
        dtype=computed_dtype(),
        logits_processors=[FORCED_TOKENS],
        skip_tokenizer_init=True,
        preloaded=options.smoke,
        **arguments,
    ) as engine:
        prompt = list(range(1, _PROMPT + 1))
        texts = [[5 + at % 50 for at in range(tokens)] for tokens in generated]
        answers = [engine.ask("grown", requests=[(prompt, text)])[0] for text in texts]
    return [answer["peak_blocks"] for answer in answers]


def throughput(options: Options, result: Result) -> None:
    """Fill long_throughput_ratio and long_steps_ratio."""
    requests, tokens, budget = (4, 400, 256) if options.smoke else (16, 1500, 256)
    model = bench_model(options)
    wide = 2 if computed_dtype() == "float32" else 1
    blocks = 2 * -(-(_PROMPT + tokens) // BLOCK) + 1  # the one more is never given away
    seen = {}
    for name, arguments in {
        "full": {"plugin": False},
        "h2o": policy("h2o", budget=budget, decode_window=budget // 2),
    }.items():
        with KVEngine(
            model,
            block_size=BLOCK,
            max_model_len=_PROMPT + tokens + BLOCK,
            kv_cache_memory_bytes=blocks * shape_of(model).block_bytes * wide,
            max_num_seqs=requests,
            dtype=computed_dtype(),
            skip_tokenizer_init=True,
            preloaded=options.smoke,
            **arguments,
        ) as engine:
            lengths = [_PROMPT] * requests
            seen[name] = engine.ask("run", lengths=lengths, tokens=tokens, seed=options.seed)
    result.note("throughput", seen)
    ratios = [seen["h2o"][key] / seen["full"][key] for key in ("tokens_per_s", "steps")]
    result.put("long_throughput_ratio", ratios[0])
    result.put("long_steps_ratio", ratios[1])
