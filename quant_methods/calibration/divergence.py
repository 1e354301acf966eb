# SPDX-License-Identifier: Apache-2.0
"""The distance between the next-token distributions of a quantized and the original model."""

import torch
from torch import nn

_KL_POSITIONS = 256
_KL_TOP = 128


class NextTokenReference:
    """The original model's next-token distribution at some positions, as its top k tokens.

    Args:
        model: The original ``transformers`` model.
        layers_prefix: Name of its list of decoder layers.
        final: Output of its last layer, [samples, length, hidden].
    """

    def __init__(self, model: nn.Module, layers_prefix: str, final: torch.Tensor) -> None:
        self.norm = model.get_submodule(layers_prefix.rpartition(".")[0]).norm
        self.head = model.get_output_embeddings()
        total = final.shape[0] * final.shape[1]
        self.positions = torch.linspace(0, total - 1, min(total, _KL_POSITIONS)).long()
        log_p = self._log_probabilities(final)
        self.log_p, self.tokens = log_p.topk(min(_KL_TOP, log_p.shape[-1]), dim=-1)

    @torch.no_grad()
    def _log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.flatten(0, 1)[self.positions.to(hidden.device)].to(self.head.weight.device)
        return torch.log_softmax(self.head(self.norm(rows)).float(), dim=-1)

    def divergence(self, hidden: torch.Tensor) -> float:
        """Return the mean KL(original || quantized) in nats per token.

        All tokens outside the top k count as one.

        Args:
            hidden: Output of the last layer of the quantized model, [samples, length, hidden].
        """
        log_q = self._log_probabilities(hidden).gather(-1, self.tokens)
        p = self.log_p.exp()
        rest_p = (1 - p.sum(-1)).clamp(min=1e-9)
        rest_q = (1 - log_q.exp().sum(-1)).clamp(min=1e-9)
        inside = (p * (self.log_p - log_q)).sum(-1)
        return (inside + rest_p * (rest_p / rest_q).log()).mean().item()
