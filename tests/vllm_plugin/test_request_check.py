# SPDX-License-Identifier: Apache-2.0
"""Keys of a request that were meant for the plugin, and keys that belong to somebody else."""

import asyncio
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from fastapi import FastAPI
from vllm import SamplingParams
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

import vllm_plugin
from vllm_plugin.kv_cache import requests
from vllm_plugin.request_check import misspelt
from vllm_plugin.stream_check import StreamCheck, StreamCheckPlugin

ALLOWED = ("compress_keep",)


@pytest.mark.parametrize(
    "key",
    [
        "compres_keep",
        "comprss_keep",
        "compress_kep",
        "compress-keep",
        "compressKeep",
        "COMPRESS_KEEP",
        "compress keep",
        "compresskeep",
        "compression_keep",
        "vllm_compress_keep",
    ],
)
def test_a_near_miss_is_named(key: str) -> None:
    assert misspelt([key], ALLOWED) == [f"unknown key {key!r}, did you mean 'compress_keep'?"]


def test_our_prefix_is_ours() -> None:
    assert misspelt(["compress_gamma"], ALLOWED) == ["unknown key 'compress_gamma'"]


@pytest.mark.parametrize(
    "key",
    [
        "compress_keep",
        "session_id",
        "kv_transfer_params",
        "ec_transfer_params",
        "compression_level",
        "compressor",
        "decompress",
        "keep_alive",
        "keep",
        "target_token",
        "",
    ],
)
def test_keys_of_others_pass(key: str) -> None:
    assert misspelt([key], ALLOWED) == []


def test_the_refusal_lists_what_a_request_may_set(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(requests, "on_refusal", seen.append)
    params = SamplingParams(extra_args={"compres_keep": 1, "session_id": "a"})
    with pytest.raises(ValueError, match=r"did you mean 'compress_keep'\? \(a request may set c"):
        requests.check(params, cached=True)
    assert seen == ["unknown_key"]


def test_the_endpoint_plugin_is_vllms_and_declared() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    declared = tomllib.loads(project.read_text())["project"]["entry-points"]
    module, _, name = declared["vllm.endpoint_plugins"]["compress"].partition(":")
    assert getattr(import_module(module), name) is StreamCheckPlugin
    plugin, app = StreamCheckPlugin(), FastAPI()
    assert isinstance(plugin, EndpointPlugin)
    before = [route.path for route in app.routes]
    plugin.attach_router(app)
    assert [each.cls for each in app.user_middleware] == [StreamCheck]
    assert [route.path for route in app.routes] == before


def test_a_disabled_plugin_attaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_plugin, "_disabled", "it was tested with another vLLM")
    app = FastAPI()
    StreamCheckPlugin().attach_router(app)
    assert app.user_middleware == []


def test_an_app_without_checks_gets_the_request_as_it_came() -> None:
    """vLLM keeps no config in an application without a model."""
    got: list[object] = []

    async def app(scope: object, receive: object, send: object) -> None:
        got.append(receive)

    async def receive() -> dict[str, object]:
        raise AssertionError("read in the name of nobody")

    async def send(message: object) -> None: ...

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "app": FastAPI()}
    asyncio.run(StreamCheck(app)(scope, receive, send))  # type: ignore[arg-type]
    assert got == [receive]
