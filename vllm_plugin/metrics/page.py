# SPDX-License-Identifier: Apache-2.0
"""A page beside the endpoint, ``/compress``: the figures of ``vllm-compress status``, with plots.

The page is one static file. The browser that shows it reads ``/metrics``, as a Prometheus server
would, and keeps the last minutes itself, so the engine does nothing for it.
"""

from argparse import Namespace
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

ROUTE = "/compress"
# Nothing is loaded from elsewhere, and nothing but this server is asked.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
_HEADERS = {"Content-Security-Policy": f"{_POLICY}connect-src 'self'", "Cache-Control": "no-store"}


class PagePlugin:
    """Entry point ``compress_page`` of ``vllm.endpoint_plugins``; VLLM_PLUGINS must name it."""

    name = "compress_page"
    required_tasks = None  # pooling models have metrics too

    def attach_router(self, app: FastAPI) -> None:
        html = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")

        @app.get(ROUTE, include_in_schema=False)
        async def page() -> HTMLResponse:
            return HTMLResponse(html, headers=_HEADERS)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        pass
