# SPDX-License-Identifier: Apache-2.0
"""A model that is not there, for files that are made for one."""

from typing import Any

from kv_policies.model_file import ModelFingerprint


def fingerprint(**changes: Any) -> ModelFingerprint:
    """A tiny Llama of 3 layers and 16 features in each key and value."""
    values: dict[str, Any] = {
        "name": "tiny",
        "architecture": "LlamaForCausalLM",
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 100,
    }
    return ModelFingerprint(**(values | changes))
