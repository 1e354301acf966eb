# SPDX-License-Identifier: Apache-2.0
"""HTTP 400 for a bad streaming request, before its answer starts.

vLLM 0.32 validates the parameters of a request in the engine client, when the first token is asked
for. A streaming answer has begun by then: the client gets HTTP 200 and an error event. No seam of
the engine lies before that, so the check is repeated where the body arrives.

Two ways to switch it on:

- ``VLLM_PLUGINS=compress`` (the manifests and Ray set it): vLLM loads ``StreamCheckPlugin``.
- ``vllm serve --middleware vllm_plugin.stream_check.StreamCheck`` in every other case.
"""

import json
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI, HTTPException
from starlette.datastructures import State
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm import SamplingParams
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from vllm_plugin import why_disabled
from vllm_plugin.request_check import RequestCheck

_REQUESTS: dict[str, Any] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": None,  # Anthropic's: no sampling parameters of its own, vllm_xargs alone
}
_MAX_TOKENS = 2**31 - 1  # of requests that give none; no check depends on it


class StreamCheck:
    """ASGI middleware that runs the served model's request checks on streaming requests.

    It looks at the body as the server reads it, so a client that is not authorized is refused
    first, and nothing is read in its name.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        posted = scope["type"] == "http" and scope["method"] == "POST" and path in _REQUESTS
        state = getattr(scope.get("app"), "state", None)
        if not posted or not (checks := checks_of(state)):
            await self._app(scope, receive, send)
            return
        body = bytearray()

        async def checked() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                body.extend(message.get("body", b""))
                if not message.get("more_body"):
                    refuse_stream(path, bytes(body), state, checks)
                    body.clear()
            return message

        await self._app(scope, checked, send)


def checks_of(state: State | None) -> list[type[RequestCheck]]:
    """Return the request checks of the served model; none where vLLM has set up no model."""
    config = getattr(getattr(state, "vllm_config", None), "model_config", None)
    return [
        check
        for check in getattr(config, "logits_processors", None) or ()
        if isinstance(check, type) and issubclass(check, RequestCheck)
    ]


def refuse_stream(path: str, body: bytes, state: Any, checks: Iterable[type[RequestCheck]]) -> None:
    """Refuse a streaming request that the engine would refuse once the answer has begun.

    Args:
        path: Route of the request.
        body: The whole body. What vLLM cannot parse is left to vLLM.
        state: State of vLLM's application.
        checks: The request checks of the served model.

    Raises:
        HTTPException: Status 400. FastAPI hands it on when it is raised while a body is read.
    """
    if b'"stream"' not in body:
        return
    try:
        params = _parameters(path, json.loads(body), state)
    except Exception:  # vLLM meets the same error before the answer starts, and words it itself
        return
    for check in checks if params else ():
        try:
            check.validate_params(params)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error


def _parameters(path: str, data: Any, state: State) -> SamplingParams | None:
    """The sampling parameters of a streaming request; None for any other request."""
    kind = _REQUESTS[path]
    if not isinstance(data, dict) or not data.get("stream") or data.get("use_beam_search"):
        return None
    if kind is None:
        return SamplingParams(extra_args=data.get("vllm_xargs"))
    defaults = state.openai_serving_completion.default_sampling_params
    limit = data.get("max_completion_tokens") or data.get("max_tokens") or _MAX_TOKENS
    return kind.model_validate(data).to_sampling_params(limit, defaults)


class StreamCheckPlugin:
    """Entry point ``compress`` of ``vllm.endpoint_plugins``: adds the middleware, and no route."""

    name = "compress"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        if why_disabled() is None:
            app.add_middleware(StreamCheck)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        pass
