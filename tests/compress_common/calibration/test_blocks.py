# SPDX-License-Identifier: Apache-2.0
"""What blocks give does not depend on how many samples run through them at once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.collectors import Energies, Grams, Maxima
from compress_common.structure.derive import structure_of
from tests.support.plans import load

TOKENS = torch.randint(0, 1000, (3, 96), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_chunks_change_nothing(tiny_model: Callable[..., Path], family: str) -> None:
    """Outputs and statistics of one sample at a time, of two and one, and of all at once."""
    model = load(tiny_model(family), torch.float32)
    weights = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for samples in (1, 2, 3):
        blocks = Blocks(
            model, structure_of(model.config), TOKENS, chunk_tokens=samples * TOKENS.shape[1]
        )
        hidden, values = blocks.inputs(), {}
        for index in range(len(blocks)):
            names = blocks.structure.names
            collectors = Maxima(names), Energies(names), Grams(names)
            hidden = blocks.run(index, hidden, collectors, weights)
            for collector in collectors:
                assert set(collector.tokens.values()) == {TOKENS.numel()}
                for name in names:
                    values[type(collector).__name__, index, name] = collector.value(name)
            values["output", index, ""] = hidden
        found.append(values)
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for key, whole in found[2].items():
        for parts in found[:2]:
            torch.testing.assert_close(parts[key], whole, rtol=1e-4, atol=1e-4, msg=str(key))
