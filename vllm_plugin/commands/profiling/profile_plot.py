# SPDX-License-Identifier: Apache-2.0
"""A picture of a profile. matplotlib is the optional extra ``plot``."""

from pathlib import Path
from typing import Any

from compress_common.errors import CompressError
from kv_policies.budget.profile import Profile


def canvas(path: Path) -> Any:
    """An empty figure that can be saved as ``path``; CompressError when it cannot.

    A figure of its own, without pyplot: no display, no global state.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CompressError(
            "--plot needs matplotlib; run: pip install 'vllm-compress-plugin[plot]'"
        ) from error
    figure = Figure(figsize=(8, 3.6), dpi=150, layout="constrained")
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise CompressError(
            f"--plot {path} has an unknown kind of file; use one of .{', .'.join(sorted(known))}"
        )
    return figure


def draw(profile: Profile, figure: Any) -> None:
    """Bars: each layer's own share. Lines: its level's, and the same for all."""
    axes = figure.add_subplot()
    layers = profile.layers
    cut = profile.cut()
    axes.bar(layers, [float(f) for f in profile.fractions], width=0.8, color="#9ecae1", label="own")
    served = [float(f) for f in cut.per_layer]
    left, right = [i - 0.45 for i in layers], [i + 0.45 for i in layers]
    label = f"served, {len(cut.fractions)} levels"
    axes.hlines(served, left, right, color="#d94801", linewidth=2.5, label=label)
    axes.axhline(float(profile.keep), color="#636363", linestyle="--", linewidth=1, label="uniform")
    axes.set(xlabel="layer", ylabel="share of tokens kept", ylim=(0, None))
    axes.set_title(f"{profile.model.name}, keep {float(profile.keep):g}", fontsize=10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.01)
    axes.legend(frameon=False)
