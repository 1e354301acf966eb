# SPDX-License-Identifier: Apache-2.0
"""Perplexity, bytes and speed of models through vLLM itself, each in a process of its own.

A model is named ``FOLDER_OR_ID``, or ``FOLDER_OR_ID@METHOD`` to quantize it while it loads.
"""

import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress_common.checkpoints.checkpoint import Checkpoint, resolve
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent
from vllm_plugin.commands.judging.figures import paired, token_nats
from vllm_plugin.commands.judging.process import answer, in_process

_DECODE_TOKENS = 32
_KV_CACHE_BYTES = 1 << 29  # fixed, so that it can be told from weights


@dataclass(frozen=True)
class Evaluation:
    """The figures of one model. Differences are to the first model, on the same tokens.

    Attributes:
        model: its name, as given.
        nats: mean negative log-likelihood per token.
        perplexity: exp(nats).
        nats_difference: nats above the first model's, per token.
        standard_error: of the paired difference, over windows: tokens of one window are not
            independent. None with fewer than two windows.
        disk_bytes: size of the weight files.
        resident_bytes: growth of anonymous memory (CPU) or of allocated device memory (CUDA) while
            the model loads, without the KV cache.
        prefill_tokens_per_s: tokens per second of prompts.
        decode_tokens_per_s: generated tokens per second, of all requests together.
    """

    model: str
    nats: float
    perplexity: float
    nats_difference: float
    standard_error: float | None
    disk_bytes: int
    resident_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def evaluate(
    models: list[str],
    text: Path,
    *,
    windows: int = 32,
    length: int = 512,
    batch: int = 8,
    engine_args: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> list[Evaluation]:
    """Evaluate models on windows of tokens that are spread evenly over a text.

    Args:
        models: names, see above. The others are compared with the first.
        text: a text file.
        windows: how many windows.
        length: tokens per window.
        batch: requests at once when decoding is timed.
        engine_args: engine arguments for all models.
        progress: called before each model.

    Raises:
        CompressError: the text is missing or too short, a model cannot be served, or two models
            split the text into different tokens.
    """
    results: list[Evaluation] = []
    first: list[list[float]] = []
    reference: list[list[int]] | None = None
    for number, model in enumerate(models):
        progress(f"evaluate {model}", number, len(models))
        path, _, method = model.partition("@")
        folder = resolve(path)
        tokens = _windows(folder, text, windows, length)
        if reference is not None and tokens != reference:
            raise CompressError(
                f"{model} and {models[0]} split the text into different tokens, so their "
                "perplexities cannot be compared; evaluate them separately"
            )
        reference = tokens
        measured = in_process(
            __name__,
            {
                "model": str(folder),
                "tokens": tokens,
                "batch": batch,
                "engine_args": {
                    "quantization": method or None,
                    "max_model_len": length + 64,
                    "kv_cache_memory_bytes": _KV_CACHE_BYTES,
                }
                | (engine_args or {}),
            },
            model,
        )
        nats = measured["nats"]
        first = first or nats
        loss = statistics.fmean(statistics.fmean(window) for window in nats)
        difference, error = paired(nats, first)
        files = set(Checkpoint(folder).files.values())
        results.append(
            Evaluation(
                model=model,
                nats=loss,
                perplexity=math.exp(loss),
                nats_difference=difference,
                standard_error=error,
                disk_bytes=sum(file.stat().st_size for file in files),
                resident_bytes=measured["resident_bytes"],
                prefill_tokens_per_s=measured["prefill"],
                decode_tokens_per_s=measured["decode"],
            )
        )
    progress("evaluate", len(models), len(models))
    return results


def as_rows(results: list[Evaluation]) -> list[dict[str, Any]]:
    """Return rows that can be written as JSON."""
    return [asdict(result) for result in results]


def _windows(folder: Path, text: Path, windows: int, length: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    from compress_common.calibration.text_file import read_tokens

    ids = read_tokens(str(text), AutoTokenizer.from_pretrained(folder))
    if len(ids) < windows * length:
        raise CompressError(
            f"{text} has {len(ids)} tokens, {windows * length} are needed ({windows} windows of "
            f"{length}); give a longer text or lower --windows or --length"
        )
    stride = len(ids) // windows
    return [ids[i * stride : i * stride + length] for i in range(windows)]


def _resident() -> int:
    """Anonymous memory of this process, or allocated device memory where there is a GPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.model_executor.model_loader import base_loader

    del base_loader  # imported before the first reading, so that code is not counted as weights
    before = _resident()
    llm = LLM(request["model"], enable_prefix_caching=False, **request["engine_args"])
    cache = llm.llm_engine.vllm_config.cache_config
    resident = _resident() - before - int(cache.kv_cache_memory_bytes or 0)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in request["tokens"]]
    started = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    prefill = sum(map(len, request["tokens"])) / (time.perf_counter() - started)
    nats = [
        token_nats(ids[1:], output.prompt_logprobs[1:])
        for output, ids in zip(outputs, request["tokens"], strict=True)
    ]
    short = [TokensPrompt(prompt_token_ids=ids[:16]) for ids in request["tokens"]]
    short = (short * request["batch"])[: request["batch"]]

    def timed(count: int) -> float:
        begin = time.perf_counter()
        llm.generate(short, SamplingParams(max_tokens=count, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - begin

    timed(2)
    decode = len(short) * (_DECODE_TOKENS - 1) / (timed(_DECODE_TOKENS) - timed(1))
    return {"nats": nats, "resident_bytes": resident, "prefill": prefill, "decode": decode}


if __name__ == "__main__":
    answer(_serve)
