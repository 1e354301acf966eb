# SPDX-License-Identifier: Apache-2.0
"""The picture of ``diffusion``: accuracy over what was computed."""

from pathlib import Path
from typing import Any


def draw(full: dict[str, Any], target: Path) -> None:
    """Two panels, one line per policy, its settings in order of their cost.

    Points of another commit rule, which compute more than full, are left out.
    """
    from matplotlib.figure import Figure

    if (curve := full["details"].get("curve")) is None:
        return  # that part was not run
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines: dict[str, list[dict[str, Any]]] = {}
    for point in curve:
        name = f"{point['policy']}, in step" if point["in_step"] else point["policy"]
        name += ", heads" if point["label"].startswith("heads") else ""
        if point["token_layers_ratio"] <= 1:
            lines.setdefault(name, []).append(point)
    for axes, measure, title in (
        (left, "accuracy", "right tokens"),
        (right, "kl", "nats, KL from computing everything"),
    ):
        for name, points in lines.items():
            points = sorted(points, key=lambda point: point["token_layers_ratio"])
            seen = [(point["token_layers_ratio"], point[measure]) for point in points]
            axes.plot(*zip(*seen, strict=True), marker="o", label=name)
        axes.set(xlabel="token-layers, over full's", title=title)
        axes.grid(alpha=0.3)
    left.set_ylim(0.9, 1.01)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(target, dpi=110)
