# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the page runs through in small: both servers answer, and the page is read."""

from pathlib import Path

import pytest

from tests.support.benchmark import smoke

KEYS = {"page_throughput_ratio", "page_cpu_share", "page_read_ms"}


@pytest.mark.slow
def test_page(demo_model: Path, tmp_path: Path) -> None:
    line, details = smoke("page_cost", KEYS, tmp_path / "page.json")
    assert all(line[key] > 0 for key in KEYS)
    assert details["page_read_ms"]["readings"] >= 2  # one in each round, the warm-up's too
