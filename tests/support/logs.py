# SPDX-License-Identifier: Apache-2.0
"""What the plugin logs through vLLM's logger."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging_if_needed


@contextmanager
def logged(caplog: pytest.LogCaptureFixture, module: str) -> Iterator[None]:
    """Capture what a module of ours logs, whether or not an engine was configured before.

    vLLM sets up logging with the first engine. That resets the loggers below vLLM's own, which
    hands nothing up.
    """
    configure_logging_if_needed(LoggingConfig())
    logger = logging.getLogger(f"vllm.{module}")
    with caplog.at_level("INFO", logger.name), pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger, "propagate", False)
        patch.setattr(logger, "handlers", [caplog.handler])
        yield
