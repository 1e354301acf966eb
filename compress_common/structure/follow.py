# SPDX-License-Identifier: Apache-2.0
"""Follow tensors through one forward pass of a model: what feeds each linear.

The model lies on the meta device, so no number is computed and no weight takes memory.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress_common.structure.flow import Attention, Flow, Trace

ATTENTION = "vllm_compress_followed"  # in transformers' AttentionInterface
_TOKENS = 8
# Operators that only arrange the numbers of their input.
_ARRANGE = frozenset(
    ("view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze", "permute", "transpose", "t")
    + ("clone", "_to_copy", "detach", "alias", "slice", "copy_", "lift_fresh")
)
_SCALE = frozenset(("mul", "mul_"))
_RANK = frozenset(("topk", "sort", "argsort"))
_CUT = frozenset(("slice", "split", "split_with_sizes", "select", "unbind", "index"))
# Operators that take a shape or a type from their input, and none of its numbers.
_IGNORE = frozenset(("empty_like", "zeros_like", "ones_like", "new_empty", "new_zeros", "new_ones"))


def is_router(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix of its own, and does more with the result."""
    weight = module._parameters.get("weight")
    plain = isinstance(module, (nn.Linear, nn.Embedding))
    return not plain and weight is not None and weight.ndim == 2  # noqa: PLR2004 (outputs, inputs)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with one weight for each channel."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1


class _Follower(TorchDispatchMode):
    """Marks tensors with traces while a model runs."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = Flow()
        self.traces: dict[int, Trace] = {}
        self.alive: list[torch.Tensor] = []  # a tensor's id is its own while the tensor lives
        self.values = 0
        self.inside = 0  # modules whose operators are not looked at

    def of(self, tensor: torch.Tensor) -> Trace:
        """Return the trace of a tensor, a new one if it has none."""
        return self.traces.get(id(tensor)) or self.mark(tensor)

    def mark(
        self,
        tensor: torch.Tensor,
        near: frozenset[str] = frozenset(),
        scaled: frozenset[str] = frozenset(),
    ) -> Trace:
        """Give a tensor a value of its own."""
        self.values += 1
        return self.put(tensor, Trace(self.values, near, scaled))

    def put(self, tensor: torch.Tensor, trace: Trace) -> Trace:
        """Give a tensor a trace."""
        self.alive.append(tensor)
        self.traces[id(tensor)] = trace
        return trace

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":  # the number that a branch asks for: there is none
            return {torch.bool: False}.get(args[0].dtype, 0)
        out = func(*args, **(kwargs or {}))
        if self.inside or name in _IGNORE:
            return out
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        traces = [self.traces[id(t)] for t in given if id(t) in self.traces]
        if not traces:
            return out
        near = frozenset().union(*(trace.near for trace in traces))
        if name in _RANK:
            self.flow.choosers |= near
        scaled: frozenset[str] = frozenset()
        if name in _SCALE:
            scaled = scaled.union(*(trace.scaled for trace in traces))
        for result in tree_leaves(out):
            if not isinstance(result, torch.Tensor):
                continue
            first = given[0] if name != "copy_" else given[-1]
            if name in _ARRANGE and result.numel() == first.numel() and id(first) in self.traces:
                self.put(result, self.traces[id(first)])
                continue
            self.mark(result, near, scaled)
            origin = self.flow.origin(traces[0])
            if name in _CUT and origin is not None:
                self.flow.cuts.setdefault(origin, set()).add(first.shape[-1])
            for trace in traces:
                self.flow.uses.setdefault(trace.value, set()).add(name)
        return out


@contextmanager
def _watched(model: nn.Module, layers: str, follower: _Follower) -> Iterator[None]:
    """Mark what modules give, and note what linears and layers get, while the context lasts."""
    flow = follower.flow

    def enter(name: str, linear: bool) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
            trace = follower.of(tensor)
            if linear:
                flow.inputs.setdefault(name, []).append(trace)
            else:
                flow.uses.setdefault(trace.value, set()).add("norm")
            follower.inside += 1

        return hook

    def leave(name: str, linear: bool) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            follower.inside -= 1
            tensor = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
            own = frozenset((name,))
            if not isinstance(out, torch.Tensor):
                flow.choosers.add(name)
                for part in tree_leaves(out):
                    follower.mark(part, own)
                return
            trace = (
                follower.mark(out, own, own)
                if linear
                else follower.mark(out, own | follower.of(tensor).near)
            )
            flow.origins[trace.value] = name

        return hook

    def layer_enter(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, *rest = [*args, *([kwargs["hidden_states"]] if not args else [])]
            flow.layer_inputs[name] = follower.of(hidden)
            if rest:
                flow.positional.add(name)
            extras = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            flow.layer_extras[name] = [
                key
                for key, value in extras.items()
                if any(
                    follower.traces[id(t)].near
                    for t in tree_leaves(value)
                    if isinstance(t, torch.Tensor) and id(t) in follower.traces
                )
            ]

        return hook

    def layer_leave(name: str) -> Any:
        def hook(_: nn.Module, args: Any, out: Any) -> None:
            value = out[0] if isinstance(out, tuple) else out
            flow.layer_outputs[name] = follower.of(value)

        return hook

    def embedded(name: str) -> Any:
        def hook(_: nn.Module, args: Any, out: Any) -> None:
            flow.origins[follower.mark(out, frozenset((name,))).value] = name

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            handles = []
            linear = isinstance(module, nn.Linear) or is_router(module)
            if linear or is_norm(module):
                handles = [
                    module.register_forward_pre_hook(enter(name, linear), with_kwargs=True),
                    module.register_forward_hook(leave(name, linear), with_kwargs=True),
                ]
            elif isinstance(module, nn.Embedding):
                handles = [module.register_forward_hook(embedded(name))]
            elif name.rpartition(".")[0] == layers and name.rpartition(".")[2].isdigit():
                handles = [
                    module.register_forward_pre_hook(layer_enter(name), with_kwargs=True),
                    module.register_forward_hook(layer_leave(name)),
                ]
            for handle in handles:
                stack.callback(handle.remove)
        yield


def unfollowed(*args: Any, **kwargs: Any) -> Any:
    """Stand for attention until ``follow`` runs the model."""
    raise RuntimeError("this model is to be followed, not run")


@torch.no_grad()
def follow(model: nn.Module, layers: str) -> Flow:
    """Run a model once on a few tokens, and return what was seen.

    Args:
        model: A ``transformers`` causal language model on the meta device, made with
            ``attn_implementation=ATTENTION``.
        layers: Name of its list of decoder layers.
    """
    follower, names = _Follower(), {id(module): name for name, module in model.named_modules()}

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Stand for all of attention, whose output scales the channels of the values."""
        given = follower.of(query), follower.of(key), follower.of(value)
        samples, heads, length, _ = query.shape
        out = query.new_empty(samples, length, heads, value.shape[-1])
        near = frozenset().union(*(trace.near for trace in given))
        trace = follower.mark(out, near, given[2].scaled)
        name = names.get(id(module), "")
        call = Attention(name, *given, output=trace.value, head_dim=value.shape[-1])
        follower.flow.attention.append(call)
        return out, None

    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention)
    tokens = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    try:
        with _watched(model, layers, follower), follower:
            model(input_ids=tokens, use_cache=False)
    finally:
        AttentionInterface.register(ATTENTION, unfollowed)  # lets go of all that was followed
    return follower.flow
