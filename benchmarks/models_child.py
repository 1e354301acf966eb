# SPDX-License-Identifier: Apache-2.0
"""The engine's side of ``benchmarks.models``."""

from typing import Any

from vllm import SamplingParams, TokensPrompt

from benchmarks.kv_child import KVChild
from vllm_plugin.kv_cache.spec import CompressedSpec


class FamilyChild(KVChild):
    """One engine of a tiny model."""

    def started(self) -> dict[str, Any]:
        """Nothing: caches of some models are no tensors that could be counted."""
        return {}

    def answer(
        self, prompts: list[list[int]], tokens: int, keep: float | None, of_prompt: bool
    ) -> dict[str, Any]:
        """Answer prompts greedily.

        Args:
            prompts: Token ids.
            tokens: New tokens of each.
            keep: What each request asks to keep of its cache; None: what is served.
            of_prompt: Whether prompts are judged too.

        Returns:
            ``tokens`` of each prompt and their ``nats``, after those of the prompt's if asked for;
            blocks that were ``freed`` so far by requests that went on, ``leaked`` blocks, and
            requests that something ``remembers``.
        """
        pool = self._scheduler.kv_cache_manager.block_pool
        before = pool.get_num_free_blocks()
        sampling = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,  # the sampled token's only
            prompt_logprobs=0 if of_prompt else None,
            extra_args=None if keep is None else {"compress_keep": keep},
        )
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False)
        managers = self._scheduler.kv_cache_manager.coordinator.single_type_managers
        tables = sum(len(manager.req_to_blocks) for manager in managers)
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "nats": [_nats(output, of_prompt) for output in outputs],
            "freed": sum(getattr(manager, "freed_blocks", 0) for manager in managers),
            "leaked": before - pool.get_num_free_blocks(),
            "remembers": tables + self.llm.collective_rpc(_observations)[0],
        }

    def compressed_block(self) -> int:
        """Tokens of a block of the compressed layers."""
        groups = self._scheduler.kv_cache_config.kv_cache_groups
        specs = [group.kv_cache_spec for group in groups]
        (size,) = {spec.block_size for spec in specs if isinstance(spec, CompressedSpec)}
        return int(size)


def _nats(output: Any, of_prompt: bool) -> list[float]:
    """Negative log probabilities of an answer's tokens, and before them of its prompt's."""
    made = output.outputs[0]
    steps = list(zip(made.token_ids, made.logprobs, strict=True))
    if of_prompt:
        steps = [*zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)][1:] + steps
    return [-step[token].logprob for token, step in steps]


def _observations(worker: Any) -> int:
    batch = getattr(worker, "batch", None)
    return len(batch.observations) if batch else 0
