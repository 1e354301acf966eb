# SPDX-License-Identifier: Apache-2.0
"""The picture of ``diffusion``: accuracy over what was computed."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import log


def draw_beside_out(arguments: Sequence[str]) -> None:
    """Draw the curve of the file that ``--out`` names, if it has one and matplotlib is there."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", type=Path)
    out: Path | None = parser.parse_known_args(arguments)[0].out
    if out is None:
        return
    curve = json.loads(out.read_text(encoding="utf-8"))["details"].get("curve")
    if curve is None:
        return
    try:
        draw(curve, out.with_suffix(".png"))
    except ImportError:
        log.print("not drawn: matplotlib is missing (pip install '.[plot]')")


def draw(curve: Sequence[dict[str, Any]], target: Path) -> None:
    """One line per policy, its settings in order of their cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[dict[str, Any]]] = {}
    for point in curve:
        name = f"{point['policy']}, in step" if point["in_step"] else point["policy"]
        lines.setdefault(name, []).append(point)
    for name, points in lines.items():
        points = sorted(points, key=lambda point: point["token_layers_ratio"])
        axes.plot(
            [point["token_layers_ratio"] for point in points],
            [point["accuracy"] for point in points],
            marker="o",
            label=name,
        )
    axes.set(
        xlabel="token-layers, of what full computes with the same rule",
        ylabel="right tokens",
        xscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=120)
