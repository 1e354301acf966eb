# SPDX-License-Identifier: Apache-2.0
"""What was seen of a model, in one word and a reason: the cells of ``benchmarks.models``."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

State = Literal["ok", "refused", "differs", "stock fails", "not asked", "wrong", "crash", "late"]
BAD: tuple[State, ...] = ("wrong", "crash", "late")
FAILED = "failed"  # key of an engine's record that did not start, or died
UNAVAILABLE = "unavailable"  # key of answers, where vLLM lacks a package
BEFORE = ("doctor", "plan", "edge")
# Mean nats a token. In float32 stock is at a few millionths; in bfloat16 a model differs from
# itself by about 0.02.
SAME, LIMIT = 1e-3, 0.06
FAR = 1.0  # of int4 weights from 16 bits: beyond, the model is destroyed. The farthest is at 0.83.
_REFUSAL = "CompressError: "
_ERROR = re.compile(r"(?!CompressError)[\w.]*(Error|Exception)\b")
_SHOWN = 160  # characters of a reason


class Cell(NamedTuple):
    """What a user gets.

    Attributes:
        state: ok: served, and right. refused: by doctor, plan and engine alike, before any work.
            differs: stock vLLM computes something else than transformers. stock fails: it does not
            serve the model here, so ours was not asked. wrong: ours computes or keeps something
            else than it should. crash: an error that is no refusal. late: refused, but not by all
            of the three, or after weights were read. not asked: of stock, where ours refuses.
        text: A figure or the reason.
    """

    state: State
    text: str

    def __str__(self) -> str:
        return f"{self.state}: {self.text}" if self.text else self.state


def stock_cell(stock: Mapping[str, Any], sixteen: bool) -> Cell:
    """Judge what stock vLLM computes.

    Args:
        stock: ``nats`` and ``tokens`` of its answers, and transformers' as ``judged``; or why it
            failed; or nothing, where it was not asked.
        sixteen: Whether it computed in bfloat16, where the most likely token can be another.
    """
    if not stock:
        return Cell("not asked", "")
    if FAILED in stock:
        return Cell("stock fails", shortened(stock[FAILED]))
    error = mean_error(stock["nats"], stock["judged"]["nats"])
    pairs = zip(stock["tokens"], stock["judged"]["tokens"], strict=True)
    same = [a == b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)]
    told = f"{error:.1g} nats"
    if not all(same):
        told += f", {sum(same)} of {len(same)} tokens"
    equal = error < LIMIT if sixteen else error < SAME and all(same)
    return Cell("ok" if equal else "differs", told)


def kv_cell(
    said: Mapping[str, str | None],
    stock: Mapping[str, Any],
    ours: Mapping[str, Any],
    sixteen: bool,
) -> Cell:
    """Judge a KV policy.

    Args:
        said: What doctor, plan and edge say.
        stock: Stock vLLM's answers, or why it failed.
        ours: Answers at keep 1 (``whole``) and at a ``quarter``, and what transformers makes of the
            latter: ``chosen`` nats with the tokens that the policy keeps, ``plain`` with all; or
            why the engine failed.
        sixteen: Whether it computed in bfloat16, where other tokens can be chosen.
    """
    if (early := _before(said, stock, ours)) is not None:
        return early
    whole, quarter = ours["whole"], ours["quarter"]
    wrong = []
    if whole["tokens"] != stock["tokens"]:
        wrong.append("keep 1 gives other tokens than stock")
    if whole["freed"]:
        wrong.append(f"keep 1 freed {whole['freed']} blocks")
    if quarter["freed"] <= 0:
        wrong.append("keep 0.25 freed nothing")
    if [one[0] for one in quarter["tokens"]] != [one[0] for one in stock["tokens"]]:
        wrong.append("keep 0.25 changed the first token, which the whole prompt gives")
    for name, answer in (("1", whole), ("0.25", quarter)):
        if answer["leaked"] or answer["remembers"]:
            wrong.append(
                f"keep {name} leaked {answer['leaked']} blocks and {answer['remembers']} requests"
            )
    measure = median_error if sixteen else mean_error
    error, far = (measure(quarter["nats"], ours[key]) for key in ("chosen", "plain"))
    told = f"{error:.1g} nats, {far:.2g} from the whole cache, {quarter['freed']} freed"
    if error >= (LIMIT if sixteen else SAME) or (not sixteen and error >= 0.5 * far):
        wrong.append(f"keep 0.25 keeps other tokens, or computes something else: {told}")
    return Cell("wrong", "; ".join(wrong)) if wrong else Cell("ok", told)


def weights_cell(
    said: Mapping[str, str | None], stock: Mapping[str, Any], ours: Mapping[str, Any]
) -> Cell:
    """Judge int4 weights.

    Args:
        said: What doctor, plan and edge say.
        stock: Stock vLLM's answers, or why it failed.
        ours: ``nats`` of the int4 engine's answers, and transformers' with the ``rounded`` and the
            ``plain`` weights; or why something failed.
    """
    if (early := _before(said, stock, ours)) is not None:
        return early
    error = mean_error(ours["nats"], ours["rounded"])
    far = mean_error(ours["nats"], ours["plain"])
    told = f"{error:.3f} nats, {far:.2f} from 16 bits"
    return Cell("ok" if error < LIMIT and error < 0.5 * far and far < FAR else "wrong", told)


def _before(
    said: Mapping[str, str | None], stock: Mapping[str, Any], ours: Mapping[str, Any]
) -> Cell | None:
    """Return the cell of a model that was not served; None: it was."""
    if UNAVAILABLE in said:
        return Cell("stock fails", shortened(str(said[UNAVAILABLE])))
    refusing = [who for who in BEFORE if said[who] is not None]
    edge = said["edge"]
    broken = any(_ERROR.match(said[who] or "") for who in BEFORE)
    if broken or (edge is not None and not edge.startswith(_REFUSAL)):
        return Cell("crash", _by_who(said))
    if refusing and len(refusing) < len(BEFORE):
        return Cell("late", _by_who(said))
    if edge is not None:
        return Cell("refused", shortened(edge))
    if FAILED in stock:
        return Cell("stock fails", shortened(stock[FAILED]))
    if FAILED in ours:
        why = str(ours[FAILED])
        return Cell("late" if _REFUSAL in why else "crash", shortened(why))
    return None


def _by_who(said: Mapping[str, str | None]) -> str:
    return "; ".join(f"{who}: {shortened(said[who] or 'accepted')}" for who in BEFORE)


def mean_error(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Return the mean difference of log probabilities, in nats."""
    return statistics.fmean(
        abs(a - b)
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def median_error(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Return the median difference over the tokens of a prompt, in nats, the most of all prompts.

    In 16 bits a router can choose another expert at a token, which is then 1 nat off and says
    nothing about the others.
    """
    pairs = zip(ours, theirs, strict=True)
    return max(
        statistics.median(abs(a - b) for a, b in zip(one, other, strict=True))
        for one, other in pairs
    )


def shortened(reason: str) -> str:
    """Return a reason in one line of a table."""
    reason = re.sub(r"\s+", " ", reason.partition(_REFUSAL)[2] or reason).strip()
    reason = reason.replace("|", "/")
    return reason if len(reason) <= _SHOWN else reason[: _SHOWN - 3].rstrip() + "..."
