# SPDX-License-Identifier: Apache-2.0
"""The page beside the endpoint: off unless it is named, one file, metrics that exist.

What it shows of a real engine is in ``test_metrics.py``, in a browser.
"""

import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.plugins import ENDPOINT_PLUGINS_GROUP, load_endpoint_plugins
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

from vllm_plugin.metrics import page
from vllm_plugin.metrics.catalogue import METRICS

HTML = Path(page.__file__).with_suffix(".html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("allowed", "there"), [(None, False), ("compress", False), ("compress,compress_page", True)]
)
def test_only_where_it_is_named(
    monkeypatch: pytest.MonkeyPatch, allowed: str | None, there: bool
) -> None:
    assert entry_points(group=ENDPOINT_PLUGINS_GROUP, name=page.PagePlugin.name)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    app = FastAPI()
    for plugin in load_endpoint_plugins(("generate",)):
        assert isinstance(plugin, EndpointPlugin)
        plugin.attach_router(app)
    answer = TestClient(app).get(page.ROUTE)
    assert answer.status_code == (200 if there else 404)
    if there:
        assert answer.text == HTML
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_every_metric_it_names_exists() -> None:
    named = set(re.findall(r'"((?:kv|diffusion|refused|weight)_\w+)"', HTML))
    assert len(named) > 10
    assert named <= {metric.name for metric in METRICS}


def test_it_loads_nothing_from_elsewhere() -> None:
    assert not re.findall(r"\b(?:src|href)=|@import|url\(", HTML)
    assert re.findall(r"https?://[^\"]+", HTML) == ["http://www.w3.org/2000/svg"]
