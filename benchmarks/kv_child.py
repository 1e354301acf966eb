# SPDX-License-Identifier: Apache-2.0
"""The engine's side of the KV benchmarks: what the scheduler, the builders and the sampler do."""

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from vllm import SamplingParams, TokensPrompt
from vllm.v1.request import Request

from benchmarks.engine_child import Child
from vllm_plugin.commands.judging import forced_tokens
from vllm_plugin.commands.judging.figures import token_nats


class KVChild(Child):
    """One engine and what the KV benchmarks ask of it."""

    def started(self) -> dict[str, Any]:
        """Adds the KV cache: ``blocks`` of the pool, its bytes, and its groups, the attention
        backend of each, and the CUDA graphs that vLLM settled on."""
        cache = self._scheduler.kv_cache_config
        groups = [
            {
                "layers": len(group.layer_names),
                "block_size": group.kv_cache_spec.block_size,
                "page_bytes": group.kv_cache_spec.page_size_bytes,
                "spec": type(group.kv_cache_spec).__name__,
            }
            for group in cache.kv_cache_groups
        ]
        return super().started() | {
            "blocks": cache.num_blocks,
            "pool_bytes": self.llm.collective_rpc(_cache_bytes)[0],
            "groups": groups,
            "backends": self.llm.collective_rpc(_backends)[0],
            "graphs": str(self.engine.vllm_config.compilation_config.cudagraph_mode),
        }

    def run(self, lengths: Sequence[int], tokens: int, seed: int) -> dict[str, Any]:
        """Serve one random prompt of each length at once; ``tokens`` new tokens each.

        ``kept_bytes_per_column``: bytes of live blocks, summed over groups, per column of the block
        tables, of requests past their prompt; mean over steps. ``blocks_freed``: given back by
        requests that go on, ``freed_bytes`` their size. ``cpu_s`` is of all threads.
        """
        group_bytes = [
            group.kv_cache_spec.page_size_bytes * len(group.layer_names)
            for group in self._scheduler.kv_cache_config.kv_cache_groups
        ]
        begin, cpu = time.perf_counter(), time.process_time()
        for index, length in enumerate(lengths):
            self._submit(1, length, tokens, seed + index)
        requests: list[Request] = list(self._scheduler.requests.values())
        running: list[int] = []
        nulls: dict[tuple[str, int], int] = {}
        kept_bytes = columns = freed = freed_bytes = 0
        while self.engine.has_unfinished_requests():
            self.engine.step()
            running.append(len(self._scheduler.running))
            for request in self._scheduler.running:
                past_prompt = request.num_computed_tokens >= request.num_prompt_tokens
                for group, blocks in enumerate(self._blocks(request.request_id)):
                    key, empty = (request.request_id, group), sum(b.is_null for b in blocks)
                    if (more := empty - nulls.get(key, 0)) > 0:
                        freed += more
                        freed_bytes += more * group_bytes[group]
                    nulls[key] = empty
                    if past_prompt:
                        kept_bytes += (len(blocks) - empty) * group_bytes[group]
                        columns += len(blocks) if group == 0 else 0
        seconds = time.perf_counter() - begin
        made = tokens * len(lengths)
        return {
            "steps": len(running),
            "peak_running": max(running),
            "mean_running": sum(running) / len(running),
            "preemptions": sum(request.num_preemptions for request in requests),
            "tokens_per_step": made / len(running),
            "tokens_per_s": made / seconds,
            "kept_bytes_per_column": kept_bytes / columns,
            "blocks_freed": freed,
            "freed_bytes": freed_bytes,
            "free_blocks_at_end": self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            "cpu_s": time.process_time() - cpu,
        }

    def build_ms(self, batch: int, prompt: int, tokens: int, seed: int) -> float:
        """Milliseconds of the metadata builder per group and step, ``batch`` requests decoding."""
        self._submit(batch, prompt, tokens, seed)
        produced: dict[str, int] = {}
        while len(produced) < batch:
            self._step(produced)
        spent: list[float] = []
        builders = self.llm.collective_rpc(_builders)[0]
        for builder in builders:
            builder.build = _timed(builder.build, spent)
        while self.engine.has_unfinished_requests():
            self._step(produced)
        for builder in builders:
            del builder.build  # the method of its class is seen again
        return 1000 * sum(spent) / len(spent)

    def complete(self, prompts: list[list[int]], tokens: int) -> list[str]:
        """The greedy continuation of each prompt."""
        sampling = SamplingParams(temperature=0, max_tokens=tokens)
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        return [o.outputs[0].text for o in self.llm.generate(inputs, sampling, use_tqdm=False)]

    def texts(self, lengths: Sequence[int], tokens: int, seed: int) -> list[list[int]]:
        """The greedy continuation of a random prompt of each length, served together."""
        draw = random.Random(seed)
        prompts = [[draw.randrange(self.vocabulary) for _ in range(size)] for size in lengths]
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def conversation(
        self, first: int, answer: int, question: int, turns: int, seed: int
    ) -> list[dict[str, int]]:
        """Take turns: each prompt is the one before, its answer, and some random tokens.

        Args:
            first: Tokens of the first prompt.
            answer: Tokens that are generated in each turn.
            question: Random tokens of each later turn.
            turns: How many there are.
            seed: Of random tokens.

        Returns:
            Of each turn the tokens of its ``prompt``, and how many the prefix cache had (``hit``).
        """
        draw = random.Random(seed)
        sampling = SamplingParams(
            temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False
        )
        prompt = [draw.randrange(self.vocabulary) for _ in range(first)]
        seen = []
        for _ in range(turns):
            inputs = TokensPrompt(prompt_token_ids=prompt)
            (output,) = self.llm.generate([inputs], sampling, use_tqdm=False)
            seen.append({"prompt": len(prompt), "hit": output.num_cached_tokens})
            prompt = prompt + list(output.outputs[0].token_ids)
            prompt += [draw.randrange(self.vocabulary) for _ in range(question)]
        return seen

    def forced_nats(self, windows: list[list[int]], context: int) -> list[list[float]]:
        """See ``forced_tokens``. The engine needs ``logits_processors=[FORCED_TOKENS]``."""
        return forced_tokens.forced_nats(self.llm, windows, context)

    def grown(
        self, requests: list[tuple[list[int], list[int]]], at_once: int = 1
    ) -> list[dict[str, Any]]:
        """Let requests generate, all at once, what they are forced to.

        Args:
            requests: The prompt of each, and its generated tokens; ``FREE``: the model chooses.
            at_once: The first so many generated tokens are computed as those of a preempted request
                that resumes. Windows end and budgets act in between as they do in decode.

        Returns:
            Of each the ``tokens`` behind ``at_once``, negative log-likelihoods of these, and the
            most blocks of the first group of layers that were live between two steps.
        """
        names = []
        for prompt, forced in requests:
            self.requests += 1
            names.append(str(self.requests))
            given = TokensPrompt(prompt_token_ids=prompt)
            self.engine.add_request(names[-1], given, forced_tokens.forcing(forced))
        if at_once > 1:
            self._resume(dict(zip(names, requests, strict=True)), at_once)
        done: dict[str, Any] = {}
        peaks = dict.fromkeys(names, 0)
        while self.engine.has_unfinished_requests():
            done |= {output.request_id: output for output in self.engine.step()}
            for request in self._scheduler.running:
                blocks = self._blocks(request.request_id)[0]
                name = _external(request)
                peaks[name] = max(peaks[name], sum(not block.is_null for block in blocks))
        made = [done[name].outputs[0] for name in names]
        return [
            {
                "tokens": list(one.token_ids)[1:],
                "nats": token_nats(one.token_ids, one.logprobs)[1:],
                "peak_blocks": peaks[name],
            }
            for name, one in zip(names, made, strict=True)
        ]

    def _resume(self, requests: dict[str, tuple[list[int], list[int]]], count: int) -> None:
        """Preempt requests after their first token, and let them have generated ``count``."""
        while any(not one.num_output_tokens for one in self._scheduler.requests.values()):
            self.engine.step()
        self.engine.reset_prefix_cache(reset_running_requests=True)
        made = {
            request.request_id: requests[_external(request)][1][1:count]
            for request in self._scheduler.requests.values()
        }
        for request in self._scheduler.requests.values():
            request.append_output_token_ids(made[request.request_id])
        self.llm.collective_rpc(_generated, args=(made,))

    @property
    def _scheduler(self) -> Any:
        return self.engine.engine_core.engine_core.scheduler

    def _blocks(self, request_id: str) -> Any:
        return self._scheduler.kv_cache_manager.coordinator.get_blocks(request_id)


def _external(request: Request) -> str:
    """The name that a request was given: vLLM adds a random part."""
    return request.request_id.partition("-")[0]


def _cache_bytes(worker: Any) -> int:
    """What is really allocated: layers of several groups share storage."""
    storages = [cache.untyped_storage() for cache in worker.model_runner.kv_caches]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def _backends(worker: Any) -> list[str]:
    groups = worker.model_runner.attn_groups
    return [group.backend.__name__ for of_cache in groups for group in of_cache]


def _generated(worker: Any, tokens: dict[str, list[int]]) -> None:
    """Tell the first model runner of generated tokens: it keeps those of preempted requests."""
    for request_id, some in tokens.items():
        worker.model_runner.requests[request_id].output_token_ids.extend(some)


def _builders(worker: Any) -> list[Any]:
    groups = worker.model_runner.attn_groups
    return [group.get_metadata_builder(0) for of_cache in groups for group in of_cache]


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        value = function(*arguments, **named)
        spent.append(time.perf_counter() - begin)
        return value

    return timed
