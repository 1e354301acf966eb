# SPDX-License-Identifier: Apache-2.0
"""The engine's side of ``benchmarks.engine``: imports vLLM, so only child processes import it."""

import random
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.v1.worker.gpu_worker import Worker  # CPUWorker inherits load_model from it

from vllm_plugin.commands.judging.figures import token_nats


class Child:
    """One engine and what can be asked of it; every method returns plain values."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.resident: list[int] = []
        load_model = Worker.load_model

        def measured(worker: Worker, **kwargs: Any) -> None:
            self.resident = [_resident()]
            load_model(worker, **kwargs)
            self.resident.append(_resident())

        Worker.load_model = measured  # type: ignore[method-assign]
        self.llm = LLM(**arguments)
        self.engine = self.llm.llm_engine
        self.vocabulary = self.engine.model_config.get_vocab_size()
        self.requests = 0

    def started(self) -> dict[str, Any]:
        """What the start cost and what is being served.

        ``resident_bytes``: growth of anonymous memory (on a GPU: of allocated memory) over the
        model's load, so without KV cache. ``cpu_s``: user and system time of all threads and
        children. ``kernels``: the int4 kernels of the linears, with the type of activations.
        """
        used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        kernels, parameter_bytes = self.llm.apply_model(_describe)[0]
        return {
            "resident_bytes": self.resident[1] - self.resident[0],
            "parameter_bytes": parameter_bytes,
            "cpu_s": sum(u.ru_utime + u.ru_stime for u in used),
            "quantization": self.engine.model_config.quantization,
            "kernels": kernels,
            "threads": torch.get_num_threads(),
        }

    def decode(self, batch: int, prompt: int, tokens: int, seed: int) -> float:
        """Tokens per second of ``batch`` requests after each has its first token.

        ``prompt`` random tokens each; prefill is not in the time.
        """
        self._submit(batch, prompt, tokens, seed)
        produced: dict[str, int] = {}
        while len(produced) < batch:
            self._step(produced)
        before, begin = sum(produced.values()), time.perf_counter()
        while self.engine.has_unfinished_requests():
            self._step(produced)
        return (sum(produced.values()) - before) / (time.perf_counter() - begin)

    def prefill(self, tokens: int, seed: int) -> float:
        """Prompt tokens per second of one prompt, until its first new token."""
        begin = time.perf_counter()
        self._submit(1, tokens, 1, seed)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return tokens / (time.perf_counter() - begin)

    def nats(self, windows: list[list[int]]) -> list[list[float]]:
        """Negative log-likelihood of each token but the first of each window."""
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [TokensPrompt(prompt_token_ids=window) for window in windows]
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        return [
            token_nats(window[1:], output.prompt_logprobs[1:])
            for window, output in zip(windows, outputs, strict=True)
        ]

    def _submit(self, batch: int, prompt: int, tokens: int, seed: int) -> None:
        draw = random.Random(seed)
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        for _ in range(batch):
            ids = [draw.randrange(self.vocabulary) for _ in range(prompt)]
            self.requests += 1
            prompt_ids = TokensPrompt(prompt_token_ids=ids)
            self.engine.add_request(str(self.requests), prompt_ids, sampling)

    def _step(self, produced: dict[str, int]) -> None:
        for output in self.engine.step():
            produced[output.request_id] = len(output.outputs[0].token_ids)


def _describe(model: nn.Module) -> tuple[list[str], int]:
    kernels = set()
    for module in model.modules():
        kernel = getattr(getattr(module, "scheme", None), "kernel", None)
        if kernel is not None:
            int8 = getattr(module, "use_w4a8", None)  # vLLM's kernel leaves its choice here
            activations = getattr(kernel, "activations", "int8" if int8 else "bf16")
            kernels.add(f"{type(kernel).__name__}, {activations} activations")
    return sorted(kernels), sum(p.nbytes for p in model.parameters())


def _resident() -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
