# SPDX-License-Identifier: Apache-2.0
"""The engine's side of ``kv_vision``: questions about pictures, and what is still answered."""

from typing import Any

from vllm import SamplingParams

from benchmarks.kv_child import KVChild
from benchmarks.vision_grids import grid
from vllm_plugin.commands.judging.forced_tokens import forcing


class VisionChild(KVChild):
    """One engine of the tiny vision-language model and what is asked of it."""

    def asked(
        self, pictures: list[int], listed: int, later: int, keep: float | None
    ) -> list[list[tuple[bool, float]]]:
        """Ask for some cells in each prompt, and for others behind the answer.

        Cells and right answers are forced, so that each is asked for behind the same text. The
        prompt ends before the first cell of the answer, which is computed from the whole cache. All
        digits come from what is left.

        Args:
            pictures: Their seeds.
            listed: Cells that a prompt asks for.
            later: Further cells.
            keep: Share of the cache that requests ask for; None: what is served.

        Returns:
            Of each cell of each picture, the prompt's first: whether the right digit was the
            likeliest token, and its negative log-likelihood in nats.
        """
        requests = [self._request(seed, listed, later, keep) for seed in pictures]
        prompts, sampling = zip(*requests, strict=True)
        outputs = self.llm.generate(list(prompts), list(sampling), use_tqdm=False)
        self.llm.reset_prefix_cache()
        found = []
        for output in outputs:
            made = output.outputs[0]
            steps = list(zip(made.token_ids, made.logprobs, strict=True))
            judged = [position[token] for token, position in steps[1::2]]
            found.append([(one.rank == 1, -one.logprob) for one in judged])
        return found

    def _request(
        self, seed: int, listed: int, later: int, keep: float | None
    ) -> tuple[dict[str, Any], SamplingParams]:
        given = grid(seed)
        pairs = zip(given.cells, given.answers, strict=True)
        text = " ".join(f"{cell} {answer}" for cell, answer in list(pairs)[: listed + later])
        tokens = self.llm.get_tokenizer().encode(text, add_special_tokens=False)
        sampling = forcing(tokens)
        if keep is not None:
            sampling.extra_args |= {"compress_keep": keep}
        prompt = {
            "prompt": f"<image> {' '.join(given.cells[:listed])} :",
            "multi_modal_data": {"image": given.image},
        }
        return prompt, sampling
