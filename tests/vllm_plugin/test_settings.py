# SPDX-License-Identifier: Apache-2.0
"""Sections of ``--additional-config`` that were meant for us are never passed over in silence."""

from typing import Any

import pytest

from compress_common.errors import CompressError
from vllm_plugin.settings import Settings, parse_settings

KV = {"policy": "snap_kv", "keep": 0.25}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"comprss": {"kv": KV}}, "'comprss'; did you mean 'compress'?"),
        ({"compres": {}}, "did you mean 'compress'?"),
        ({"Compress": {"kv": KV}}, "did you mean 'compress'?"),
        ({"vllm_compress": {"kv": KV}}, "did you mean 'compress'?"),
        ({"compression": {"weights": {}}}, "did you mean 'compress'?"),
        ({"compress_kv": KV}, "did you mean 'compress'?"),
        ({"kv": KV}, "'kv' at its top level; put it into 'compress'"),
        ({"kv": {"policy": "snapkv", "keep": 0.25}}, "'kv' at its top level"),
        ({"compressor": {"kv": KV}}, "did you mean 'compress'?"),
        ({"weights": {"alpha": 0.5}}, "'weights' at its top level"),
        ({"diffusion": {"policy": "elastic"}}, "'diffusion' at its top level"),
        (
            {"compress": KV},
            "setting 'policy' (valid: weights, kv, diffusion, metrics); it is a setting of",
        ),
        ({"compress": {"kw": KV}}, "unknown setting 'kw'; did you mean 'kv'?"),
        ({"compress": [KV]}, "must be an object"),
    ],
)
def test_near_misses_are_refused(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(CompressError) as caught:
        parse_settings(given)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"ascend_scheduler_config": {"enabled": True}, "weight_prefetch_config": {}},
        {"kv": {"connector": "other"}, "weights": 3, "compression": {"level": 2}},
        {"gdn_prefill_backend": "triton", 1: {}},
        {"compressor": {"level": 3}, "compressed": {}, "decompress": {"threads": 2}},
        {"kv": {"policy": "lru"}},
        {"kv": {"policy": "lru", "keep": 0.5, "ttl": 60}},
        {"weights": {"alpha": 0.5, "path": "s3://bucket"}},
        {"diffusion": {"policy": "ddim", "scheduler": "karras"}},
        None,
        "text",
    ],
)
def test_sections_of_others_are_left_alone(given: Any) -> None:
    assert parse_settings(given) == Settings()


def test_unknown_keys_do_not_hide_other_problems() -> None:
    section = {
        "kv": {"polici": 1, "policy": "snap_kv", "keep": 25, "window": "wide", "levels": 9},
        "diffusion": {"policy": "elastic", "gama": 1, "gamma": "x", "threshold": 7},
    }
    with pytest.raises(CompressError) as caught:
        parse_settings({"compress": section})
    told = str(caught.value)
    for part in (
        "unknown setting 'polici'; did you mean 'policy'?",
        "compress.kv.keep",
        "compress.kv.levels",
        "snap_kv.window",
        "unknown setting 'gama'; did you mean 'gamma'?",
        "elastic.gamma",
        "compress.diffusion.threshold",
    ):
        assert part in told, part
    assert len(caught.value.problems) >= 6
