# SPDX-License-Identifier: Apache-2.0
"""The engine's side of ``kv_hits``: vLLM's own counters of the prefix cache."""

from vllm import SamplingParams, TokensPrompt

from benchmarks.engine_child import Child


class HitsChild(Child):
    """One engine and what its prefix cache saves."""

    def hits(self, prompts: list[list[int]]) -> int:
        """Serve prompts one after the other; the tokens of them that were in the cache."""
        before = self._counted()
        sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        for prompt in prompts:
            ids = TokensPrompt(prompt_token_ids=prompt)
            self.llm.generate(ids, sampling, use_tqdm=False)
        return self._counted() - before

    def _counted(self) -> int:
        found = self.llm.get_metrics()
        return sum(one.value for one in found if one.name == "vllm:prefix_cache_hits")
