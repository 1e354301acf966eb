# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with the flag and the OpenAI Python client: the README's first command."""

from pathlib import Path

import pytest

from benchmarks.server import serving
from tests.support.chat import check_chat


@pytest.mark.slow
def test_chat_completion_and_stream(demo_model: Path) -> None:
    """Calibrates with default settings. ``kv_cache/test_server.py`` has the same check, quickly."""
    arguments = ["--quantization", "smoothquant_plus", "--max-model-len", "512"]
    with serving(demo_model, *arguments) as server:
        check_chat(server.url)
