# SPDX-License-Identifier: Apache-2.0
"""Draws what blocks cost. Needs matplotlib, the optional extra ``plot``."""

from typing import Any


def draw(report: dict[str, Any], figure: Any, title: str) -> None:
    """Draw the loss over the blocks dropped, and what each of them costs alone.

    Args:
        report: Of ``prune_checkpoint``.
        figure: An empty matplotlib figure.
        title: Name of the model.
    """
    left, right = figure.subplots(1, 2)
    counts, losses = zip(*report["curve"], strict=True)
    left.plot(counts, losses, "o-", color="#9ecae1", label="unhealed, on the search's text")
    dropped = len(report["dropped"])
    for key, color, label in (
        ("loss_without_healing", "#3182bd", "unhealed, on held-out text"),
        ("loss", "#d94801", "healed, on held-out text"),
    ):
        left.plot([dropped], [report[key]["kl"]], "D", color=color, label=label)
    left.set(xlabel="blocks dropped", ylabel="KL, nats per token", ylim=(0, None))
    left.set_title(title, fontsize=10)
    left.legend(frameon=False, fontsize=8)
    alone = report.get("search", {}).get("kl_alone") or report["kl_alone"]
    colors = ["#d94801" if int(index) in report["dropped"] else "#9ecae1" for index in alone]
    right.bar([int(index) for index in alone], list(alone.values()), color=colors)
    right.set(xlabel="block", ylabel="KL of that block alone", yscale="log")
    right.set_title("orange: dropped", fontsize=10)
    for axes, axis in ((left, left.xaxis), (right, right.xaxis)):
        axis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.05)
