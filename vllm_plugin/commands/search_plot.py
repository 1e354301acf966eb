# SPDX-License-Identifier: Apache-2.0
"""Draws an allocation. Needs matplotlib, the optional extra ``plot``."""

from typing import Any

from quant_methods.allocators.allocation import Allocation


def draw(made: Allocation, figure: Any, title: str) -> None:
    """Draw the bits of each unit by layer, and loss over size beside uniform levels.

    Args:
        made: What is drawn.
        figure: An empty matplotlib figure.
        title: Name of the model.
    """
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    rows: dict[str, list[int]] = {}
    for unit, bits in made.bits.items():
        rows.setdefault(unit.rpartition(".")[2], []).append(bits)
    levels = sorted(set(made.bits.values()))
    ranks = [[levels.index(bits) for bits in row] for row in rows.values()]
    image = left.imshow(ranks, aspect="auto", cmap="viridis", vmin=0, vmax=max(1, len(levels) - 1))
    bar = figure.colorbar(image, ax=left, label="bits", ticks=range(len(levels)))
    bar.ax.set_yticklabels(levels)
    left.set(xlabel="layer", yticks=range(len(rows)), yticklabels=list(rows))
    left.set_title(f"{title}, {made.report['method']}", fontsize=10)
    left.xaxis.get_major_locator().set_params(integer=True)
    points = sorted((p["bits_per_weight"], p["kl_nats"]) for p in made.report["uniform"].values())
    size, loss = made.report["bits_per_weight"], made.report["kl_nats"]
    right.plot(*zip(*points, strict=True), "o--", color="#636363", label="all units equal")
    right.plot([size], [loss], "o", color="#d94801", label=made.report["method"])
    # 16 bits lose nothing, which a logarithmic axis cannot show.
    smallest = min((y for _, y in [*points, (size, loss)] if y > 0), default=1e-6)
    right.set_yscale("symlog", linthresh=smallest, subs=range(2, 10))
    right.yaxis.set_minor_formatter("{x:.2g}")
    right.set(xlabel="bits per weight, with scales", ylabel="KL, nats per token")
    right.legend(frameon=False)
