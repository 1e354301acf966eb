# SPDX-License-Identifier: Apache-2.0
"""Routed experts as linears, one for each matrix of a checkpoint.

``transformers`` stacks all experts of a layer in two tensors, where neither hooks nor names reach
one expert.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compress_common.errors import CompressError
from compress_common.structure.saved_names import STACKED, Rows, saved_names

_NAME = re.compile(r"(.+)\.(\d+)\.([^.]+)\.weight")
_PARTS = ("gate", "up", "down")
# What transformers' ``use_experts_implementation`` notes about a stack, and what we support.
_LAYOUT = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
# What vLLM computes in routed experts, also where the config of a mixture names something else.
_ACTIVATION = torch.nn.functional.silu
_TOKENS = 4  # that compare both ways to compute experts
_CLOSE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Expert(nn.Module):
    """One expert: ``down(act(gate(x)) * up(x))``.

    Args:
        names: Of the linears gate, up and down.
        weights: Theirs, [N, K] each.
        act: The activation.
    """

    def __init__(
        self, names: tuple[str, ...], weights: list[torch.Tensor], act: Callable[..., torch.Tensor]
    ) -> None:
        super().__init__()
        self._names, self._act = names, act
        for name, weight in zip(names, weights, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(name, linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the expert for tokens [tokens, hidden]."""
        gate, up, down = (self._modules[name] for name in self._names)
        return down(self._act(gate(x)) * up(x))  # type: ignore[misc, no-any-return]


class Experts(nn.Module):
    """The routed experts of a layer, by index.

    Args:
        experts: In order.

    Attributes:
        count: How many they are.
        chosen: To how many of them a token went in the last call; 0: none yet.
        watch: Called with the arguments ``hidden_states`` and ``top_k_index`` of each call.
        everyone: Whether each expert is shown all tokens. The output stays the same.
    """

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        self.count, self.chosen, self.everyone = len(experts), 0, False
        self.watch: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of what its experts make of each token, [tokens, hidden].

        On the meta device, where no choice is known, each expert gets all tokens.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: Experts of each token, int64 [tokens, chosen].
            top_k_weights: Their weights, [tokens, chosen].
        """
        hidden, chosen, weights = hidden_states, top_k_index, top_k_weights
        self.chosen = chosen.shape[-1]
        if self.watch is not None:
            self.watch(hidden, chosen)
        out = torch.zeros_like(hidden)
        for index, expert in enumerate(self.children()):
            if hidden.is_meta or self.everyone:
                share = torch.where(chosen == index, weights, 0).sum(-1, keepdim=True)
                out = out + (expert(hidden) * share).to(out.dtype)
                continue
            token, place = torch.where(chosen == index)
            if len(token):
                value = expert(hidden[token]) * weights[token, place, None]
                out.index_add_(0, token, value.to(out.dtype))
        return out


@contextmanager
def shown_all(block: nn.Module, everyone: bool) -> Iterator[None]:
    """Show all tokens to each routed expert of a block while the context lasts, if ``everyone``."""
    experts = [module for module in block.modules() if isinstance(module, Experts)]
    for module in experts:
        module.everyone = everyone
    try:
        yield
    finally:
        for module in experts:
            module.everyone = False


def unstack(model: nn.Module) -> None:
    """Replace each stack of experts of a model by linears, which are views of it.

    Modules of a layer with experts get the names that checkpoints give them. A model without stacks
    stays as it is.

    Args:
        model: A ``transformers`` model.

    Raises:
        CompressError: Checkpoints do not hold one matrix for each projection of each expert, or the
            experts compute something else than ``Expert``.
    """
    compared: set[type[nn.Module]] = set()
    stacks = [(name, module) for name, module in model.named_modules() if _is_stack(module)]
    for name, stack in stacks:
        if any(getattr(stack, key, None) != value for key, value in _LAYOUT.items()):
            raise CompressError(
                "its experts have biases, or are not stacked as [gate; up] and [down] by rows, "
                "which is not supported"
            )
        if not _is_silu(stack.act_fn):
            raise CompressError(
                f"its experts have the activation {_described(stack.act_fn)}, where vLLM computes "
                "SiLU"
            )
        layer = re.match(r".*?\.\d+(?=\.)", name)
        places, renamed = saved_names(model, layer[0] if layer else name, name)
        folder, experts = _unstacked(stack, name, places)
        if type(stack) not in compared and not experts.get_parameter(next(_names(experts))).is_meta:
            compared.add(type(stack))
            _compare(stack, experts)
        _put(model, name, experts)
        for before, after in (renamed | {name: folder}).items():
            _rename(model, before, after)


def _is_stack(module: nn.Module) -> bool:
    deep = any(parameter.ndim == STACKED for parameter in module.parameters(recurse=False))
    return deep and "expert" in type(module).__name__.lower()


def _is_silu(act: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether an activation computes SiLU, whatever its class is called."""
    x = torch.linspace(-4, 4, 33)
    return torch.allclose(act(x), _ACTIVATION(x), atol=1e-6)


def _described(act: Callable[..., torch.Tensor]) -> str:
    return str(getattr(act, "__name__", None) or type(act).__name__)


def _names(module: nn.Module) -> Any:
    return (name for name, _ in module.named_parameters())


def _unstacked(stack: Any, name: str, places: dict[str, Rows]) -> tuple[str, Experts]:
    """Return the experts of a stack as linears, and the name that they have in a checkpoint."""
    found: dict[tuple[int, str], torch.Tensor] = {}
    names: dict[str, str] = {}
    folders: set[str] = set()
    for tensor, rows in places.items():
        owner, _, parameter = rows.stack.rpartition(".")
        if owner != name:
            continue
        whole, match = getattr(stack, parameter).detach(), _NAME.fullmatch(tensor)
        height = whole.shape[1]
        part = {
            ("gate_up_proj", 0, height // 2): "gate",
            ("gate_up_proj", height // 2, height): "up",
            ("down_proj", 0, height): "down",
        }.get((parameter, rows.start, rows.stop))
        if match is None or part is None or int(match[2]) != rows.expert:
            raise CompressError(
                f"its checkpoints hold its experts as {tensor}, for one, which is not supported"
            )
        if names.setdefault(part, match[3]) != match[3]:
            raise CompressError(f"its experts have linears with different names, {tensor} for one")
        folders.add(match[1])
        found[rows.expert, part] = whole[rows.expert, rows.start : rows.stop]
    count = 1 + max((expert for expert, _ in found), default=-1)
    if len(folders) != 1 or len(found) != count * len(_PARTS):
        raise CompressError("its checkpoints do not hold gate, up and down of each expert")
    order = tuple(names[part] for part in _PARTS)
    experts = [
        Expert(order, [found[index, part] for part in _PARTS], stack.act_fn)
        for index in range(count)
    ]
    return folders.pop(), Experts(experts)


@torch.no_grad()
def _compare(stack: Any, experts: Experts) -> None:
    """Raise CompressError where linears give other numbers than the stack that they replace."""
    first = next(experts.parameters())
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(_TOKENS, first.shape[1], generator=random) * torch.tensor(
        [[1.0], [8.0]]
    ).repeat(_TOKENS // 2, 1)
    hidden = hidden.to(first)
    chosen = torch.randint(experts.count, (_TOKENS, 1), generator=random).to(first.device)
    weights = torch.ones(_TOKENS, 1).to(first)
    expected = type(stack).forward.__wrapped__(stack, hidden, chosen, weights)
    error = (experts(hidden, chosen, weights) - expected).abs().amax(-1)
    if not bool((error <= _CLOSE[first.dtype] * expected.abs().amax(-1)).all()):
        raise CompressError(
            "its experts compute something else than down(act(gate(x)) * up(x)), which is not "
            "supported"
        )


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    model.get_submodule(parent)._modules[last] = module


def _rename(model: nn.Module, before: str, after: str) -> None:
    """Give a module a name by which the model lists it. The old one goes on to work."""
    parent = model
    for old, new in zip(before.split("."), after.split("."), strict=True):
        if new not in parent._modules:
            children = list(parent._modules.items())
            parent._modules.clear()
            for key, child in children:
                if key == old:
                    parent._modules[new] = child
                parent._modules[key] = child
        parent = parent.get_submodule(new)
