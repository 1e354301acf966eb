# SPDX-License-Identifier: Apache-2.0
"""The engine's side of a judgement, run in a process of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from vllm_plugin.commands.judging.figures import token_nats
from vllm_plugin.commands.judging.material import Material
from vllm_plugin.commands.judging.process import answer, in_process
from vllm_plugin.commands.judging.questions import ANSWER_TOKENS, is_answered

_PROCESSOR: Final = "vllm_plugin.commands.judging.forced_tokens:ForcedTokens"


@dataclass(frozen=True)
class Judged:
    """What one engine answered; empty is what it was not asked.

    Attributes:
        recalled: by wording, whether each question at the end of a prompt was answered.
        later: the same of questions that come when the prompt has been compacted.
        nats: of each window, negative log-likelihood of each token behind the prompt, in decode.
        whole: of each window, the same of all tokens as one prompt, by the full cache.
    """

    recalled: dict[str, list[bool]] = field(default_factory=dict)
    later: dict[str, list[bool]] = field(default_factory=dict)
    nats: list[list[float]] = field(default_factory=list)
    whole: list[list[float]] = field(default_factory=list)


def judge(
    model: str,
    given: Material,
    engine_args: dict[str, Any],
    name: str,
    measures: Sequence[str] = ("recalled", "later", "nats"),
    environment: Mapping[str, str] | None = None,
) -> Judged:
    """Judge an engine with these arguments.

    Args:
        model: a folder.
        given: what it is judged on.
        engine_args: of vLLM.
        name: for the message.
        measures: fields of ``Judged``.
        environment: what its process gets beside our own environment.

    Raises:
        CompressError: the engine does not start, or dies.
    """
    request = {"model": model, "engine_args": engine_args, "measures": measures, **asdict(given)}
    return Judged(**in_process(__name__, request, name, environment))


def _judge(request: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM

    from vllm_plugin.commands.judging import forced_tokens

    llm = LLM(request["model"], logits_processors=[_PROCESSOR], **request["engine_args"])
    windows = request["windows"]
    steps: dict[str, Callable[[], Any]] = {
        "recalled": lambda: _answered(_at_the_end(llm, request["questions"]), request),
        "later": lambda: _answered(_later(llm, request["questions"]), request),
        "nats": lambda: [
            window[1:] for window in forced_tokens.forced_nats(llm, windows, request["context"])
        ],
        "whole": lambda: _prompt_nats(llm, windows),
    }
    return {measure: steps[measure]() for measure in request["measures"]}


def _answered(texts: list[str], request: dict[str, Any]) -> dict[str, list[bool]]:
    """Whether each text, in the order of the questions, is right."""
    each = iter(texts)
    return {
        wording: [is_answered(next(each), question["answer"]) for question in questions]
        for wording, questions in request["questions"].items()
    }


def _at_the_end(llm: Any, questions: dict[str, list[Any]]) -> list[str]:
    """Answers to questions that end the prompt."""
    from vllm import SamplingParams, TokensPrompt

    greedy = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    asked = [question for some in questions.values() for question in some]
    prompts = [TokensPrompt(prompt_token_ids=each["told"] + each["ask"]) for each in asked]
    return [made.outputs[0].text for made in llm.generate(prompts, greedy, use_tqdm=False)]


def _later(llm: Any, questions: dict[str, list[Any]]) -> list[str]:
    """Answers to questions that follow as forced tokens, when the prompt has been compacted."""
    from vllm_plugin.commands.judging.forced_tokens import FREE, generate

    asked = [question for some in questions.values() for question in some]
    requests = [(each["told"], each["ask"] + [FREE] * ANSWER_TOKENS) for each in asked]
    tokenizer = llm.get_tokenizer()
    return [
        tokenizer.decode(list(made.token_ids)[len(each["ask"]) :])
        for made, each in zip(generate(llm, requests), asked, strict=True)
    ]


def _prompt_nats(llm: Any, windows: list[list[int]]) -> list[list[float]]:
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=window) for window in windows]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [
        token_nats(window[1:], output.prompt_logprobs[1:])
        for window, output in zip(windows, outputs, strict=True)
    ]


if __name__ == "__main__":
    answer(_judge)
