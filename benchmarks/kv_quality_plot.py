# SPDX-License-Identifier: Apache-2.0
"""The picture of ``kv_quality``: recall and loss over the share that is kept."""

from pathlib import Path
from typing import Any

from benchmarks.kv_quality_recall import KEEPS, MEASURES, ROWS, rows

TITLES = {
    "passkey": "pass keys recalled",
    "needles": "needles recalled",
    "nats": "nats per token above the full cache",
}


def draw(full: dict[str, Any], target: Path) -> None:
    """One panel per measure, one line per policy; fp8, which has no keep, is level."""
    from matplotlib.figure import Figure

    result = full["result"]
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
        for name in ROWS:
            seen = [
                (keep, value)
                for prefix, _, keep in rows([name])
                if (value := result.get(f"{prefix}_{measure}")) is not None
            ]
            if name == "fp8" and seen:
                axes.axhline(seen[0][1], color="gray", linestyle="--", label=name)
            elif seen:
                axes.plot(*zip(*seen, strict=True), marker="o", label=name)
        axes.set(title=TITLES[measure], xlabel="share of the cache that is kept", xticks=KEEPS)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(target, dpi=120)
