# SPDX-License-Identifier: Apache-2.0
"""KV policies: how many requests one pool serves, and what compaction costs.

    .venv/bin/python -m benchmarks.kv_capacity [--part pool|windows|turns|cost] [--out FILE]

Demo model, blocks of 32 tokens, eager mode, no prefix caching; each policy P with its defaults.

pool     16 prompts of 440 to 500 tokens at once, 64 new tokens each, up to 32 requests and 512
         tokens a step, in a pool of bytes in which 5 requests with the full cache fit from start to
         end. P in prefix_kv, snap_kv, key_diff, recent at keep 0.25, cskv at ratio 0.86, and fp8
         (vLLM's own). Extra: cskv_16bit, ratio 0.8 in 16 bits; cskv_halves, the same ranks in all
         layers too; snap_kv_fp8, in an fp8 cache, which needs AVX-512 or AMX on a CPU.
  P_steps_ratio                  engine steps over those of the full cache; smaller is better
  P_peak_running, full_peak_running   most requests in one step
  P_preemptions                  requests thrown out and computed again, all in all
  P_kept                         bytes of live blocks over those of the full cache for the same
                                 tokens, generated ones included, of requests past their prompt
  Extra: full_preemptions.
windows  16 prompts of 100 to 160 tokens, 512 new tokens each, a pool for 4; snap_kv at keep 0.25.
  decode_window_steps_ratio      steps with decode_window 128 over steps with decode_window 0
turns    A conversation of 4 turns in a tiny random model, with prefix caching: a prompt of 2,000
         tokens, answers of 150, and 100 tokens more in each later turn.
  P_turn_hits                    tokens of the later turns' prompts that the prefix cache had, over
                                 all of theirs; P in full, keep_050, keep_025, budget_512,
                                 budget_4096
cost     Extra keys named after a policy are the same figure for it.
  keep100_throughput_ratio       new tokens per second, 16 prompts of 100 to 900 tokens, ample pool:
                                 snap_kv loaded at keep 1.0 over stock vLLM, both in blocks of 32.
                                 Extra: keep100_vs_default_block_ratio (stock's own block size)
  compaction_share_of_prefill    1 - (prefill seconds at keep 1.0) / (seconds at keep 0.25), one
                                 prompt of 2,000 tokens, prefix_kv
  builder_ms_per_group_step      milliseconds of the metadata builder per group and step, ours (4
                                 levels) above stock's; 8 requests decoding
  levels4_throughput_ratio       decode tokens per second, 8 requests, same keep: 4 levels over 1
  plan_ms_mixed_step             milliseconds that planning a step takes on the host, 6 groups of
                                 layers: 31 requests decode, the prompt of another comes in 8
                                 chunks; mean over the chunks, also the last; CPU time, no engine
  plan_ms_mixed_step_long        the same at 16 times max_model_len (65,536 in place of 4,096)
                                 Extra: both for cskv, and plan_ms_decode_step for both
  plan_long_ratio                the second over the first, in turns. Extra: the same for cskv

Limits. On x86 without AVX-512 all runs are in float32, with as many blocks: products in bfloat16
would take ten times as long. Steps count the same on every machine; what a step costs does not: a
larger batch makes a step longer, so the time saved is less than the steps saved. Prompts are random
tokens: which of them are kept does not matter here, see kv_quality.
Timings need a machine that does nothing else.
"""

import sys

from benchmarks.common import Part, main
from benchmarks.kv_capacity_cost import cost
from benchmarks.kv_capacity_pool import pool, windows
from benchmarks.kv_capacity_turns import CONTENDERS, turns
from benchmarks.kv_engine import POLICIES

OF_POLICY = ("steps_ratio", "peak_running", "preemptions", "kept")
COST = (
    "keep100_throughput_ratio",
    "compaction_share_of_prefill",
    "builder_ms_per_group_step",
    "levels4_throughput_ratio",
    "plan_ms_mixed_step",
    "plan_ms_mixed_step_long",
    "plan_long_ratio",
)
PARTS = {
    "pool": Part(
        (*(f"{name}_{key}" for name in POLICIES for key in OF_POLICY), "full_peak_running"), pool
    ),
    "windows": Part(("decode_window_steps_ratio",), windows),
    "turns": Part(tuple(f"{name}_turn_hits" for name in CONTENDERS), turns),
    "cost": Part(COST, cost),
}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
