# SPDX-License-Identifier: Apache-2.0
"""One decoder layer, as it was seen in a forward pass: linears, units, folds and attention."""

from torch import nn

from compress_common.errors import CompressError
from compress_common.structure.experts import Experts as StackedExperts
from compress_common.structure.flow import Attention as Call
from compress_common.structure.flow import Flow, Trace
from compress_common.structure.follow import is_router
from compress_common.structure.layer_structure import (
    Attention,
    Experts,
    Fold,
    LayerStructure,
    Linear,
    Unit,
)
from compress_common.structure.norms import norm_offset, passes_rotation


class Layer:
    """One decoder layer, in the names that its modules have there.

    Args:
        model: The whole.
        name: Of the layer.
        flow: What was seen.
        latent: Whether attention is latent (MLA): vLLM folds its linears into attention, so they
            stay at 16 bits.
    """

    def __init__(self, model: nn.Module, name: str, flow: Flow, latent: bool = False) -> None:
        self.flow, self.prefix = flow, f"{name}."
        self.module = model.get_submodule(name)
        self.entry = flow.layer_inputs[name]
        self.inputs = {
            linear.removeprefix(self.prefix): calls[0]
            for linear, calls in flow.inputs.items()
            if linear.startswith(self.prefix)
        }
        self._first_reader: dict[int, str] = {}
        self._nears: dict[int, set[str]] = {}
        for linear, trace in self.inputs.items():
            self._first_reader.setdefault(trace.value, linear)
        call = self._attention_call()
        self.attention = None if latent else self._attention(call)
        self._latent = f"{self._own(call.module)}." if latent else None
        self.experts = self._experts()
        self.kept = tuple(
            linear
            for linear in self.inputs
            if self._is_gate(linear) or (self._latent and linear.startswith(self._latent))
        )
        linears: list[Linear] = []
        for linear in self.inputs:
            if linear not in self.kept:
                rows = {done.name for done in linears if done.row_parallel}
                linears.append(self._linear(linear, rows))
        self.linears = tuple(linears)
        self.rotates = not self.kept and self.experts is None and self._rotates()

    def structure(self) -> LayerStructure:
        """Return what was found."""
        return LayerStructure(self.linears, self.units(), self.folds(), self.kept, self.experts)

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
        # A linear that reads what a column-parallel one gives closes a pair. Others lie between.
        row = bool(self._near(trace) - rows)
        shares = self._first(name)
        return Linear(name, module.out_features, module.in_features, shares, row)  # type: ignore[arg-type]

    def _near(self, trace: Trace) -> set[str]:
        """Return the linears of this layer, without those kept, that a tensor depends on."""
        if trace.value not in self._nears:  # hundreds of experts read one tensor
            own = {name for name in map(self._own, trace.near) if name is not None}
            self._nears[trace.value] = own & (set(self.inputs) - set(self.kept))
        return self._nears[trace.value]

    def _first(self, name: str) -> str:
        """Return the first linear or gate with the same input."""
        return self._first_reader[self.inputs[name].value]

    def _experts(self) -> Experts | None:
        for name, module in self.module.named_modules():
            if isinstance(module, StackedExperts):
                return Experts(name, module.count, module.chosen)
        return None

    def _is_gate(self, name: str) -> bool:
        """Whether a linear chooses experts, or gives one number to weigh them with."""
        module = self.module.get_submodule(name)
        if self.experts is None:
            return False
        chooses = self.prefix + name in self.flow.choosers
        return chooses or is_router(module) or module.out_features == 1

    def _is_routed(self, name: str) -> bool:
        return self.experts is not None and name.startswith(f"{self.experts.module}.")

    def units(self) -> tuple[Unit, ...]:
        """Return linears that share an input and a parent, by short and unique names.

        The routed experts are one unit: vLLM multiplies all of them by one kernel.
        """
        groups: dict[tuple[str, str], list[str]] = {}
        start = "" if self.experts is None else f"{self.experts.module}."
        for linear in self.linears:
            key = linear.shares, linear.name.rpartition(".")[0]
            if self._is_routed(linear.name):
                key = start, start
            groups.setdefault(key, []).append(linear.name)
        short = {key: _short(names) for key, names in groups.items()}
        if (start, start) in short:
            short[start, start] = start[:-1].rpartition(".")[2]
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
        """Return the candidates, in the order in which their consumers run.

        Not those inside an expert: a sample that does not reach it proves nothing of it.
        """
        found: list[Fold] = []
        for shares in dict.fromkeys(linear.shares for linear in self.linears):
            consumers = [linear for linear in self.linears if linear.shares == shares]
            names = tuple(linear.name for linear in consumers)
            kept = tuple(name for name in self.kept if self._first(name) == shares)
            trace, inputs = self.inputs[shares], consumers[0].inputs
            if norm := self._from_hidden(trace):
                offset = norm_offset(self.module.get_submodule(norm))
                if offset is not None and not self.flow.used(trace.value):
                    found.append(Fold(norm, names + kept, True, offset))
            elif (producer := self._producer(trace)) and not self._is_routed(producer):
                head_dim = 1 if self.attention is None else self.attention.head_dim
                size = self.module.get_submodule(producer).out_features
                repeat, rest = divmod(inputs, int(size))  # type: ignore[arg-type]
                if not rest:
                    dims = head_dim if repeat > 1 else 1
                    found.append(Fold(producer, names, False, 0.0, repeat, dims))
        return tuple(found)

    def _producer(self, trace: Trace) -> str | None:
        """Return the only linear whose channels a tensor scales; None: there is none, or two."""
        names = [name for name in map(self._own, trace.scaled) if name is not None]
        return names[0] if len(names) == 1 and names[0] in self.inputs else None

    def _attention_call(self) -> Call:
        calls = [call for call in self.flow.attention if self._own(call.module) is not None]
        if len(calls) != 1:
            raise CompressError(
                f"its layers go {len(calls)} times through transformers' AttentionInterface, not "
                "once"
            )
        return calls[0]

    def _attention(self, call: Call) -> Attention:
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
