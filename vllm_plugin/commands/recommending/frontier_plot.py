# SPDX-License-Identifier: Apache-2.0
"""Draws settings by bytes and loss. Needs matplotlib, the optional extra ``plot``."""

from typing import TYPE_CHECKING, Any, Final

from vllm_plugin.commands.recommending.candidates import CACHES, WEIGHTS

if TYPE_CHECKING:
    from vllm_plugin.commands.recommendation import Recommendation, Wanted

_GIB: Final = 2**30
_COLORS: Final = dict(zip(WEIGHTS, ("#3182bd", "#e6550d"), strict=True))
_MARKERS: Final = dict(zip(CACHES, "os^D", strict=True))
_FAR: Final = 1.5  # a device that is larger than the largest setting by this is told, not drawn


def draw(found: "Recommendation", wanted: "Wanted", figure: Any, title: str) -> None:
    """Draw loss over the memory that a setting needs, the frontier as a line.

    Args:
        found: What is drawn.
        wanted: The device and the load.
        figure: An empty matplotlib figure.
        title: Name of the model.
    """
    axes = figure.add_subplot()
    chain, device = found.chain, wanted.memory / _GIB
    axes.plot(
        [each.needs / _GIB for each in chain],
        [each.loss for each in chain],
        color="#bdbdbd",
        zorder=1,
        label="frontier",
    )
    for row in found.rows:
        each = row.candidate(wanted.concurrency)
        color = _COLORS[row.setting.weights]
        axes.errorbar(
            each.needs / _GIB,
            each.loss,
            each.error,
            fmt=_MARKERS[row.setting.cache],
            color=color,
            markerfacecolor="white" if each.forgets else color,
            capsize=3,
            zorder=2,
        )
    needs = [row.size.needs(wanted.concurrency) for row in found.rows]
    taken = chain[found.chosen]
    axes.annotate(
        f"take {taken.name}",
        (taken.needs / _GIB, taken.loss),
        (0, -12),  # below: no setting is there
        textcoords="offset points",
        ha="right" if 2 * taken.needs > min(needs) + max(needs) else "left",
        va="top",
        fontsize=8,
        fontweight="bold",
    )
    if device < _FAR * max(needs) / _GIB:
        axes.axvline(device, color="#636363", linestyle="--", linewidth=1)
        title += f", dashed: the device, {device:.2f} GiB"
    else:
        title += f", on a device of {device:.2f} GiB"
    axes.set(xlabel=f"GiB for {wanted.load}", ylabel="nats lost per token")
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.12, y=0.2)
    _legend(axes, found)


def _legend(axes: Any, found: "Recommendation") -> None:
    """Explain colors and markers beside the plot."""
    for name, color in _COLORS.items():
        axes.fill_between([], [], color=color, label=f"weights: {name}")
    for name, marker in _MARKERS.items():
        if any(row.setting.cache == name for row in found.rows):
            axes.plot([], [], marker, color="#636363", label=name)
    if any(row.cache.forgets for row in found.rows):
        axes.plot([], [], "o", color="#636363", markerfacecolor="white", label="forgets keys")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
