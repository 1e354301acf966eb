# SPDX-License-Identifier: Apache-2.0
"""KV policies on a vision-language model: what can still be read off a picture of 256 tokens.

    .venv/bin/python -m benchmarks.kv_vision [--json] [--out FILE]

The tiny model of ``benchmarks.tiny_vision``, in float32, blocks of 32 tokens, pictures of 64 digits
on a grid. Each policy P with its defaults at keep K in 050, 025, 010. Prompts have 8 full blocks,
so that 0.10 keeps one of them. With --out, right answers over keep are drawn beside it, as .png.

P_K_asked       Share of digits that are read right, of 4 cells that the prompt asks for.
P_K_later       Of 8 cells that are asked for behind the answer. No policy can know them.
P_K_asked_nats, P_K_later_nats   Nats of the right digits.
full_*          With the whole cache.
*_se            Standard error of each figure, over pictures.
Rows of prefix_kv do not pool scores, as in the paper: prefix_kv has the shares of a profile,
measured by `vllm-compress profile --images`; prefix_kv_uniform gives all layers the same share;
prefix_kv_reversed gives the first layer the profile's share of the last, and so on: equal memory,
but the wrong layers; prefix_kv_all and prefix_kv_all_uniform observe all queries, as the paper
does. prefix_kv_pooled is prefix_kv with its default, which pools. snap_kv_profile has the scores of
snap_kv and the shares of the profile; snap_kv_pool_1 is snap_kv without max pooling.
P_K_blocks      Full blocks of a prompt that stay, mean over layers, of rows with a share per layer.
profile_gain_K_asked, profile_gain_K_later and profile_gain_all_K_*: right digits with the profile
less those with equal shares, paired by picture; profile_order_K_*: less those with the shares
reversed.

Limits. A tiny model and one task. A digit is one token, so what is evicted is lost: a real picture
says most things in many tokens.
"""

import base64
import hashlib
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common import ROOT, Options, Part, Result, cache_folder, draw_beside_out, main
from benchmarks.engine import Engine, in_process
from benchmarks.kv_engine import (
    BLOCK,
    FORCED_TOKENS,
    policy,
    reported,
    write_with,
)
from benchmarks.vision_grids import SIDE, grid

MODEL = ROOT / "tests" / "fixtures" / "tiny_vision"
KEEPS = (0.50, 0.25, 0.10)
MEASURES = ("asked", "later", "asked_nats", "later_nats")
# Of these one engine answers for all shares, which requests ask for.
# name -> (policy, its settings)
UNIFORM: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {})
    for name in ("snap_kv", "key_diff", "recent", "h2o", "r_kv", "expected_attention")
} | {"snap_kv_pool_1": ("snap_kv", {"pool": 1})}
_PREFIX = {"pool": 1}  # as in the paper: a digit is one token
# name -> (policy, its settings, what layers have of the shares of a profile)
BY_LAYER: dict[str, tuple[str, dict[str, Any], str]] = {
    "prefix_kv": ("prefix_kv", _PREFIX, "profile"),
    "prefix_kv_uniform": ("prefix_kv", _PREFIX, "uniform"),
    "prefix_kv_reversed": ("prefix_kv", _PREFIX, "reversed"),
    "prefix_kv_all": ("prefix_kv", _PREFIX | {"queries": 0}, "profile"),
    "prefix_kv_all_uniform": ("prefix_kv", _PREFIX | {"queries": 0}, "uniform"),
    "prefix_kv_pooled": ("prefix_kv", {}, "profile"),
    "snap_kv_profile": ("snap_kv", {}, "profile"),
}
ROWS = (*UNIFORM, *BY_LAYER)
# name -> (a row, the row that it is compared with)
GAINS = {
    "profile_gain": ("prefix_kv", "prefix_kv_uniform"),
    "profile_gain_all": ("prefix_kv_all", "prefix_kv_all_uniform"),
    "profile_order": ("prefix_kv", "prefix_kv_reversed"),
}
BLOCKS = SIDE**2 // BLOCK  # full ones of a prompt
_REVISION = 1  # raise it when profiles are made differently


@dataclass(frozen=True)
class Sizes:
    """Pictures that are asked about, cells in the prompt and later, pictures of the profile."""

    pictures: int = 192
    listed: int = 4
    later: int = 8
    profiled: int = 16


SMOKE_SIZES = Sizes(4, 1, 2, 2)
SMOKE_ROWS = ("snap_kv", "prefix_kv")
_PROFILED = 1_000_000  # seed of the first picture of a profile


class VisionEngine(Engine):
    """An engine that answers questions about pictures."""

    child = "benchmarks.kv_vision_child:VisionChild"


Answers = list[list[tuple[bool, float]]]


def keys() -> Iterator[str]:
    """What the closing line has."""
    yield from (f"full_{what}" for what in MEASURES)
    for keep in map(percent, KEEPS):
        yield from (f"{name}_{keep}_{what}" for name in ROWS for what in MEASURES)
        yield from (f"{gain}_{keep}_{what}" for gain in GAINS for what in ("asked", "later"))


def percent(keep: float) -> str:
    return f"{round(100 * keep):03}"


def vision(options: Options, result: Result) -> None:
    """Fill all keys."""
    sizes = SMOKE_SIZES if options.smoke else Sizes()
    seeds = list(range(options.seed, options.seed + sizes.pictures))
    seen: dict[str, Answers] = {}
    _put(result, "full", _answers({"plugin": False}, seeds, sizes, (None,))[0], sizes)
    for name in tqdm(SMOKE_ROWS if options.smoke else ROWS, "vision", leave=False):
        failed: dict[str, str] = {}
        with reported(failed, name):
            seen |= _row(name, seeds, sizes, result)
        for keep in map(percent, KEEPS):
            prefix = f"{name}_{keep}"
            if prefix in seen:
                _put(result, prefix, seen[prefix], sizes)
            for what in () if prefix in seen else MEASURES:
                result.missing(f"{prefix}_{what}", failed.get(name, "it was not reached"))
    for gain, names in GAINS.items():
        for keep in map(percent, KEEPS):
            ours, theirs = (seen.get(f"{name}_{keep}") for name in names)
            if ours and theirs:
                _put_gain(result, f"{gain}_{keep}", ours, theirs, sizes)


def _row(name: str, seeds: list[int], sizes: Sizes, result: Result) -> dict[str, Answers]:
    """The answers of a row at each share."""
    if name in UNIFORM:
        kind, settings = UNIFORM[name]
        served = policy(kind, keep=KEEPS[0], **settings)
        found = _answers(served, seeds, sizes, KEEPS)
        return {f"{name}_{percent(keep)}": one for keep, one in zip(KEEPS, found, strict=True)}
    kind, settings, shares = BY_LAYER[name]
    made = {}
    for keep in KEEPS:
        file, blocks = in_process(_shared_out, profile(keep, sizes), shares, preloaded=True)
        result.put(f"{name}_{percent(keep)}_blocks", blocks)
        served = policy(kind, profile=str(file), **settings)
        made[f"{name}_{percent(keep)}"] = _answers(served, seeds, sizes, (None,))[0]
    return made


def _answers(
    served: dict[str, Any],
    seeds: list[int],
    sizes: Sizes,
    keeps: Sequence[float | None],
) -> list[Answers]:
    """What one engine answers at each share."""
    with VisionEngine(
        MODEL,
        block_size=BLOCK,
        max_model_len=512,
        kv_cache_memory_bytes=1 << 28,
        dtype="float32",
        enable_prefix_caching=True,
        limit_mm_per_prompt={"image": 1, "video": 0},
        logits_processors=[FORCED_TOKENS],
        preloaded=True,
        **served,
    ) as engine:
        return [
            engine.ask("asked", pictures=seeds, listed=sizes.listed, later=sizes.later, keep=keep)
            for keep in keeps
        ]


def _put(result: Result, prefix: str, answers: Answers, sizes: Sizes) -> None:
    """Fill the measures of a row, with standard errors over pictures."""
    for what, part in _parts(sizes).items():
        for suffix, index in (("", 0), ("_nats", 1)):
            means = [statistics.fmean(one[index] for one in picture[part]) for picture in answers]
            _put_mean(result, f"{prefix}_{what}{suffix}", means)


def _put_gain(result: Result, prefix: str, ours: Answers, theirs: Answers, sizes: Sizes) -> None:
    for what, part in _parts(sizes).items():
        both = (
            [statistics.fmean(one[0] for one in picture[part]) for picture in answers]
            for answers in (ours, theirs)
        )
        gains = [mine - other for mine, other in zip(*both, strict=True)]
        _put_mean(result, f"{prefix}_{what}", gains)


def _parts(sizes: Sizes) -> dict[str, slice]:
    return {"asked": slice(sizes.listed), "later": slice(sizes.listed, None)}


def _put_mean(result: Result, key: str, values: list[float]) -> None:
    result.put(key, statistics.fmean(values))
    result.put(f"{key}_se", statistics.stdev(values) / len(values) ** 0.5)


def profile(keep: float, sizes: Sizes) -> Path:
    """The profile that ``vllm-compress profile`` makes of other pictures, kept in the cache."""
    digest = hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()[:12]
    name = f"profile-vision-{digest}-{keep}-{sizes.profiled}-r{_REVISION}"
    target = cache_folder() / f"{name}.json"
    if not target.is_file():
        chats = cache_folder() / f"{name}.jsonl"
        seeds = range(_PROFILED, _PROFILED + sizes.profiled)
        chats.write_text("".join(json.dumps(chat(seed, sizes.listed)) + "\n" for seed in seeds))
        options = ("--keep", str(keep), "--images", str(chats), "--samples", str(sizes.profiled))
        write_with("profile", target, str(MODEL), *options)
    return target


def chat(seed: int, listed: int = 1) -> dict[str, Any]:
    """A question about some cells of a picture, as the OpenAI API has it."""
    given, file = grid(seed), BytesIO()
    given.image.save(file, "png")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": " ".join(given.cells[:listed])},
    ]
    return {"messages": [{"role": "user", "content": content}]}


def _shared_out(file: Path, shares: str) -> tuple[Path, float]:
    """A profile with the same mean, and the full blocks of a prompt that layers keep on average."""
    from kv_policies.budget.levels import uniform
    from kv_policies.budget.profile import load
    from kv_policies.layout.tokens import TokenLayout

    made, target = load(file), file
    if shares != "profile":
        target = file.with_suffix(f".{shares}.json")
        fractions = made.fractions[::-1]
        if shares == "uniform":
            fractions = tuple(uniform(len(made.layers), made.keep))
        levels = 1 if shares == "uniform" else made.levels
        made = made.model_copy(update={"fractions": fractions, "levels": levels})
        made.save(target)
    kept = [int(TokenLayout(BLOCK, share).kept(BLOCKS)) for share in made.cut().per_layer]
    return target, statistics.fmean(kept)


def draw(full: dict[str, Any], target: Path) -> None:
    """One panel per kind of question, one line per policy, with standard errors."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    result = full["result"]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    titles = {"asked": "asked in the prompt", "later": "asked later"}
    for axes, (what, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        if (whole := result.get(f"full_{what}")) is not None:
            axes.axhline(whole, color="gray", linestyle="--", label="whole cache")
        for name, color in zip(ROWS, colormaps["tab20"].colors, strict=False):
            figures = [(keep, f"{name}_{percent(keep)}_{what}") for keep in KEEPS]
            seen = [
                (keep, result[key], result[f"{key}_se"])
                for keep, key in figures
                if result.get(key) is not None
            ]
            if seen:
                keep, value, error = zip(*seen, strict=True)
                style = ":" if name.endswith(("uniform", "reversed")) else "-"
                look = {"marker": "o", "ls": style, "color": color, "capsize": 2}
                axes.errorbar(keep, value, error, label=name, **look)
        axes.set(
            title=title, xlabel="share of the cache that is kept", xticks=KEEPS, ylim=(0, 1.05)
        )
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("digits read right")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(target, dpi=120)


PARTS = {"vision": Part(tuple(keys()), vision)}

if __name__ == "__main__":
    status = main(__doc__, PARTS)
    draw_beside_out(sys.argv[1:], draw)
    sys.exit(status)
