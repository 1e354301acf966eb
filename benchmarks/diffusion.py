# SPDX-License-Identifier: Apache-2.0
"""Diffusion LLMs: what each cache policy saves, and what it loses.

    .venv/bin/python -m benchmarks.diffusion [--part quality|speed] [--json] [--out FILE]

The tiny LLaDA of ``benchmarks.tiny_llada``, float32. Policies P with their defaults: full, never,
fixed_period (4), dual_cache (blocks of 16), elastic (gamma 0.9). Commit rule of all: probability
0.9, window of 16 masks (dual_cache: its blocks).

quality, by the dense reference, which the engine equals token for token:
P_accuracy            Right tokens of the answers, both tasks, prompts of 32, 48 and 64 digits.
P_kl                  Nats, KL divergence of the policy's predictions from those of recomputing
                      everything on the same canvas, mean over active positions.
P_tokens_per_forward  Tokens that became final, per step.
P_token_layers_ratio  Positions computed, summed over layers, over those of full.
P_refresh_share       Steps that computed everything from some layer on.
Extra: elastic_in_step_*, elastic in the published order, which refreshes in the step that sees the
drift; curve in --out, other settings of the policies; drawn beside --out, as .png.

speed, in the engine, sequences of 512 tokens (prompt 256, canvas 256), 2 tokens a step:
P_tokens_per_s_ratio  Over full, one request.
parallel_only_ratio   full with 2 tokens a step over full with 1: what the commit rule alone brings.
batch8_ratio          8 ragged requests (256 to 512 tokens) at once over one after the other.
overhead_share        Time of a step that is not the model's forward, fixed_period, 8 requests.
Extra: batch8_ratio_never and _dual_cache; overhead_share_full and _elastic, one request;
P_token_layers_ratio_512, what each policy computes of the timed request (by the reference).

Limits. A tiny model on two synthetic tasks: it says which policy loses what on these, not on an 8B
model. Fixed costs per operation weigh more than on a large one, which makes the speed-ups small.
"""

import sys

from benchmarks.common import Part, draw_beside_out, main
from benchmarks.diffusion_plot import draw
from benchmarks.diffusion_quality import MEASURES, POLICIES, quality
from benchmarks.diffusion_speed import speed

PARTS = {
    "quality": Part(tuple(f"{name}_{key}" for name in POLICIES for key in MEASURES), quality),
    "speed": Part(
        (
            *(f"{name}_tokens_per_s_ratio" for name in POLICIES),
            "parallel_only_ratio",
            "batch8_ratio",
            "overhead_share",
        ),
        speed,
    ),
}

if __name__ == "__main__":
    status = main(__doc__, PARTS)
    draw_beside_out(sys.argv[1:], draw)
    sys.exit(status)
