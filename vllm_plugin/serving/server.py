# SPDX-License-Identifier: Apache-2.0
"""``ray.serve.llm``'s own server, which leaves as soon as its engine is dead."""

import asyncio
import os

from ray.llm._internal.serve.observability.logging import get_logger
from ray.serve.llm.deployment import LLMServer

_PERIOD = 0.05  # seconds; a look at two flags
# Seconds for error events to reach streams in flight. Ray ends a stream whose replica is gone
# without one, as if the answer were complete.
_LAST_WORDS = 0.2

logger = get_logger(__name__)


class FailFastServer(LLMServer):
    """An LLMServer whose process ends when vLLM's engine has died.

    Ray's own stays in rotation until three health checks have failed, and answers each request of
    these 20 to 30 seconds with an error at once. Ray's routers hand on or hold back what a replica
    that is gone has not begun, so only requests in flight are lost.
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
