# SPDX-License-Identifier: Apache-2.0
"""Diffusion language models: what each cache policy saves, and what it loses.

    .venv/bin/python -m benchmarks.diffusion [--part quality|speed] [--json] [--out FILE]

The model is the tiny LLaDA of ``benchmarks.tiny_llada`` in float32. The policies P have their
defaults: full, never, fixed_period (4), dual_cache (blocks of 16), elastic (gamma 0.9). All commit
tokens of a probability of at least 0.9, in a window of 16 masks (dual_cache: in its blocks).

quality, measured on the dense reference, whose tokens the engine reproduces:
P_accuracy            Share of right tokens in the answers of both tasks, from prompts of 32, 48 and
                      64 digits.
P_kl                  KL divergence in nats of the policy's predictions from those of recomputing
                      everything on the same canvas, mean over active positions.
P_tokens_per_forward  Tokens that became final, per step.
P_token_layers_ratio  Computed positions, summed over layers, relative to full.
P_refresh_share       Share of steps that computed everything from some layer on.
Extra: elastic_in_step_* is elastic in the published order, which refreshes in the step that sees
the drift. --out has other settings of the policies as ``curve``, drawn beside it as .png.

speed, measured in the engine, sequences of 512 tokens (prompt 256, canvas 256), 2 tokens a step:
P_tokens_per_s_ratio  Tokens per second relative to full, one request.
parallel_only_ratio   full with 2 tokens a step relative to 1: the gain of the commit rule alone.
batch8_ratio          8 ragged requests (256 to 512 tokens) at once, relative to one at a time.
overhead_share        Share of a step that is not the model's forward, fixed_period, 8 requests.
Extra: batch8_ratio_never and _dual_cache; overhead_share_full and _elastic, one request;
P_token_layers_ratio_512, what each policy computes of the timed request (by the reference).

Limits: a tiny model on two synthetic tasks. The results tell what each policy loses on these tasks,
not on an 8B model. Fixed costs per operation weigh more than on a large model, which makes the
speed-ups small.
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
