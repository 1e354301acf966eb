# SPDX-License-Identifier: Apache-2.0
"""KV policies: what a model still recalls, and how well it goes on, from a compressed context.

    .venv/bin/python -m benchmarks.kv_quality [--part quality|wordings] [--row ROW] [--out FILE]

quality. Demo model, blocks of 32 tokens; each policy P in prefix_kv, snap_kv, key_diff, recent,
cskv with its defaults at keep K in 050, 025, 010, and vLLM's fp8 cache, which has no keep. With
--out, the recall and the loss over keep are drawn beside it, as .png.

P_K_passkey, fp8_passkey   A 5-digit key in 300 to 1,800 tokens of filler, at depths of 0.1 to 0.9;
                           the question ends the prompt. Greedy, the first number must be the key.
P_K_needles, fp8_needles   4 numbers of 4 digits, one per city, in 300 to 1,300 tokens; one is asked
                           for. Both: recalled, of what the full cache recalls.
full_passkey, full_needles Of all prompts, recalled with the full cache.
P_K_nats, fp8_nats         Nats per token above the full cache, of 64 tokens after each of 16
                           contexts of 1,000 tokens of the second half of Newton's Opticks (profiles
                           are made from the first), forced one by one in decode. P_K_nats_se:
                           standard error, paired by context.
Extra: h2o_K_*, r_kv_K_*, expected_attention_K_*; cskv_020_*, cskv_014_*, ratio 0.8 and 0.86; cskv
at 0.50 is in 16 bits, else in 4;
cskv_16bit_K_*, ratio 0.75 and 0.8 in 16 bits; cskv_halves_020_*, ratio 0.8 in 16 bits with the same
ranks in all layers, for keys and for values;
snap_kv_fp8_K_*, snap_kv in vLLM's fp8 cache, which needs AVX-512 or AMX on a CPU;
snap_kv_profile_K_*, scored by snap_kv with prefix_kv's shares per layer (a row of the per-head
choice with the per-layer sizes); full_nats; forced_minus_prompt_nats, full_nats less the same
figure from prompt log-probabilities, 0 but for rounding.

wordings. The same key in four wordings that differ in kind (a sentence that says to remember it, a
label, JSON, a dialogue), in 300, 700 and 1,200 tokens, at depths of 0.1, 0.5 and 0.9; in float32 on
x86 without AVX-512, else in bfloat16. --row takes a prefix such as h2o_025.

wordings                   How many.
P_K_passkey_mean, P_K_passkey_min   Recalled, of what the full cache recalls: the mean over the
                           wordings, and the worst of them.
P_K_text_nats              As P_K_nats, of 6 contexts.
full_passkey_min           The full cache's worst wording.
Rows beside the policies: prefix_kv_unpooled (its scores are not max-pooled) and
prefix_kv_all_queries (nor that, and all prompt queries vote, as in the paper); extra: snap_kv_256
and h2o_256, a budget of 256 tokens, and snap_kv_256_windowed and h2o_256_windowed, with a prompt
window of 384.

Limits. A tiny model and easy prompts, 60 and 72 of them: one answer is 0.02. Every digit is a token
and the filler repeats itself, which suits key_diff; the question is in the prompt when it is
compacted, which suits snap_kv. Whole blocks are kept, rounded up: 0.10 of 300 tokens is 1 block of
9. The first new token comes from the full cache under every policy; it is a space in the answers,
and is left out of the nats.
"""

import sys

from benchmarks.common import Part, draw_beside_out, main
from benchmarks.kv_engine import POLICIES
from benchmarks.kv_quality_plot import draw
from benchmarks.kv_quality_recall import MEASURES, quality, rows
from benchmarks.kv_quality_wordings import MEASURES as OF_WORDINGS
from benchmarks.kv_quality_wordings import ROWS, wordings

KEYS = tuple(f"{prefix}_{measure}" for prefix, _, _ in rows(POLICIES) for measure in MEASURES)
IN_WORDINGS = tuple(f"{prefix}_{measure}" for prefix, *_ in ROWS for measure in OF_WORDINGS)
PARTS = {
    "quality": Part((*KEYS, "full_passkey", "full_needles"), quality),
    "wordings": Part(("wordings", *IN_WORDINGS), wordings),
}

if __name__ == "__main__":
    status = main(__doc__, PARTS)
    draw_beside_out(sys.argv[1:], draw)
    sys.exit(status)
