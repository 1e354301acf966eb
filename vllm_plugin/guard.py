# SPDX-License-Identifier: Apache-2.0
"""What is left of the plugin where it cannot run: it refuses engines that ask for compression.

Imports nothing of ours but ``exits``: it also serves when another folder hides our packages.
"""

from collections.abc import Collection
from functools import wraps
from typing import Any

from vllm_plugin.exits import end_command

# Names that a user of this plugin writes down. Equal to those in ``settings`` and ``quantization``,
# which cannot be imported here.
SECTION = "compress"
METHODS = ("smoothquant_plus", "rtn", "rsq", "fireq")


def install(reason: str, methods: Collection[str] | None = None) -> None:
    """Wrap ``EngineArgs.create_engine_config``: refuse what names us, leave the rest to vLLM.

    Args:
        reason: why the plugin cannot run, and what to do about it.
        methods: vLLM's own quantization methods, where some of ours were registered before the
            plugin failed; None: vLLM knows only its own.
    """
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config

    @wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if asked := what_asks(self, methods):
            error = RuntimeError(f"{asked} needs vllm-compress-plugin, which is disabled: {reason}")
            end_command(error)
            raise error
        return original(self, *args, **kwargs)

    EngineArgs.create_engine_config = create_engine_config


def what_asks(args: Any, methods: Collection[str] | None = None) -> str | None:
    """Find the engine argument that asks for this plugin.

    Args:
        args: the engine arguments.
        methods: as for ``install``.

    Returns:
        The argument as text; None if no argument asks.
    """
    additional = getattr(args, "additional_config", None)
    if isinstance(additional, dict) and additional.get(SECTION):
        return f"--additional-config {SECTION}"
    method = getattr(args, "quantization", None)
    if method in METHODS and method not in (_known_to_vllm() if methods is None else methods):
        return f"--quantization {method}"
    return None


def _known_to_vllm() -> list[str]:
    """The quantization methods of this vLLM: other versions can have one of our names."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    return list(QUANTIZATION_METHODS)
