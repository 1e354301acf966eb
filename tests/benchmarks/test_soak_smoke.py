# SPDX-License-Identifier: Apache-2.0
"""The soak runs through in small: nothing fails, nothing leaks, something is compressed."""

from pathlib import Path

import pytest

from tests.support.benchmark import smoke

KEYS = {"requests", "errors", "errors_stock", "leaked_blocks", "rss_growth_ratio", "aborted"}


@pytest.mark.slow
def test_soak(demo_model: Path, tmp_path: Path):
    line, details = smoke("serving_soak", KEYS, tmp_path / "soak.json")
    assert line["errors"] == line["errors_stock"] == 0, details
    assert line["leaked_blocks"] == 0
    assert line["requests"] == 40 and 0 < line["aborted"] < 20
    assert line["compactions"] > 0 and line["least_kept_ratio"] < 1
