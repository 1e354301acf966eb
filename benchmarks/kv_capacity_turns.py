# SPDX-License-Identifier: Apache-2.0
"""What the later turns of a conversation find in the prefix cache: counts, not timings."""

from typing import Any

from benchmarks.common import Options, Result
from benchmarks.kv_engine import BLOCK, KVEngine, computed_dtype, policy
from benchmarks.random_models import TINY, random_llama

# What is found depends on lengths alone, so that any policy stands for all others.
CONTENDERS: dict[str, dict[str, Any]] = {
    "full": {"plugin": False},
    "keep_050": policy("key_diff", keep=0.5),
    "keep_025": policy("key_diff", keep=0.25),
    "budget_512": policy("key_diff", budget=512),
    "budget_4096": policy("key_diff", budget=4096),
}


def turns(options: Options, result: Result) -> None:
    """Fill P_turn_hits."""
    talk = {"first": 2000, "answer": 150, "question": 100, "turns": 4, "seed": options.seed}
    contenders = dict(CONTENDERS)
    if options.smoke:
        talk |= {"first": 700, "answer": 20, "turns": 2}
        contenders = {name: CONTENDERS[name] for name in ("full", "keep_025")}
    for name, arguments in contenders.items():
        with KVEngine(
            random_llama(TINY, options),
            block_size=BLOCK,
            max_model_len=4608,
            hf_overrides={"max_position_embeddings": 4608},
            kv_cache_memory_bytes=1 << 27,
            dtype=computed_dtype(),
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            preloaded=options.smoke,
            **arguments,
        ) as engine:
            seen = engine.ask("conversation", **talk)
        later = seen[1:]
        hits, prompts = (sum(turn[key] for turn in later) for key in ("hit", "prompt"))
        result.put(f"{name}_turn_hits", hits / prompts, turns=seen)
    for name in CONTENDERS:
        if f"{name}_turn_hits" not in result.values:
            result.missing(f"{name}_turn_hits", "--smoke leaves it out")
