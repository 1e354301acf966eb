# SPDX-License-Identifier: Apache-2.0
"""A step in parts is the step as a whole, and takes no more memory than is set aside."""

import numpy as np
import pytest
import torch

from dllm_denoising import memory
from dllm_denoising.base import Observation
from dllm_denoising.denoiser import Denoiser
from dllm_denoising.memory import StepMemory
from dllm_denoising.registry import build_policy
from dllm_denoising.settings import Decoding
from tests.support.peak import Peak
from vllm_plugin.diffusion.batch import prepare
from vllm_plugin.diffusion.inputs import StepInputs
from vllm_plugin.diffusion.prediction import predictions
from vllm_plugin.diffusion.probe import Probe
from vllm_plugin.diffusion.running import Running
from vllm_plugin.kv_cache.pages import Pages

VOCABULARY, LAYERS, HEADS, KV_HEADS, DIM, BLOCK = 900, 3, 4, 2, 16, 8
MASK = VOCABULARY - 1
SIZES = StepMemory(VOCABULARY, HEADS * DIM, 4, HEADS, KV_HEADS, DIM)


def inputs() -> StepInputs:
    return StepInputs(1 << 20, torch.device("cpu"))


def running(prompt: int, length: int, first: int, over: str, **how: float) -> Running:
    """A request at its second step, which tracks a few positions."""
    denoiser = Denoiser(
        list(range(prompt)),
        length,
        Decoding(window_length=9),
        build_policy("elastic", {"similarity": over, "track": 3}),
        mask=MASK,
        layers=LAYERS,
        **how,  # type: ignore[arg-type]
    )
    count = len(denoiser.plan.active)
    attended = np.random.default_rng(first).integers(0, prompt, (LAYERS, 3))
    seen = Observation(np.full(LAYERS, 1.0), attended)
    denoiser.advance(np.full(count, 0.95), np.arange(count), seen)
    blocks = -(-(prompt + length) // BLOCK)
    return Running.of(denoiser, list(range(first, first + blocks)), BLOCK)


def batch() -> list[Running]:
    """Ragged, some sampled, similarities of both kinds."""
    return [
        running(5, 20, 1, "row"),
        running(60, 40, 10, "heads", temperature=0.7, seed=1),
        running(9, 12, 30, "row", temperature=0.7, seed=2),
        running(33, 30, 40, "heads"),
    ]


@pytest.mark.parametrize("most", [1, 4, 7, 1000])
def test_predictions_in_parts(most: int) -> None:
    requests = batch()
    prepared = prepare(requests, LAYERS, inputs())
    torch.manual_seed(0)
    hidden = torch.randn(len(prepared.tokens), HEADS * DIM)
    head = torch.randn(HEADS * DIM, VOCABULARY)
    with Peak() as peak:
        found = predictions(requests, hidden, prepared.active, lambda x: x @ head, MASK, most)
    whole = predictions(batch(), hidden, prepared.active, lambda x: x @ head, MASK, 10**6)
    assert found is not None and whole is not None
    assert found.shape == (2, len(prepared.active)) and found.dtype == torch.float64
    assert torch.allclose(found[0], whole[0], rtol=1e-5) and torch.equal(found[1], whole[1])
    rest = 1 << 14  # what is returned
    assert peak.most < SIZES.predicted_row * min(most, len(prepared.active)) * 1.01 + rest


def test_ranks_without_logits_predict_nothing() -> None:
    requests = batch()
    prepared = prepare(requests, LAYERS, inputs())
    hidden = torch.zeros(len(prepared.tokens), 4)
    assert predictions(requests, hidden, prepared.active, lambda x: None, MASK, 4) is None


def cache() -> list[Pages]:
    torch.manual_seed(3)
    found = []
    for _ in range(LAYERS):
        raw = torch.randn(60, KV_HEADS, BLOCK, 2 * DIM)

        def write(
            key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, raw: torch.Tensor = raw
        ) -> None:
            raw[slots // BLOCK, :, slots % BLOCK] = torch.cat((key, value), -1)

        found.append(Pages.of(raw, KV_HEADS, BLOCK, DIM, write))
    return found


def watch(requests: list[Running]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """What a step shows, and the most memory of watching it."""
    prepared = prepare(requests, LAYERS, inputs())
    pages = cache()
    probe = Probe(requests, prepared, pages, SIZES, HEADS, lambda x: x)
    torch.manual_seed(4)
    queries, keys = (
        torch.randn(LAYERS, len(prepared.tokens), heads * DIM) for heads in (HEADS, KV_HEADS)
    )
    past = torch.randn(LAYERS, len(probe.tracked[0]), HEADS * DIM)
    with Peak() as peak:
        for layer in range(LAYERS):
            probe.see(layer, queries[layer], keys[layer], past[layer])
    return *probe.seen(), peak.most


def test_attention_is_watched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    similarity, attended, most = watch(batch())
    assert similarity.isfinite().all() and attended.shape == (4, LAYERS, 3)
    assert most <= SIZES.most(1000, 4, 104, watches=True)
    for keys, probabilities in ((1, 1), (1, 20_000), (60_000, 20_000), (1 << 20, 50_000)):
        monkeypatch.setattr(memory, "KEYS", keys)
        monkeypatch.setattr(memory, "PROBABILITIES", probabilities)
        monkeypatch.setattr(memory, "LOGITS", 1)
        parts, places, part_most = watch(batch())
        torch.testing.assert_close(parts, similarity)
        assert torch.equal(places, attended)
        rest = 1 << 14  # what is returned, and indices
        assert part_most < min(most, SIZES.most(1000, 4, 104, watches=True) + rest)
