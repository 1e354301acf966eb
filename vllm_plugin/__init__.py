# SPDX-License-Identifier: Apache-2.0
"""The vLLM side: every import of vLLM in this project is in this package."""

SUPPORTED_VLLM = ">=0.32,<0.33"

_registered = False


def register() -> None:
    """Entry point of ``vllm.general_plugins``: runs once in each vLLM process, touches no device.

    Raises RuntimeError on a vLLM version that was not tested.
    """
    global _registered
    if _registered:
        return
    _check_version()
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader

    from vllm_plugin import config_edge, diffusion
    from vllm_plugin.kv_cache import manager
    from vllm_plugin.quantization.config import CONFIGS
    from vllm_plugin.quantization.loader import LOAD_FORMAT, QuantizingLoader

    for config in CONFIGS:
        register_quantization_config(config.method)(config)
    register_model_loader(LOAD_FORMAT)(QuantizingLoader)
    manager.register()
    diffusion.register()
    config_edge.install()
    _registered = True


def _check_version() -> None:
    import vllm
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    if Version(vllm.__version__).base_version not in SpecifierSet(SUPPORTED_VLLM):
        raise RuntimeError(
            f"vllm-compress-plugin was tested with vLLM {SUPPORTED_VLLM}, this is "
            f"{vllm.__version__}: install a matching pair, or set VLLM_PLUGINS to a list without "
            "'compress' to run without it"
        )
