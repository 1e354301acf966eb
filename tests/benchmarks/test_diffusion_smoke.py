# SPDX-License-Identifier: Apache-2.0
"""The diffusion benchmark runs through in small and keeps the contract of its last line."""

from pathlib import Path

import pytest

from tests.support.benchmark import smoke

POLICIES = ("full", "never", "fixed_period", "dual_cache", "elastic")
CONTRACT = {"parallel_only_ratio"} | {
    f"{policy}_{key}"
    for policy in POLICIES
    for key in (
        "accuracy",
        "kl",
        "tokens_per_forward",
        "token_layers_ratio",
        "refresh_share",
        "tokens_per_s_ratio",
    )
}


@pytest.mark.slow
def test_diffusion(tmp_path: Path) -> None:
    out = tmp_path / "diffusion.json"
    line, _ = smoke("diffusion", CONTRACT, out)
    assert all(line[key] is not None for key in CONTRACT)
    assert abs(line["full_kl"]) < 1e-9 and line["full_token_layers_ratio"] == 1
    assert line["never_token_layers_ratio"] < line["fixed_period_token_layers_ratio"] < 1
    assert line["full_refresh_share"] == 1 > line["never_refresh_share"]
    pytest.importorskip("matplotlib")
    assert out.with_suffix(".png").is_file()
