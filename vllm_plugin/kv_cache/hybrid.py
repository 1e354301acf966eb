# SPDX-License-Identifier: Apache-2.0
"""Blocks of hybrids: models in which some layers keep a state, and some keys and values.

vLLM draws both from one pool of blocks, so a block must be as large as a state. It finds that size
once the model is loaded, and then changes the block size. Windows are whole blocks, and so is what
a prompt keeps. So the size is found at the config edge already, by vLLM's own arithmetic.
"""

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from compress_common.errors import CompressError
from vllm_plugin.kv_cache.backends import FULL


def settle_block_size(config: VllmConfig) -> None:
    """Give the config of a hybrid's engine the block size that vLLM will serve it with.

    Args:
        config: vLLM's own, of this engine, after the choice of a backend; changed in place.

    Raises:
        CompressError: vLLM has no size for this model's states.
    """
    model = config.model_config
    if not model.is_hybrid:
        return
    attention, cache = config.attention_config, config.cache_config
    on_cpu = current_platform.is_cpu()
    backend = attention.backend_per_kind.get(FULL, attention.backend)
    if backend is None:
        backend = AttentionBackendEnum.CPU_ATTN if on_cpu else AttentionBackendEnum.TRITON_ATTN
    kind = backend.get_class()
    if not on_cpu and not cache.user_specified_block_size:  # as ``update_block_size_for_backend``
        with set_current_vllm_config(config):
            cache.block_size = kind.get_preferred_block_size(cache.DEFAULT_BLOCK_SIZE)
    try:
        current_platform._align_hybrid_block_size(config, kind)
    except Exception as error:  # of a model's own code, where its config is not as it expects
        raise CompressError(
            f"vLLM does not tell how large a state of {model.model} is: {error}; remove compress.kv"
        ) from error


def served_block_size(model: str, block_size: int) -> int:
    """Find the tokens of a block that vLLM serves a hybrid with. No weights are read.

    Args:
        model: a folder.
        block_size: tokens of a block before it is made as large as a state.

    Raises:
        CompressError: vLLM refuses the model.
    """
    args = EngineArgs(
        model=model, block_size=block_size, load_format="dummy", skip_tokenizer_init=True
    )
    try:
        config = args.create_engine_config()
        settle_block_size(config)
    except CompressError:
        raise
    except Exception as error:  # vLLM raises many types
        raise CompressError(f"vLLM refuses {model}: {error}") from error
    return config.cache_config.block_size
