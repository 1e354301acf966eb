# SPDX-License-Identifier: Apache-2.0
"""What settings of the KV cache lose, through vLLM itself, each in a process of its own."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch

from compress_common.calibration.precision import computed_in
from compress_common.checkpoints.checkpoint import Checkpoint, resolve
from compress_common.checkpoints.local import load_tokenizer, text_config
from compress_common.progress import Progress, silent
from vllm_plugin.capacity.footprint import layer_token_bytes
from vllm_plugin.commands.common import Problems
from vllm_plugin.commands.judging.engine import Judged, judge
from vllm_plugin.commands.judging.figures import paired, recall
from vllm_plugin.commands.judging.material import Sizes, material
from vllm_plugin.compatibility import model_length
from vllm_plugin.settings import KEY

FULL: Final = "full cache"
_REQUESTS: Final = 8  # at once
_LEAST_CACHE: Final = 512 << 20
_OURS: Final = ("additional_config", "logits_processors", "model")


@dataclass(frozen=True)
class KVEvaluation:
    """The figures of one setting. Differences are to the full cache, on the same tokens.

    Attributes:
        setting: its name.
        kept: share of the cache that stays of a prompt of ``Sizes.context`` tokens.
        nats: mean negative log-likelihood of a token behind such a prompt, generated one by one.
        nats_difference: nats above the full cache.
        standard_error: of the paired difference, over windows; None with fewer than two.
        keys: how many keys the full cache recalls.
        recall: share of these that are recalled when the question ends the prompt. None: the full
            cache recalls none. For the full cache: of all keys.
        recall_error: its standard error.
        recall_by_wording: the same for each wording.
        later: share that is recalled when the question comes after the prompt was compacted.
        later_error: its standard error.
    """

    setting: str
    kept: float
    nats: float
    nats_difference: float
    standard_error: float | None
    keys: int
    recall: float | None
    recall_error: float | None
    recall_by_wording: dict[str, float | None]
    later: float | None
    later_error: float | None


def evaluate_kv(
    model: str,
    settings: Sequence[Mapping[str, Any]],
    text: Path | None = None,
    sizes: Sizes | None = None,
    *,
    engine_args: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> list[KVEvaluation]:
    """Evaluate settings of the KV cache, the full cache first.

    Args:
        model: a folder or hub id.
        settings: sections ``compress.kv``.
        text: a .txt or .jsonl file; None: Python's language reference.
        sizes: how much is judged; None: the defaults.
        engine_args: engine arguments for all settings.
        progress: called before each setting.

    Raises:
        CompressError: lists what is wrong with the text and with every setting, before any engine
            starts. Or an engine cannot be served.
    """
    from vllm_plugin.commands.judging.checks import kept_shares  # imports vLLM

    sizes, folder = sizes or Sizes(), resolve(model)
    arguments = engine_arguments(folder, sizes) | (engine_args or {})
    named = named_settings(settings)
    problems = Problems()
    problems.found += [f"--engine-args cannot set {n}" for n in _OURS if n in arguments]
    if not named:
        problems.found.append("no setting is given; add --policy and --keep, or --kv")
    if (longest := model_length(text_config(folder)) or sizes.longest) < sizes.longest:
        problems.found.append(
            f"--context {sizes.context:,} and {sizes.longest - sizes.context} tokens behind it are "
            f"more than the model's {longest:,} positions; lower --context"
        )
    kept = None
    if not problems.found:
        kept = problems.collect(lambda: kept_shares(str(folder), named, arguments, sizes.context))
    given = problems.collect(lambda: material(load_tokenizer(folder), text, sizes))
    problems.raise_found()
    assert given is not None and kept is not None
    total = len(named) + 1
    progress(f"judge {FULL}", 0, total)
    full = judge(str(folder), given, arguments, f"{model} ({FULL})")
    results = [_compared(FULL, 1.0, full, full)]
    for number, ((name, kv), share) in enumerate(zip(named, kept, strict=True), start=1):
        progress(f"judge {name}", number, total)
        chosen = arguments | {"additional_config": {KEY: {"kv": kv}}}
        judged = judge(str(folder), given, chosen, f"{model} ({name})")
        results.append(_compared(name, share, judged, full))
    progress("judge", total, total)
    return results


def engine_arguments(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Return how engines are started to be judged: eagerly, with room for a few requests.

    They compute in float32 where a CPU has no fast 16-bit arithmetic.
    """
    config, cache = text_config(folder), _LEAST_CACHE
    problems = Problems()  # ``doctor`` says them too
    each = problems.collect(lambda: layer_token_bytes(config, torch.float32)) or 0
    cache = max(cache, _REQUESTS * sizes.longest * each * config.num_hidden_layers)
    cuda = torch.cuda.is_available()
    wide = None if cuda else computed_in(Checkpoint(folder).weight_bytes, "cpu")
    return {
        "dtype": "auto" if wide is None else "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": cache,
        "max_model_len": sizes.longest,
        "max_num_seqs": 2 * _REQUESTS,
    }


def named_settings(settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return each section ``compress.kv`` with its name: with whole paths where names are equal."""
    names = [setting_name(kv) for kv in settings]
    return [
        (name if names.count(name) == 1 else setting_name(kv, whole=True), dict(kv))
        for name, kv in zip(names, settings, strict=True)
    ]


def setting_name(kv: Mapping[str, Any], whole: bool = False) -> str:
    """Return what a section ``compress.kv`` is called in a table, such as ``snap_kv, keep 0.5``.

    Args:
        kv: the section.
        whole: give whole paths, not the names of files.
    """
    rest = [f"{key} {_shown(value, whole)}" for key, value in kv.items() if key != "policy"]
    return ", ".join([str(kv.get("policy", "no policy")), *rest])


def _shown(value: Any, whole: bool) -> str:
    if isinstance(value, str):
        return Path(value).name if "/" in value and not whole else value
    return json.dumps(value)


def as_rows(results: list[KVEvaluation]) -> list[dict[str, Any]]:
    """Return rows that can be written as JSON."""
    return [asdict(result) for result in results]


def _compared(name: str, kept: float, judged: Judged, full: Judged) -> KVEvaluation:
    difference, error = paired(judged.nats, full.nats)
    own = judged is full

    def shares(kind: str, wordings: Sequence[str]) -> tuple[float | None, float | None, int]:
        ours, known = getattr(judged, kind), getattr(full, kind)
        answers = [each for wording in wordings for each in ours[wording]]
        base = [each for wording in wordings for each in known[wording]]
        return recall(answers, [True] * len(base) if own else base)

    names = list(judged.recalled)
    recalled, recall_error, _ = shares("recalled", names)
    later, later_error, _ = shares("later", names)
    return KVEvaluation(
        setting=name,
        kept=kept,
        nats=fmean(fmean(window) for window in judged.nats),
        nats_difference=difference,
        standard_error=error,
        keys=sum(sum(answers) for answers in full.recalled.values()),
        recall=recalled,
        recall_error=recall_error,
        recall_by_wording={wording: shares("recalled", [wording])[0] for wording in names},
        later=later,
        later_error=later_error,
    )
