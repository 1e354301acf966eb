# SPDX-License-Identifier: Apache-2.0
"""The vLLM side: every import of vLLM in this project is in this package."""

import logging
from multiprocessing import parent_process

SUPPORTED_VLLM = ">=0.32,<0.34"
KEY = "compress"  # our section of --additional-config

logger = logging.getLogger("vllm.vllm_plugin")  # under vLLM's own, or it is not shown

_registered = False
_disabled: str | None = None
# The quantization methods of vLLM before any of ours was registered; None: none of ours was.
_vllm_methods: tuple[str, ...] | None = None


def register() -> None:
    """Entry point of ``vllm.general_plugins``: runs once in each vLLM process, touches no device.

    Never raises. Where the plugin cannot run (another version of vLLM, a package of ours that
    cannot be imported), one line in the log says why. An engine that asks for compression is then
    refused with that reason; all others run as if the plugin were not installed.
    """
    global _registered, _disabled
    if _registered:
        return
    _registered = True
    try:
        _disabled = _other_version()
        if _disabled is None:
            _register_all()
    except Exception as error:  # whatever it is, it must not end an engine that does not use us
        _disabled = f"{type(error).__name__}: {error}"
    if _disabled is not None:
        _disable(_disabled)


def why_disabled() -> str | None:
    """Why ``register`` left the plugin disabled; None if it runs, or was not registered yet."""
    return _disabled


def _register_all() -> None:
    # All imports come first: when one fails, nothing is registered.
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )
    from vllm.model_executor.model_loader import register_model_loader

    from vllm_plugin import config_edge, diffusion
    from vllm_plugin.kv_cache import manager
    from vllm_plugin.quantization.config import CONFIGS
    from vllm_plugin.quantization.loader import LOAD_FORMAT, QuantizingLoader

    global _vllm_methods
    _vllm_methods = tuple(QUANTIZATION_METHODS)
    for config in CONFIGS:
        register_quantization_config(config.method)(config)
    register_model_loader(LOAD_FORMAT)(QuantizingLoader)
    manager.register()
    diffusion.register()
    config_edge.install()


def _disable(reason: str) -> None:
    if parent_process() is None:  # the engine's children would repeat it
        logger.warning("vllm-compress-plugin is disabled: %s", reason)
    try:
        from vllm_plugin import guard

        guard.install(reason, _vllm_methods)
    except Exception as error:
        logger.warning("vllm-compress-plugin cannot refuse what asks for it: %s", error)


def _other_version() -> str | None:
    """Why this version of vLLM is not supported; None if it is."""
    import vllm
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    if Version(vllm.__version__).base_version in SpecifierSet(SUPPORTED_VLLM):
        return None
    return (
        f"it was tested with vLLM {SUPPORTED_VLLM}, this is {vllm.__version__}; install a matching "
        "pair, or set VLLM_PLUGINS to a list without 'compress' to run without it"
    )
