# SPDX-License-Identifier: Apache-2.0
"""KV caches in FP8: tokens are moved bit for bit, and scored as the numbers that the bits mean."""

from dataclasses import dataclass
from typing import Any

import torch

# vLLM's names of the types that hold a number in a byte and have a scale per layer. The cache is
# bytes; e4m3 is what CUDA and x86 mean by "fp8".
FP8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Quantized:
    """What the bytes of an FP8 cache stand for: FP8 numbers times a scale.

    Attributes:
        stored: The FP8 type.
        numbers: What the model computes in.
        scales: Of keys and of values, float32 [1] or []: vLLM can fill them later.
    """

    stored: torch.dtype
    numbers: torch.dtype
    scales: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of_layer(cls, layer: Any) -> "Quantized | None":
        """How an attention layer of vLLM quantizes its cache; None: it does not."""
        stored = FP8.get(layer.kv_cache_dtype)
        return stored and cls(stored, layer.dtype, (layer._k_scale, layer._v_scale))

    def keys(self, stored: torch.Tensor) -> torch.Tensor:
        """Keys of any shape, uint8, as numbers."""
        return self._numbers(stored, self.scales[0])

    def values(self, stored: torch.Tensor) -> torch.Tensor:
        """Values of any shape, uint8, as numbers."""
        return self._numbers(stored, self.scales[1])

    def _numbers(self, stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        # In place, and with a scale on the device: no second copy, no wait.
        return stored.view(self.stored).to(self.numbers).mul_(scale.to(self.numbers))


def plain_queries(query: torch.Tensor, layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Queries as numbers. With an FP8 cache some kernels get them as FP8, divided by a scale."""
    if query.dtype.itemsize > 1:
        return query
    return query.to(dtype).mul_(layer._q_scale.to(dtype))
