# SPDX-License-Identifier: Apache-2.0
"""A device without a GPU, which sees where a host would wait for it."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Device(TorchDispatchMode):
    """PyTorch's device "meta" in place of a GPU: what a step asks of it, and what makes it wait.

    That is a copy from memory that is not pinned or not dense, as ``vllm.utils.gpu_sync_debug`` has
    it, and an operation on the device that is given a tensor on the host. Tensors of this device
    have no numbers, so that reading one, or making a mask an index, raises an error.

    Attributes:
        operations: Names of what is asked of the device, without views.
        copies: Copies from pinned memory.
        waits: Names of what makes the host wait.
        pinned: What was allocated in pinned memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.copies = 0
        self.waits: list[str] = []
        self.pinned: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.pop("pin_memory", False):  # for which PyTorch needs a GPU
            made = func(*args, **kwargs)
            self.pinned.append(made)
            return made
        made = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, made)) if isinstance(x, torch.Tensor)]
        here = [x for x in tensors if x.device.type == "cpu"]
        if len(here) == len(tensors) or func.is_view:
            return made
        name = func.overloadpacket.__name__
        self.operations.append(name)
        if name in ("_to_copy", "copy_"):
            asked = args[2:] if name == "copy_" else [kwargs.get("non_blocking", False)]
            queued = any(asked) and all(map(self._queued, here))
            self.copies += bool(here and queued)
            waits = bool(here and not queued)
        else:
            waits = any(x.dim() for x in here)  # a number goes with the launch of a kernel
        self.waits += [name] * waits
        return made

    def _queued(self, x: torch.Tensor) -> bool:
        pinned = {known.untyped_storage().data_ptr() for known in self.pinned}
        return x.is_contiguous() and x.untyped_storage().data_ptr() in pinned


class Counted(Device):
    """A device whose tensors can be read: a flag is True, and every number is 0.

    Attributes:
        ups: Shapes of what is copied to the device.
        downs: Shapes of what is copied back.
        reads: How often the host reads one number, and so waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ups: list[tuple[int, ...]] = []
        self.downs: list[tuple[int, ...]] = []
        self.reads = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        source = args[-1] if name == "copy_" else args[0] if args else None
        if isinstance(source, torch.Tensor) and source.device.type == "meta":
            if name == "_local_scalar_dense":
                self.reads += 1
                return source.dtype == torch.bool
            if name == "_to_copy" and torch.device(kwargs.get("device", "meta")).type == "cpu":
                self.downs.append(tuple(source.shape))
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            if name == "copy_" and args[0].device.type == "cpu":
                self.downs.append(tuple(source.shape))
                return args[0].zero_()
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if name in ("_to_copy", "copy_") and source.device.type == "cpu" != made.device.type:
            self.ups.append(tuple(source.shape))
        return made
