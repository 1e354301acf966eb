# SPDX-License-Identifier: Apache-2.0
"""Imports the extra ``ray``, or says what to install."""

from importlib import import_module
from types import ModuleType

from compress_common.errors import CompressError


def ray_llm() -> ModuleType:
    """Return the module ``ray.serve.llm``.

    Raises:
        CompressError: it, or something that it needs, is not installed.
    """
    try:
        return import_module("ray.serve.llm")
    except ImportError as error:
        raise CompressError(
            f"Ray Serve cannot be imported ({error}); install what was tested with this vLLM: "
            "pip install 'vllm-compress-plugin[ray]' (not ray[llm], which installs another vLLM)"
        ) from error
