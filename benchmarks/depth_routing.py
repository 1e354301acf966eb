# SPDX-License-Identifier: Apache-2.0
"""Two ways to save depth that are not served, and what they cost: routing and sharing of layers.

    .venv/bin/python -m benchmarks.depth_routing [--part routing|sharing] [--out FILE]

docs/layer_routing_and_sharing.md has the figures and what follows from them. Demo model in float32.

routing. What a router such as Dr.LLM's can gain if it skips or repeats blocks for each prompt: 15
prompts of 64 tokens, 3 of each of five kinds of text (a book, a reference, Python, C++, JSON).
The first and the last block stay.

skip_one_W_kl         Mean KL(original || changed) of the next token, nats, on the second half of
                      each prompt. One block is skipped. W says who chooses it:
                      fixed, the block that costs least on all other prompts, as `prune` would do;
                      domain, least on the other prompts of the same kind;
                      prompt, least on the first half of the prompt, measured by its KL, which no
                      router knows: it is an upper bound;
                      oracle, least on the second half itself: no choice is better.
skip_two_W_kl         Two blocks are skipped: pairs of the six blocks that cost least alone.
skip_or_repeat_W_kl   One block is skipped or run twice.
Extra: *_gain, the mean of fixed - W over prompts, and *_gain_se, its standard error.

sharing. Each of 15 pairs of adjacent blocks shares the mean of its weights, as a Relaxed Recursive
Transformer does, and each block has a low-rank correction of its own, the best one for inputs of
4,096 tokens of Opticks' first half. Nothing is trained.

share_R_nats          Nats per token above the original at rank R, on 8 windows of 192 tokens of
                      Opticks' second half. share_R_nats_se: standard error, paired by window.
share_R_bytes_ratio   Bytes of the model, of the original's. A linear keeps its own weight where the
                      correction is as large as what sharing saves.
"""

import itertools
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import Options, Part, Result, main
from benchmarks.depth_sharing import RANKS, model_folder, sharing
from benchmarks.texts import domains, windows
from compress_common.calibration.blocks import Blocks
from compress_common.calibration.divergence import logits_of
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.loading import load_model
from compress_common.structure.derive import structure_of

Order = tuple[int, ...]  # the blocks that run
WAYS = ("fixed", "domain", "prompt", "oracle")
KINDS = ("skip_one", "skip_two", "skip_or_repeat")


@dataclass(frozen=True)
class Sizes:
    """Prompts of each domain, tokens of each, and the blocks whose pairs are tried."""

    prompts: int = 3
    length: int = 64
    paired: int = 6


def without(depth: int, *skipped: int) -> Order:
    """Return the order of a decoder that skips some blocks."""
    return tuple(index for index in range(depth) if index not in skipped)


def repeating(depth: int, index: int) -> Order:
    """Return the order of a decoder that runs one block twice."""
    return (*range(index + 1), *range(index, depth))


class Orders:
    """Measures a decoder whose blocks run in another order, from where that order differs.

    Args:
        blocks: The original, with the prompts as its tokens [prompts, length].
    """

    @torch.no_grad()
    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.before = [blocks.inputs()]
        for index in range(len(blocks)):
            self.before.append(blocks.run(index, self.before[-1]))
        self.logits = logits_of(blocks.model, blocks.structure)
        self.original = [self.logits(state).log_softmax(-1) for state in self.before[-1]]

    @torch.no_grad()
    def divergence(self, order: Order) -> torch.Tensor:
        """Return the mean KL(original || changed) of both halves of each prompt, [prompts, 2]."""
        differs = (at for at, index in enumerate(order) if index != at)
        start = next(differs, len(order))
        hidden = self.before[start]
        for index in order[start:]:
            hidden = self.blocks.run(index, hidden)
        rows = []
        for log_p, state in zip(self.original, hidden, strict=True):
            kl = torch.nn.functional.kl_div(
                self.logits(state).log_softmax(-1), log_p, reduction="none", log_target=True
            )
            rows.append(torch.stack([half.mean() for half in kl.sum(-1).chunk(2)]))
        return torch.stack(rows)


def choices(losses: torch.Tensor, domain: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the loss on the second half of each prompt, by who chooses the candidate.

    Args:
        losses: Of each candidate on both halves, [candidates, prompts, 2].
        domain: Of each prompt. Each has at least two prompts.

    Returns:
        ``{way: [prompts]}`` for each of ``WAYS``.
    """
    whole, first, second = losses.mean(-1), losses[..., 0], losses[..., 1]
    prompts = range(len(domain))

    def chosen_by(texts: Iterable[list[int]]) -> torch.Tensor:
        best = [int(whole[:, which].mean(1).argmin()) for which in texts]
        return second[best, list(prompts)]

    return {
        "fixed": chosen_by([q for q in prompts if q != p] for p in prompts),
        "domain": chosen_by(
            [q for q in prompts if q != p and domain[q] == domain[p]] for p in prompts
        ),
        "prompt": second[first.argmin(0), list(prompts)],
        "oracle": second.amin(0),
    }


def measured(blocks: Blocks, domain: Sequence[str], sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Return ``choices`` for each of ``KINDS``."""
    orders, depth = Orders(blocks), len(blocks)
    inner = range(1, depth - 1)
    skips = torch.stack([orders.divergence(without(depth, index)) for index in inner])
    repeats = torch.stack([orders.divergence(repeating(depth, index)) for index in inner])
    cheapest = skips.mean((1, 2)).argsort()[: sizes.paired].sort().values + 1
    pairs = torch.stack(
        [
            orders.divergence(without(depth, *pair))
            for pair in itertools.combinations(cheapest.tolist(), 2)
        ]
    )
    found = (skips, pairs, torch.cat([skips, repeats]))
    return {kind: choices(losses, domain) for kind, losses in zip(KINDS, found, strict=True)}


def routing(options: Options, result: Result) -> None:
    """Fill the keys of the part."""
    sizes = Sizes(2, 32, 3) if options.smoke else Sizes()
    checkpoint = Checkpoint(model_folder(options))
    texts = domains(options.seed)
    prompts = [
        window
        for text in texts.values()
        for window in windows(checkpoint.tokenizer, text, sizes.prompts, sizes.length)
    ]
    domain = [name for name in texts for _ in range(sizes.prompts)]
    model = load_model(checkpoint, torch.float32)
    blocks = Blocks(model, structure_of(checkpoint.hf_config), torch.tensor(prompts))
    for kind, ways in measured(blocks, domain, sizes).items():
        for way, losses in ways.items():
            result.put(f"{kind}_{way}_kl", losses.mean().item(), prompts=losses.tolist())
            gains = (ways["fixed"] - losses).tolist()
            if way != "fixed":
                result.put(f"{kind}_{way}_gain", statistics.fmean(gains))
                result.put(f"{kind}_{way}_gain_se", statistics.stdev(gains) / len(gains) ** 0.5)


PARTS = {
    "routing": Part(tuple(f"{kind}_{way}_kl" for kind in KINDS for way in WAYS), routing),
    "sharing": Part(
        tuple(f"share_{rank}_{what}" for rank in RANKS for what in ("nats", "bytes_ratio")), sharing
    ),
}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
