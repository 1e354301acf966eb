# SPDX-License-Identifier: Apache-2.0
"""A profile without a calibration run: what a layer keeps does not matter to the mechanics."""

from fractions import Fraction
from pathlib import Path

import pytest

from kv_policies.profile import Profile, Provenance
from vllm_plugin.kv_fingerprint import fingerprint_of, full_attention_layers


def save_profile(model: Path, path: Path, keep: Fraction, levels: int) -> Path:
    """Shares from half of ``keep`` in the first layers to one and a half of it in the last."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    layers = full_attention_layers(config)
    count = len(layers)
    fractions = [keep / 2 + keep * Fraction(at, count - 1) for at in range(count)]
    Profile(
        model=fingerprint_of("test", config),
        keep=keep,
        levels=levels,
        layers=layers,
        fractions=tuple(fractions),
        provenance=Provenance(
            tool_version="test", created="2026-11-25", text="none", samples=1, sample_tokens=1
        ),
    ).save(path)
    return path


@pytest.fixture(scope="session")
def profile(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep 0.25 in three levels, for the demo model."""
    path = tmp_path_factory.mktemp("profile") / "kv.json"
    return save_profile(demo_model, path, Fraction(1, 4), 3)
