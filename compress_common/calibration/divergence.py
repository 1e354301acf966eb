# SPDX-License-Identifier: Apache-2.0
"""The distance between the next-token distributions of a quantized and the original model."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from compress_common.errors import CompressError
from compress_common.structure.structure import Structure

_KL_POSITIONS = 256
_KL_TOP = 128


def logits_of(model: nn.Module, structure: Structure) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what turns outputs of the last layer into float32 logits, as the model does.

    Raises:
        CompressError: What stands between the last layer and the head is not known.
    """
    if structure.norm is None:
        raise CompressError(
            f"{structure.model_type} has no norm with a weight in front of its head, so the loss "
            "of its next token cannot be measured; use a setting and a method that search nothing"
        )
    norm, head = model.get_submodule(structure.norm), model.get_output_embeddings()  # type: ignore[operator]
    config: Any = model.config
    # Cohere multiplies, Granite divides, Gemma 2 caps.
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        found = head(norm(hidden)).float() * scale
        return found if cap is None else torch.tanh(found / cap) * cap

    return logits


class NextTokenReference:
    """The original model's next-token distribution at some positions, as its top k tokens.

    Args:
        model: The original ``transformers`` model.
        structure: Of the model.
        final: Output of its last layer, [samples, length, hidden].
        positions: How many, spread evenly; None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        final: torch.Tensor,
        positions: int | None = _KL_POSITIONS,
    ) -> None:
        self.logits = logits_of(model, structure)
        self.device = model.get_output_embeddings().weight.device  # type: ignore[operator]
        total = final.shape[0] * final.shape[1]
        self.positions = torch.linspace(0, total - 1, min(total, positions or total)).long()
        parts = [
            log_p.topk(min(_KL_TOP, log_p.shape[-1]), dim=-1)
            for log_p in self._log_probabilities(final)
        ]
        self.log_p = torch.cat([part.values for part in parts])
        self.tokens = torch.cat([part.indices for part in parts])

    @torch.no_grad()
    def _log_probabilities(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield them for a few positions at a time: a whole vocabulary of each is large."""
        rows = hidden.flatten(0, 1)[self.positions.to(hidden.device)].to(self.device)
        for part in rows.split(_KL_POSITIONS):
            yield torch.log_softmax(self.logits(part), dim=-1)

    def divergence(self, hidden: torch.Tensor) -> float:
        """Return the mean KL(original || quantized) in nats per token.

        All tokens outside the top k count as one.

        Args:
            hidden: Output of the last layer of the quantized model, [samples, length, hidden].
        """
        tokens = self.tokens.split(_KL_POSITIONS)
        rows = zip(self._log_probabilities(hidden), tokens, strict=True)
        log_q = torch.cat([log_p.gather(-1, chosen) for log_p, chosen in rows])
        p = self.log_p.exp()
        rest_p = (1 - p.sum(-1)).clamp(min=1e-9)
        rest_q = (1 - log_q.exp().sum(-1)).clamp(min=1e-9)
        inside = (p * (self.log_p - log_q)).sum(-1)
        return (inside + rest_p * (rest_p / rest_q).log()).mean().item()
