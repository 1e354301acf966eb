# SPDX-License-Identifier: Apache-2.0
"""``ray.serve.llm``'s own server, made to leave as soon as its engine is dead."""

import asyncio
import os

from ray.llm._internal.serve.observability.logging import get_logger
from ray.serve.llm.deployment import LLMServer

_PERIOD = 0.05  # seconds; a check reads two flags
# Seconds in which error events reach the streams in flight. Ray ends the stream of a replica that
# is gone without such an event, as if the answer were complete.
_LAST_WORDS = 0.2

logger = get_logger(__name__)


class FailFastServer(LLMServer):
    """An LLMServer whose process ends when vLLM's engine has died.

    Ray's own server stays in rotation until three health checks have failed. For these 20 to 30
    seconds it answers every request with an error at once. When a replica is gone, Ray's routers
    pass on or hold back what it has not begun, so only requests in flight are lost.
    """

    async def start(self) -> None:
        """Start the engine and watch it."""
        await super().start()
        self._watch = asyncio.create_task(self._leave_with_engine())

    async def _leave_with_engine(self) -> None:
        while True:
            await asyncio.sleep(_PERIOD)
            try:
                await self.check_health()
            except Exception as error:
                logger.error("The engine is dead, this replica ends: %s", error)
                await asyncio.sleep(_LAST_WORDS)
                # Not sys.exit: Ray takes an exception out of a task for a failed request.
                os._exit(1)
