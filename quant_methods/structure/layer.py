# SPDX-License-Identifier: Apache-2.0
"""One decoder layer, as it was seen in a forward pass: linears, units, folds and attention."""

from typing import Any

from torch import nn

from compress_common.errors import CompressError
from quant_methods.structure.flow import Flow, Trace
from quant_methods.structure.norms import norm_offset, passes_rotation
from quant_methods.structure.structure import Attention, Fold, Linear, Unit


class Layer:
    """One decoder layer, in the names that its modules have there.

    Args:
        model: The whole.
        name: Of the layer.
        flow: What was seen.
    """

    def __init__(self, model: nn.Module, name: str, flow: Flow) -> None:
        self.flow, self.prefix = flow, f"{name}."
        self.module = model.get_submodule(name)
        self.entry = flow.layer_inputs[name]
        self.inputs = {
            linear.removeprefix(self.prefix): calls[0]
            for linear, calls in flow.inputs.items()
            if linear.startswith(self.prefix)
        }
        self.attention = self._attention()
        linears: list[Linear] = []
        for linear in self.inputs:
            rows = {done.name for done in linears if done.row_parallel}
            linears.append(self._linear(linear, rows))
        self.linears = tuple(linears)
        self.rotates = self._rotates()

    @property
    def content(self) -> tuple[Any, ...]:
        """What all layers must have in common."""
        return self.linears, self.attention, self.folds(), self.rotates

    def _own(self, name: str | None) -> str | None:
        """Return the name of a module of this layer; None: it is none."""
        inside = name is not None and name.startswith(self.prefix)
        return name.removeprefix(self.prefix) if inside and name is not None else None

    def _from_hidden(self, trace: Trace) -> str | None:
        """Return the norm that gave a tensor out of the hidden states; "": it is them."""
        if trace.value == self.entry.value:
            return ""
        origin = self._own(self.flow.origin(trace))
        return origin if origin is not None and origin not in self.inputs else None

    def _linear(self, name: str, rows: set[str]) -> Linear:
        trace, module = self.inputs[name], self.module.get_submodule(name)
        shares = next(n for n, other in self.inputs.items() if other.value == trace.value)
        # A linear that reads what a column-parallel one gives closes a pair. Others lie between.
        row = any(near in self.inputs and near not in rows for near in map(self._own, trace.near))
        return Linear(name, module.out_features, module.in_features, shares, row)  # type: ignore[arg-type]

    def units(self) -> tuple[Unit, ...]:
        """Return linears that share an input and a parent, by short and unique names."""
        groups: dict[tuple[str, str], list[str]] = {}
        for linear in self.linears:
            key = linear.shares, linear.name.rpartition(".")[0]
            groups.setdefault(key, []).append(linear.name)
        short = {key: _short(names) for key, names in groups.items()}
        names = list(short.values())
        return tuple(
            Unit(
                short[key]
                if names.count(short[key]) == 1
                else f"{key[1].rpartition('.')[2]}_{short[key]}",
                tuple(group),
            )
            for key, group in groups.items()
        )

    def folds(self) -> tuple[Fold, ...]:
        """Return the candidates, in the order in which their consumers run."""
        found: dict[str, Fold] = {}
        for linear in self.linears:
            trace = self.inputs[linear.name]
            if linear.shares != linear.name:
                continue
            consumers = tuple(n.name for n in self.linears if n.shares == linear.name)
            if norm := self._from_hidden(trace):
                offset = norm_offset(self.module.get_submodule(norm))
                if offset is not None and not self.flow.used(trace.value):
                    found[linear.name] = Fold(norm, consumers, True, offset)
            elif producer := self._producer(trace):
                head_dim = self.attention.head_dim
                size = self.module.get_submodule(producer).out_features
                repeat, rest = divmod(linear.inputs, int(size))  # type: ignore[arg-type]
                if not rest:
                    dims = head_dim if repeat > 1 else 1
                    found[linear.name] = Fold(producer, consumers, False, 0.0, repeat, dims)
        return tuple(found.values())

    def _producer(self, trace: Trace) -> str | None:
        """Return the only linear whose channels a tensor scales; None: there is none, or two."""
        names = [name for name in map(self._own, trace.scaled) if name is not None]
        return names[0] if len(names) == 1 and names[0] in self.inputs else None

    def _attention(self) -> Attention:
        calls = [call for call in self.flow.attention if self._own(call.module) is not None]
        if len(calls) != 1:
            raise CompressError(
                f"its layers go {len(calls)} times through transformers' AttentionInterface, not "
                "once"
            )
        call = calls[0]

        def role(trace: Trace) -> str | None:
            names = [n for n in map(self._own, trace.near) if n in self.inputs]
            return names[0] if len(names) == 1 else None

        query, key, value = role(call.query), role(call.key), role(call.value)
        if query is None or key is None or value is None:
            raise CompressError(
                "its queries, keys and values do not come from one linear each, or all from one"
            )
        if query in (key, value):
            size = self.module.get_submodule(query).out_features
            if self.flow.cuts.get(self.prefix + query) != {size}:
                raise CompressError(
                    f"{query} gives queries, keys and values head by head, which the loaders of "
                    "vLLM put in another order"
                )
        readers = [name for name, trace in self.inputs.items() if trace.value == call.output]
        near = call.query.near | call.key.near
        return Attention(
            module=str(self._own(call.module)),
            norm=self._from_hidden(self.inputs[query]) or None,
            query=query,
            key=key,
            value=value,
            output=readers[0] if len(readers) == 1 else None,
            key_norms=any(self._own(name) not in self.inputs for name in near),
            head_dim=call.head_dim,
        )

    def _rotates(self) -> bool:
        """Whether hidden states are only read by norms that a rotation passes, and only added to.

        Each linear either reads such a norm, or writes into the hidden states.
        """
        for linear in self.linears:
            trace, name = self.inputs[linear.name], self.prefix + linear.name
            if linear.row_parallel:
                value = next(v for v, origin in self.flow.origins.items() if origin == name)
                if self.flow.used(value) - {"add", "add_"}:
                    return False
                continue
            norm = self._from_hidden(trace)
            if not norm or self.flow.used(trace.value):
                return False
            if not passes_rotation(self.module.get_submodule(norm)):
                return False
        return True


def _short(names: list[str]) -> str:
    """Return a name for a unit: ``qkv`` of q_proj, k_proj and v_proj, ``gate_up``."""
    parts = [name.rpartition(".")[2].removesuffix("_proj") for name in names]
    return ("" if all(len(part) == 1 for part in parts) else "_").join(parts)
