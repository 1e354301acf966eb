# SPDX-License-Identifier: Apache-2.0
"""KV policies in long decode: what a model recalls of what it generated, within a budget.

    .venv/bin/python -m benchmarks.kv_decode [--part PART] [--row ROW] [--out FILE]

Demo model in the precision that is fast here, blocks of 32 tokens, decode windows of 128. Each
policy P in snap_kv, h2o, r_kv, expected_attention, key_diff, key_diff_recent, recent at budget B in
256, 512, 1024, the full cache, and without a budget cskv with its default bases, which takes 0.14
of the bytes, and vLLM's fp8 cache. snap_kv scores decode windows with 16 queries here, which it
leaves to key_diff by default; key_diff_recent keeps an eighth of its budget for the last tokens. At
512 also key_diff_recent_16th, key_diff_recent_4th, and key_diff_window_256: key_diff_recent with
windows twice as long. --row takes a prefix such as h2o_512, for P_B_recall and P_B_nats.

P_B_recall         Of numbers of 4 digits, one per city, in 2,000 generated tokens of filler; the
                   model is asked for each afterwards, in their order. The first number must be
                   right. Recalled, of what the full cache recalls. P_B_recall_early, _middle,
                   _late: of the first, second, third third.
P_B_nats           Nats per token above the full cache, of 128 tokens after 2,000 generated ones of
                   the second half of Newton's Opticks. P_B_nats_se: standard error, by text.
full_recall, cskv_recall, cskv_nats, fp8_recall, fp8_nats   The same of these.
resumed_minus_decoded_nats   The 2,000 tokens are computed as those of a preempted request that
                   resumes: windows end and budgets act in it as in decode. The largest difference
                   at a token between that and 600 tokens decoded one by one.
P_B_peak_blocks    Most live blocks per layer of a request, between two steps, of 2,000 tokens that
                   are decoded one by one. It is the same for all policies: key_diff is measured, in
                   a tiny random model. full_peak_blocks.
long_peak_growth   Peak blocks of 8,000 generated tokens over those of 2,000, at budget 256.
long_throughput_ratio   Tokens per second over the full cache's, h2o at budget 256, in a pool that
                   holds two full requests; 16 requests of 1,500 generated tokens each.
                   long_steps_ratio: steps over the full cache's.

Limits. A tiny model and easy texts: 24 questions, of which one is 0.04, and 3 continuations. The
filler repeats itself, which suits policies that drop what is alike. Questions follow each other in
one request, so the attention of the first ones is there when later windows are compacted. Positions
stay below 8,192, the context of the model, so RoPE is never extrapolated.
"""

import sys

from benchmarks.common import Part, main
from benchmarks.kv_decode_pool import peaks, throughput
from benchmarks.kv_decode_quality import BUDGETS, MEASURES, POLICIES, quality, rows

KEYS = tuple(f"{prefix}_{measure}" for prefix, *_ in rows() for measure in MEASURES)
PEAKS = tuple(f"{name}_{budget}_peak_blocks" for budget in BUDGETS for name in POLICIES)
PARTS = {
    "quality": Part((*KEYS, "full_recall", "resumed_minus_decoded_nats"), quality),
    "peaks": Part((*PEAKS, "full_peak_blocks", "long_peak_growth"), peaks),
    "throughput": Part(("long_throughput_ratio", "long_steps_ratio"), throughput),
}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
