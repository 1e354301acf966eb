# SPDX-License-Identifier: Apache-2.0
"""vLLM's rotary embedding, put on keys by its own kernel and taken off by ours."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from compress_common.errors import CompressError
from kv_policies.latents.rope import Rope
from vllm_plugin.kv_cache.latent import rope_of

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def model(parameters: dict[str, object], neox: bool = True) -> torch.nn.Module:
    """A layer ``attn`` beside a rotary embedding, as models have it."""
    with set_current_vllm_config(VllmConfig()):
        rotary = get_rope(
            32,
            max_position=512,
            is_neox_style=neox,
            rope_parameters={"rope_theta": 10000.0} | parameters,
            dtype=torch.float32,
        )
    layer = torch.nn.Module()
    layer.rotary_emb, layer.attn = rotary, torch.nn.Identity()
    return torch.nn.ModuleDict({"layer": layer})


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("parameters", [{"rope_type": "default"}, LLAMA3])
def test_what_the_model_does_is_done_and_undone(parameters: dict[str, object], neox: bool) -> None:
    network = model(parameters, neox)
    rope = rope_of(network, "layer.attn")
    positions, keys = torch.randint(512, (50,)), torch.randn(50, 2, 32)
    _, turned = network["layer"].rotary_emb.forward_native(
        positions, torch.zeros(50, 64), keys.flatten(1).clone()
    )
    turned = turned.view(50, 2, 32)
    torch.testing.assert_close(rope.rotate(keys.clone(), positions), turned)
    torch.testing.assert_close(Rope(rope.table, neox).rotate(keys.clone(), positions), turned)
    torch.testing.assert_close(rope.unrotate(turned, positions), keys)


def test_rotations_that_cannot_be_undone_are_refused() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    with pytest.raises(CompressError, match="YaRN.*cskv can undo RotaryEmbedding"):
        rope_of(model(yarn), "layer.attn")
    layer = torch.nn.ModuleDict({"layer": torch.nn.ModuleDict({"attn": torch.nn.Identity()})})
    with pytest.raises(CompressError, match="NoneType"):
        rope_of(layer, "layer.attn")
