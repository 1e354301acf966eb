# SPDX-License-Identifier: Apache-2.0
"""Draws settings by bytes and loss. Needs matplotlib, the optional extra ``plot``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_plugin.commands.recommendation import Recommendation, Wanted

_GIB = 2**30


def draw(found: "Recommendation", wanted: "Wanted", figure: Any, title: str) -> None:
    """Draw loss over the memory that a setting needs, the frontier as a line.

    Args:
        found: What is drawn.
        wanted: The device and the load.
        figure: An empty matplotlib figure.
        title: Name of the model.
    """
    axes = figure.add_subplot()
    chain = found.chain
    axes.plot(
        [each.needs / _GIB for each in chain],
        [each.loss for each in chain],
        color="#9ecae1",
        zorder=1,
        label="not beaten in bytes and safety",
    )
    for row in found.rows:
        each = row.candidate(wanted.concurrency)
        x, taken = each.needs / _GIB, each.name == chain[found.chosen].name
        color = "#d94801" if taken else "#a50f15" if each.forgets else "#3182bd"
        marker = "x" if each.forgets else "o"
        axes.errorbar(x, each.loss, each.error, fmt=marker, color=color, capsize=3, zorder=2)
        label = f"{each.name}\n{row.size.requests(wanted.memory):,} at once"
        axes.annotate(
            label, (x, each.loss), (6, 4), textcoords="offset points", fontsize=7, color=color
        )
    axes.axvline(wanted.memory / _GIB, color="#636363", linestyle="--", linewidth=1, label="device")
    axes.plot([], [], "x", color="#a50f15", label="forgets keys")
    axes.set(
        xlabel=f"GiB for {wanted.load}",
        ylabel="nats lost per token",
    )
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.2, y=0.15)
    axes.legend(frameon=False, fontsize=7)
