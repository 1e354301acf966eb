# SPDX-License-Identifier: Apache-2.0
"""Draws what bases lose in each layer. Needs matplotlib, the optional extra ``plot``."""

from collections.abc import Sequence
from typing import Any, Final

from kv_policies.latents.bases import Bases
from kv_policies.latents.bases_header import SIDES
from vllm_plugin.commands.profiling.kv_bases import HeldOut

METHODS: Final = {"closed_form": "closed form", "asvd": "ASVD", "svd": "SVD"}
_COLOURS: Final = {"closed_form": "#d94801", "asvd": "#3182bd", "svd": "#9ecae1"}


def draw(bases: Bases, report: Sequence[HeldOut], figure: Any) -> None:
    """Draw the held-out error of each layer, keys beside values, with a line for each method.

    Args:
        bases: For the title and the layers.
        report: A row for each layer.
        figure: An empty matplotlib figure.
    """
    for axes, side in zip(figure.subplots(1, 2, sharey=True), SIDES, strict=True):
        for method, label in METHODS.items():
            errors = [getattr(row, side)[method] for row in report]
            axes.plot(bases.layers, errors, "o-", ms=3, color=_COLOURS[method], label=label)
        axes.set(xlabel="layer", ylim=(0, None))
        axes.set_title(f"{side}s", fontsize=10)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.axes[0].set_ylabel("energy lost, held out")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(f"{bases.header.model.name}, ratio {float(bases.ratio):g}", fontsize=10)
