# SPDX-License-Identifier: Apache-2.0
"""Depth: what dropping decoder blocks costs, what healing gives back, and what it buys.

    .venv/bin/python -m benchmarks.depth [--part PART] [--json] [--out FILE]

Demo model, 30 blocks. Calibration text: 96 x 128 tokens that the model samples; of eight samples,
one chooses between fits and sets, and one judges. Nats are the rise of the negative log-likelihood
on 16 x 512 tokens of Newton's Opticks, in float32, with the standard error over windows beside
each. KL is on the samples that judge.

drop4    `prune --drop 4`: search auto, heal refit.
  nats_drop4                    nats
  heal_kl_ratio_drop4           KL after healing over KL before
drop8    the same with eight blocks, more than a quarter (--force)
  nats_drop8                    nats
  auto_vs_cosine_window_drop8   KL of auto over KL of the best cosine window, both healed.
                                Extra: _unhealed and _linear, of neither healed and of both healed
                                by that healer
traffic4 calibrated on the first half of the book
  nats_drop4_own_text           nats. Extra: heal_kl_ratio_drop4_own_text
  nats_drop4_int4_own_text      nats, quantized after it on the same half
traffic8 the same with eight blocks
  nats_drop8_own_text           nats
text4    the set of drop4 again, healed on four times the text
  nats_drop4_more_text          nats. Extra: heal_kl_ratio_drop4_more_text
  nats_drop4_int4_more_text     nats, quantized after it as in int4
text8    the set of drop8 again, healed on four times the text
  nats_drop8_more_text          nats
search   each search's set of four, not healed; extra keys kl_unhealed_NAME, also of evopress_40
         (as many generations) and of evopress_greedy, which begins with the greedy set (--row NAME)
  evopress_vs_greedy_kl         KL of evopress over KL of greedy
heal     each healer on the blocks 12 to 15; extra keys kl_heal_NAME
  heal_cpu_s                    CPU seconds of refit. Extra: heal_cpu_s_third on a third of
                                the text; heal_kl_ratio and heal_kl_ratio_third, KL of refit over
                                KL of none, each on text of its own run
  fusegpt_vs_refit_equal_cpu    KL of fusegpt over KL of refit; its CPU seconds over refit's are in
                                the details, and are about one
serve    stock vLLM, eager, one request; float32 on processors without AVX-512
  decode_ratio_drop4_b1         new tokens per second, pruned over full
int4     `quantize` after `prune`, groups of 64
  nats_drop4_int4               nats. Extra: nats_int4, of the full model in int4, which has fewer
                                bytes than the pruned model in 16 bits
cskv     the pruned model served with latents, default bases of the first half of the book
  nats_drop4_cskv               nats above its own full cache, of 65 tokens behind 12 prompts of 512
answers  questions with one right answer, greedy
  exact_answers_ratio_drop4     exact answers, pruned over full, mean of sums and hidden keys.
                                Extra: the share of each kind

Each part takes minutes on one thread, and keeps the pruned models for the next one.
"""

import sys

from benchmarks import depth_parts as parts
from benchmarks.common import Part, main

PARTS = {
    "drop4": Part(("nats_drop4", "heal_kl_ratio_drop4"), parts.drop4),
    "drop8": Part(("nats_drop8", "auto_vs_cosine_window_drop8"), parts.drop8),
    "traffic4": Part(("nats_drop4_own_text", "nats_drop4_int4_own_text"), parts.traffic4),
    "traffic8": Part(("nats_drop8_own_text",), parts.traffic8),
    "text4": Part(("nats_drop4_more_text", "nats_drop4_int4_more_text"), parts.text4),
    "text8": Part(("nats_drop8_more_text",), parts.text8),
    "search": Part(("evopress_vs_greedy_kl",), parts.search),
    "heal": Part(("heal_cpu_s", "fusegpt_vs_refit_equal_cpu"), parts.heal),
    "serve": Part(("decode_ratio_drop4_b1",), parts.serve),
    "int4": Part(("nats_drop4_int4",), parts.int4),
    "cskv": Part(("nats_drop4_cskv",), parts.cskv),
    "answers": Part(("exact_answers_ratio_drop4",), parts.answers),
}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
