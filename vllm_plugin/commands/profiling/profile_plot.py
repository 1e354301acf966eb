# SPDX-License-Identifier: Apache-2.0
"""Draws a profile. Needs matplotlib, the optional extra ``plot``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_common.errors import CompressError

if TYPE_CHECKING:
    from kv_policies.budget.profile import Profile


def canvas(path: Path) -> Any:
    """Return an empty figure that can be saved as ``path``.

    It is made without pyplot, which needs a display and has global state.

    Args:
        path: Its suffix says the kind of file.

    Raises:
        CompressError: matplotlib is missing, or cannot write this kind of file.
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


def draw(profile: "Profile", figure: Any) -> None:
    """Draw each layer's own share as a bar, with lines for the served and the uniform share.

    Args:
        profile: What is drawn.
        figure: An empty matplotlib figure.
    """
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
