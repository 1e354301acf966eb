# SPDX-License-Identifier: Apache-2.0
"""KV policies: what the prefix cache saves in models with windows or states beside attention.

    .venv/bin/python -m benchmarks.kv_hits [--json] [--out FILE]

Random models of two layers, M in gpt_oss and gemma3 (one layer with a sliding window of 64 tokens)
and qwen3_5 (one layer with a state; 288 tokens to a block). snap_kv at keep 0.25 and stock vLLM
serve the same prompts, one after the other. Figures are tokens hit, as vLLM counts them, ours over
stock's.

  M_repeat_ratio   8 prompts of 4 to 16 blocks of qwen3_5 (1,152 to 4,608 tokens), sent again
  M_chat_ratio     a conversation of 1,500 tokens that grows by 700 tokens a turn, 4 turns on
  M_shared_ratio   6 prompts of 3,000 tokens whose first 1,500 are the same; of the last 4, because
                   the second one shows vLLM where they part
  prefix_hit_ratio_hybrid   the least M_repeat_ratio

Extra: M_repeat_stock_share, tokens that stock hits over tokens of the prompts sent again.

These are counts, so a busy machine does not change them. A prompt that frees a share of its blocks
can hit that share: 0.75 here, less what rounding to whole blocks takes.
"""

import random
import sys
from pathlib import Path

from benchmarks.common import Options, Part, Result, main
from benchmarks.engine import Engine
from benchmarks.kv_engine import BLOCK, computed_dtype, contender
from benchmarks.random_models import HYBRIDS, random_hybrid

KEEP = 0.25
STATES = ("qwen3_5",)
SMOKE = ("qwen3_5",)
SHORTEST, LONGEST, PROMPTS = 1152, 4608, 8
FIRST_TURN, TURN, TURNS = 1500, 700, 4
SHARED, TAIL, SHARING, LEARNT = 1500, 1500, 6, 2


class HitsEngine(Engine):
    """An engine that tells what its prefix cache saves."""

    child = "benchmarks.kv_hits_child:HitsChild"


def hits(options: Options, result: Result) -> None:
    """Fill the keys of all models."""
    for name in HYBRIDS:
        if options.smoke and name not in SMOKE:
            for kind in ("repeat", "chat", "shared"):
                result.missing(f"{name}_{kind}_ratio", "--smoke leaves it out")
            continue
        model = random_hybrid(name, options)
        stock, ours = (_served(model, name, kind, options) for kind in ("full", "snap_kv"))
        for kind, tokens in ours.items():
            if kind != "sent":
                details = {"tokens": tokens, "stock_tokens": stock[kind]}
                result.put(f"{name}_{kind}_ratio", tokens / stock[kind], **details)
        result.put(f"{name}_repeat_stock_share", stock["repeat"] / stock["sent"])
    ratios = [result.values.get(f"{name}_repeat_ratio") for name in HYBRIDS]
    least = min(one for one in ratios if one is not None)
    result.put("prefix_hit_ratio_hybrid", least, keep=KEEP)


def _served(model: Path, name: str, kind: str, options: Options) -> dict[str, int]:
    """Tokens hit by kind of traffic, and tokens of the prompts that were sent again."""
    # vLLM's kernels of states on a CPU want bfloat16.
    dtype = "bfloat16" if name in STATES else computed_dtype()
    arguments = contender(kind, KEEP, model, options) | {
        "dtype": dtype,
        "block_size": BLOCK,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "max_model_len": 8192,
        "disable_log_stats": False,
    }
    with HitsEngine(model, preloaded=options.smoke, **arguments) as engine:
        draw = random.Random(options.seed)

        def text(tokens: int) -> list[int]:
            return [draw.randrange(1000) for _ in range(tokens)]

        count = 2 if options.smoke else PROMPTS
        prompts = [text(draw.randint(SHORTEST, LONGEST)) for _ in range(count)]
        engine.ask("hits", prompts=prompts)
        found = {"repeat": engine.ask("hits", prompts=prompts), "sent": sum(map(len, prompts))}
        talk = text(FIRST_TURN + TURNS * TURN)
        turns = [talk[: FIRST_TURN + at * TURN] for at in range(TURNS + 1)]
        engine.ask("hits", prompts=turns[:1])
        found["chat"] = engine.ask("hits", prompts=turns[1:])
        shared = text(SHARED)
        sharing = [[*shared, *text(TAIL)] for _ in range(SHARING)]
        engine.ask("hits", prompts=sharing[:LEARNT])
        found["shared"] = engine.ask("hits", prompts=sharing[LEARNT:])
    return found


KEYS = tuple(f"{name}_{kind}_ratio" for name in HYBRIDS for kind in ("repeat", "chat", "shared"))
PARTS = {"hits": Part(("prefix_hit_ratio_hybrid", *KEYS), hits)}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
