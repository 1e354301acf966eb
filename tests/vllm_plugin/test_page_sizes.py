# SPDX-License-Identifier: Apache-2.0
"""Blocks of models whose full attention has other heads than their windows."""

from typing import Any

import pytest
from transformers import Gemma3TextConfig, Gemma4TextConfig

from compress_common.errors import CompressError
from vllm_plugin.compatibility import kv_model_problems
from vllm_plugin.kv_fingerprint import fingerprint_of
from vllm_plugin.page_sizes import block_sizes

# Gemma 4 31B: 16 heads of 256 in windows, 4 of 512 in full attention.
LARGE: dict[str, Any] = {
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": 4,
    "attention_k_eq_v": True,
}


@pytest.mark.parametrize(
    ("fields", "ranks", "sizes"),
    [
        ({}, 1, (64, 32)),
        ({}, 4, (64, 32)),
        ({}, 8, (32, 32)),  # a rank has one head of 512, and two of 256
        ({"attention_k_eq_v": False}, 1, (32, 64)),
        ({"num_global_key_value_heads": 8}, 1, (32, 32)),
    ],
)
def test_pages_are_made_equal(fields: dict[str, Any], ranks: int, sizes: tuple[int, int]) -> None:
    config = Gemma4TextConfig(**LARGE | fields)
    assert block_sizes(config, 32, ranks) == sizes
    assert kv_model_problems(config) == []


def test_models_with_one_size_of_heads_have_one_size_of_blocks() -> None:
    assert block_sizes(Gemma3TextConfig(), 32) == (32, 32)


def test_pages_that_no_whole_number_of_tokens_makes_equal_are_refused() -> None:
    config = Gemma4TextConfig(**LARGE | {"num_global_key_value_heads": 3})
    with pytest.raises(CompressError, match="1536 numbers in .* and 4096 in the others"):
        block_sizes(config, 32)


def test_a_fingerprint_has_the_heads_of_full_attention() -> None:
    found = fingerprint_of("a", Gemma4TextConfig(**LARGE))
    assert (found.num_key_value_heads, found.head_dim, found.num_attention_heads) == (4, 512, 32)
