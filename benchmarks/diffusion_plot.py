# SPDX-License-Identifier: Apache-2.0
"""The picture of ``diffusion``: accuracy and divergence over what was computed."""

from pathlib import Path
from typing import Any

# A policy without settings is one point. It is drawn as a ring on top, so that a point of another
# policy at the same place does not hide it.
_RINGS = {"full": "s", "never": "D"}
_MARKERS = {"fixed_period": "o", "dual_cache": "^", "elastic": "v"}


def draw(full: dict[str, Any], target: Path) -> None:
    """Draw two panels, with a line for each policy, its settings in order of their cost.

    Points of another commit rule, which compute more than full, are left out.

    Args:
        full: The results of all parts, as ``benchmarks.common`` writes them.
        target: The picture to write. Nothing is written if the part was not run.
    """
    from matplotlib.figure import Figure

    if (curve := full["details"].get("curve")) is None:
        return
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
            axes.plot(*zip(*seen, strict=True), label=name, **_style(name))
        axes.set(xlabel="token-layers relative to full", title=title)
        axes.grid(alpha=0.3)
    left.set_ylim(0.995, 1.001)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(target, dpi=110)


def _style(name: str) -> dict[str, Any]:
    if name in _RINGS:
        ring = {"markersize": 13, "markerfacecolor": "none", "markeredgewidth": 2, "zorder": 5}
        return ring | {"marker": _RINGS[name], "linestyle": "none"}
    return {"marker": _MARKERS[name.split(",")[0]]}
