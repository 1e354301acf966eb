# SPDX-License-Identifier: Apache-2.0
"""No policy hides another in the picture of the diffusion benchmark."""

from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from benchmarks.diffusion_plot import draw


def test_policies_at_one_place_are_all_seen(tmp_path: Path) -> None:
    point = {"label": "", "in_step": False, "accuracy": 1.0, "kl": 0.02, "token_layers_ratio": 0.3}
    curve = [point | {"policy": name} for name in ("full", "never", "fixed_period")]
    curve.append(curve[-1] | {"label": "period 2", "kl": 0, "token_layers_ratio": 0.9})
    draw({"details": {"curve": curve}}, tmp_path / "picture.png")
    picture = imread(tmp_path / "picture.png")[:, :, :3]
    panel = picture[:, : int(picture.shape[1] * 0.4)]  # without the legend
    for number, name in enumerate(("full", "never", "fixed_period")):
        near = np.abs(panel - to_rgb(f"C{number}")).max(-1) < 0.05
        assert near.sum() > 20, name
