# SPDX-License-Identifier: Apache-2.0
"""What is seen of a model's tensors in one forward pass."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Trace:
    """Where a tensor comes from.

    Attributes:
        value: Number of the value. Tensors that arrange the same numbers in another way share it.
        near: Modules that the tensor depends on. A linear hides what lies before it.
        scaled: Linears whose channels reach the tensor unchanged, but for a factor for each.
    """

    value: int
    near: frozenset[str] = frozenset()
    scaled: frozenset[str] = frozenset()


@dataclass
class Attention:
    """One call of attention.

    Attributes:
        module: Its name.
        query, key, value: Where they come from.
        output: Number of the value that it gives.
        head_dim: Channels of a head of the values.
    """

    module: str
    query: Trace
    key: Trace
    value: Trace
    output: int
    head_dim: int


@dataclass
class Flow:
    """What was seen in a forward pass. Modules are named as the model names them.

    Attributes:
        inputs: ``{linear: what it was given, once for each call}``.
        origins: ``{value: the module that gave it}``.
        uses: ``{value: operators, linears apart, that read its numbers}``.
        attention: Calls of attention.
        layer_inputs, layer_outputs: ``{layer: its hidden states}``.
        layer_extras: ``{layer: names of other arguments that depend on the tokens}``.
        cuts: ``{linear: last dimensions of its output where it was cut into parts}``.
        positional: Layers that are given more than hidden states by position.
        choosers: Modules that choose experts: their output is ranked, or it is more than a tensor.
    """

    inputs: dict[str, list[Trace]] = field(default_factory=dict)
    origins: dict[int, str] = field(default_factory=dict)
    uses: dict[int, set[str]] = field(default_factory=dict)
    cuts: dict[str, set[int]] = field(default_factory=dict)
    attention: list[Attention] = field(default_factory=list)
    layer_inputs: dict[str, Trace] = field(default_factory=dict)
    layer_outputs: dict[str, Trace] = field(default_factory=dict)
    layer_extras: dict[str, list[str]] = field(default_factory=dict)
    positional: set[str] = field(default_factory=set)
    choosers: set[str] = field(default_factory=set)

    def origin(self, trace: Trace) -> str | None:
        """Return the module whose output a tensor is; None: something was computed since."""
        return self.origins.get(trace.value)

    def used(self, value: int) -> set[str]:
        """Return the operators that read a value, linears apart."""
        return self.uses.get(value, set())
