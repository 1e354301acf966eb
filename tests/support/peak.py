# SPDX-License-Identifier: Apache-2.0
"""The most memory that torch holds at once while something runs."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside, as long as they live.

    ``most`` is the largest sum so far. Buffers inside one operation are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._known = set[int]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if _is(x)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if _is(tensor):
                self._count(tensor.untyped_storage(), given)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._known or place in given or not size:
            return
        self._known.add(place)
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self._now -= size


def _is(x: Any) -> bool:
    return isinstance(x, torch.Tensor)
