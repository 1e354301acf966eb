# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress status``: what a running server compresses, and what that has saved."""

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from compress_common.errors import CompressError
from vllm_plugin.commands.common import AsJson, mib, out

if TYPE_CHECKING:
    from vllm_plugin.commands.served_figures import Figures

Rows = list[tuple[str, str]]
_SKIPPED = {
    "short_prompt": "too short to compact",
    "nothing_to_evict": "with nothing to evict",
    "opted_out": "opted out",
}


def status(
    url: Annotated[
        str, typer.Argument(help="the server; /metrics is added")
    ] = "http://127.0.0.1:8000",
    watch: Annotated[
        float | None, typer.Option(min=0.2, help="print again every so many seconds, until Ctrl-C")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a running server compresses, what that saves, and what is skipped and why.

    Reads the server's /metrics and changes nothing. Counters are since the engine started. Exits
    with 1 if the server does not answer, or compresses nothing.

    Example: vllm-compress status http://127.0.0.1:8000 --watch 5
    """
    if as_json and watch:
        raise CompressError("--json prints once; leave out --watch")
    if as_json:
        figures = [model.as_dict() | {"warnings": warnings(model)} for model in _read(url)]
        print(json.dumps(figures))
    elif watch is None:
        out.print(_view(url), soft_wrap=True)
    elif not out.is_terminal:  # Live would print at the end only, once
        while True:
            out.print(_view(url), soft_wrap=True)
            time.sleep(watch)
    else:
        with Live(_view(url), console=out, auto_refresh=False) as live:
            while True:
                time.sleep(watch)
                live.update(_view(url), refresh=True)


def rows(figures: "Figures") -> Rows:
    """Return what a person reads of a model: a name and figures in words per row."""
    found = _compressed(figures) + _requests(figures)
    if figures.total("diffusion_steps"):
        return found + _denoised(figures)
    return found if figures.info["policy"] == "none" else found + _saved(figures)


def warnings(figures: "Figures") -> list[str]:
    """Return what looks as if compression did nothing, and why."""
    skipped = _skipped(figures)
    if figures.total("kv_eligible_requests") or not skipped:
        return []
    found = f"nothing of {figures.model} was compacted yet: {', '.join(skipped)}"
    return [f"{found}; see min_prompt and decode_window in docs/kv_cache.md"]


def _skipped(figures: "Figures") -> list[str]:
    """Return how many requests were not compacted, by reason; a newer server may know others."""
    counts = figures.by_label("kv_skipped_requests").items()
    return [f"{count:,.0f} {_SKIPPED.get(key, key)}" for key, count in counts]


def _read(url: str) -> "list[Figures]":
    from vllm_plugin.commands.served_figures import fetch, models_in

    return models_in(fetch(url), url)


def _view(url: str) -> Group:
    parts: list[Table | Text] = []
    for figures in _read(url):
        table = Table(title=figures.model, title_justify="left", show_header=False)
        for what, told in rows(figures):
            table.add_row(what, told)
        parts += [table, *(Text(f"warning: {text}", "yellow") for text in warnings(figures))]
    return Group(*parts)


def _compressed(figures: "Figures") -> Rows:
    info, size = figures.info, figures.sizes("weight_bytes")
    weights = info["method"] if info["method"] != "none" else "not compressed"
    found = [("weights", f"{weights}, {_change(size, mib)}")]
    if info["policy"] == "none":
        return [*found, ("KV cache", "not compressed")]
    chosen = [
        f"{name.replace('_', ' ')} {info[name]}"
        for name in ("keep", "budget", "prompt_window", "profile")
        if info.get(name, "none") != "none"  # an older server has fewer labels
    ]
    token = figures.sizes("kv_bytes_per_token")
    return [
        *found,
        ("policy", ", ".join([info["policy"], *chosen])),
        ("KV bytes a token", _change(token, "{:,.0f}".format)),
    ]


def _change(sizes: tuple[float, float] | None, form: Callable[[float], str]) -> str:
    if sizes is None:
        return "bytes not known"
    before, after = sizes
    if before == after:
        return form(before)
    return f"{form(before)} -> {form(after)} ({after / before:.3f})"


def _requests(figures: "Figures") -> Rows:
    from vllm_plugin.commands.served_figures import CACHE_USED, PREEMPTIONS, RUNNING, WAITING

    running, waiting = figures.total(RUNNING), figures.total(WAITING)
    found = [
        ("requests now", f"{running:,.0f} running, {waiting:,.0f} waiting"),
        ("KV cache in use", f"{figures.mean(CACHE_USED):.1%} of the pool"),
        ("preemptions", f"{figures.total(PREEMPTIONS):,.0f}"),
    ]
    refused = figures.by_label("refused_requests")
    told = ", ".join(f"{count:,.0f} for {reason}" for reason, count in refused.items())
    return [*found, ("refused requests", told)] if told else found


def _saved(figures: "Figures") -> Rows:
    kept = figures.mean("kv_kept_ratio")
    freed, blocks = figures.total("kv_freed_bytes"), figures.total("kv_freed_blocks")
    tokens, evicted = figures.total("kv_tokens"), figures.total("kv_evicted_tokens")
    segments = figures.by_label("kv_compactions")
    compactions = ", ".join(
        f"{count:,.0f} {kind}{'s' * (count != 1)}" for kind, count in segments.items()
    )
    count = figures.total("kv_compaction_seconds_count")
    if count:
        mean = 1e3 * figures.total("kv_compaction_seconds_sum") / count
        compactions += f"; {mean:.1f} ms of a step's host time, mean"
    reasons = "".join(f", {reason}" for reason in _skipped(figures))
    share = f"{evicted / tokens:.1%} of {tokens:,.0f} compacted" if tokens else "none yet"
    saved = f"{mib(figures.total('kv_saved_bytes'))}; running requests hold {kept:.1%} of"
    return [
        ("saved now", f"{saved} their blocks"),
        ("saved at most", mib(figures.total("kv_saved_bytes_peak"))),
        ("given back in all", f"{mib(freed)} in {blocks:,.0f} blocks"),
        ("tokens evicted", share),
        ("compactions", compactions or "none yet"),
        ("finished requests", f"{figures.total('kv_eligible_requests'):,.0f} compacted{reasons}"),
    ]


def _denoised(figures: "Figures") -> Rows:
    steps, layers = figures.total("diffusion_steps"), figures.by_label("diffusion_token_layers")
    share = layers.get("computed", 0.0) / layers["full"]
    return [
        ("tokens per step", f"{figures.total('diffusion_tokens') / steps:.2f}"),
        ("steps that refresh", f"{figures.total('diffusion_refreshes') / steps:.1%}"),
        ("token-layers computed", f"{share:.1%} of all"),
        ("finished requests", f"{figures.total('diffusion_requests'):,.0f}"),
    ]
