# SPDX-License-Identifier: Apache-2.0
"""Derive the structure of a decoder from its config: no table of models, no weight is read."""

import copy
import json
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compress_common.errors import CompressError, joined
from compress_common.structure.experts import Experts, unstack
from compress_common.structure.flow import Flow
from compress_common.structure.follow import ATTENTION, follow, is_norm, is_router, unfollowed
from compress_common.structure.layer import Layer
from compress_common.structure.layer_structure import LayerStructure, Linear
from compress_common.structure.norms import passes_rotation
from compress_common.structure.structure import Structure
from compress_common.structure.wrapper import decoder_class, towers_of

_LATENT = "multi-head latent attention (MLA) was not served with int4 weights beside it"
_SHOWN = 3
_found: dict[str, Structure | list[str]] = {}


def structure_of(config: Any) -> Structure:
    """Return the structure of a model that is to be quantized.

    Args:
        config: The language model's ``transformers`` config: see ``language_config``.

    Raises:
        CompressError: Lists everything that keeps the model from being quantized.
    """
    problems: list[str] = []
    if getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method", "unknown")
        problems.append(
            f"the checkpoint is already quantized ({method}); give the original 16-bit one"
        )
    found = _known(config)
    if isinstance(found, list):
        problems = found + problems
    if problems:
        raise joined(problems)
    assert isinstance(found, Structure)
    return found


def known_structure(config: Any) -> Structure | None:
    """Return the structure of a model that may be quantized already; None: it cannot be."""
    found = _known(config)
    return found if isinstance(found, Structure) else None


def _known(config: Any) -> Structure | list[str]:
    """Return the structure, or what is wrong. Each config is followed once in a process."""
    content = {k: v for k, v in config.to_dict().items() if k != "quantization_config"}
    key = json.dumps([type(config).__name__, content], sort_keys=True, default=str)
    if key not in _found:
        try:
            _found[key] = _derived(config)
        except CompressError as error:
            _found[key] = error.problems
    return _found[key]


def _derived(config: Any) -> Structure:
    kind = f"model_type {getattr(config, 'model_type', None)!r} is not supported"
    if getattr(config, "kv_lora_rank", None):
        raise CompressError(f"{kind}: {_LATENT}")
    try:
        decoder_class(config)
    except CompressError as error:
        raise CompressError(f"{kind}: {error}") from error
    if not getattr(config, "num_hidden_layers", None):
        raise CompressError(f"{kind}: its config does not say how many layers it has")
    model = build(config)
    try:
        unstack(model)
        found = derive(model, config)
        if (whole := getattr(config, "wrapper", None)) is None:
            return found
        towers = towers_of(whole, type(model.get_submodule(found.backbone)))
        # What towers add to the hidden states is not rotated with them.
        return replace(found, towers=towers, rotates=False)
    except CompressError as error:
        raise joined([f"{kind}: {problem}" for problem in error.problems]) from error


def build(config: Any) -> nn.Module:
    """Return the ``transformers`` model of a config on the meta device, ready to be followed.

    Raises:
        CompressError: There is none.
    """
    from transformers import AttentionInterface

    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    AttentionInterface.register(ATTENTION, unfollowed)
    try:
        with torch.device("meta"):
            model = decoder_class(config)._from_config(config, attn_implementation=ATTENTION)
    except (
        *(ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError),
        CompressError,
    ) as error:
        reason = str(error).strip().splitlines()[0]
        if ATTENTION in reason:  # the model looks it up in a table of its own
            reason = "its attention does not go through transformers' AttentionInterface"
        raise CompressError(
            f"model_type {getattr(config, 'model_type', None)!r} is not supported: transformers "
            f"cannot build a language model of its config ({reason[:200]})"
        ) from error
    return model.eval()  # type: ignore[no-any-return]


def layers_of(model: nn.Module, depth: int) -> str:
    """Return the name of the list of decoder layers: the largest list of that many modules.

    Raises:
        CompressError: There is none.
    """
    lists = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    }
    if not lists:
        raise CompressError(f"it has no list of {depth} decoder layers")
    return max(lists, key=lists.__getitem__)


def derive(model: nn.Module, config: Any) -> Structure:
    """Return the structure of a model.

    Args:
        model: As ``build`` returns it, after ``unstack``.
        config: Its config.

    Raises:
        CompressError: Lists what keeps it from being quantized.
    """
    layers = layers_of(model, config.num_hidden_layers)
    try:
        flow = follow(model, layers)
    except Exception as error:  # anything that a model's own code can raise
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        raise CompressError(f"it cannot be followed ({reason})") from error
    _check_layers(model, layers, flow)
    latent = bool(getattr(config, "kv_lora_rank", None))
    found = [
        Layer(model, f"{layers}.{index}", flow, latent) for index in range(config.num_hidden_layers)
    ]
    kinds, pattern = _kinds(found)
    first, head = found[0], model.get_output_embeddings()  # type: ignore[operator]
    names = {id(module): name for name, module in model.named_modules()}
    if id(head) not in names or len(flow.inputs.get(names[id(head)], ())) != 1:
        raise CompressError("it has no head that gives logits")
    head_name = names[id(head)]
    norm = flow.origin(flow.inputs[head_name][0])
    last = None if norm is None else model.get_submodule(norm)
    return Structure(
        model_type=str(config.model_type),
        layers=layers,
        kinds=kinds,
        pattern=pattern,
        hidden=config.hidden_size,
        norm=norm if last is not None and is_norm(last) else None,
        head=head_name,
        embedding=names[id(model.get_input_embeddings())],  # type: ignore[operator]
        attention=first.attention,
        rotates=all(layer.rotates for layer in found)
        and last is not None
        and is_norm(last)
        and passes_rotation(last),
        others=tuple(
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and not name.startswith(f"{layers}.")
            and name != head_name
        ),
        predicting=int(getattr(config, "num_nextn_predict_layers", None) or 0),
    )


def _kinds(layers: list[Layer]) -> tuple[tuple[LayerStructure, ...], tuple[int, ...]]:
    """Return the kinds of layers, and that of each.

    Raises:
        CompressError: They differ in more than whether they have experts.
    """
    kinds: list[LayerStructure] = []
    pattern: list[int] = []
    known: dict[str, tuple[int, Linear]] = {}
    for index, layer in enumerate(layers):
        found = layer.structure()
        if found not in kinds:
            kinds.append(found)
        pattern.append(kinds.index(found))
        for linear in found.linears:
            other, same = known.setdefault(linear.name, (index, linear))
            if same != linear:
                raise CompressError(f"its layers {other} and {index} have different linears")
        mixed = any(kind.experts is not None for kind in kinds)
        if layer.attention != layers[0].attention or len(kinds) > 1 + mixed:
            raise CompressError(f"its layers 0 and {index} have different linears")
    return tuple(kinds), tuple(pattern)


def _check_layers(model: nn.Module, layers: str, flow: Flow) -> None:
    """Raise CompressError where layers have weights that are no linears, or more than one input."""
    problems: list[str] = []
    stack = model.get_submodule(layers)
    linear = {id(m.weight) for m in stack.modules() if isinstance(m, nn.Linear)}
    if any(isinstance(module, Experts) for module in stack.modules()):
        linear |= {id(p) for m in stack.modules() if is_router(m) for p in m.parameters()}
    strange = sorted(
        {
            name.partition(".")[2]
            for name, parameter in stack.named_parameters()
            if parameter.ndim > 1 and id(parameter) not in linear
        }
    )
    if strange:
        problems.append(f"its layers have weights that are not linears: {_listed(strange)}")
    count = {name: len(calls) for name, calls in flow.inputs.items()}
    odd = sorted(
        {
            name.partition(".")[2]
            for name, module in stack.named_modules()
            if isinstance(module, nn.Linear) and count.get(f"{layers}.{name}") != 1
        }
    )
    if odd and not problems:
        problems.append(f"linears that do not run once in a pass: {_listed(odd)}")
    if extras := sorted({name for names in flow.layer_extras.values() for name in names}):
        problems.append(
            f"its layers are given more than hidden states that depends on the tokens: "
            f"{_listed(extras)}"
        )
    if flow.positional:
        problems.append("its layers are given more than hidden states by position")
    names = [f"{layers}.{index}" for index in range(len(stack))]  # type: ignore[arg-type]
    for before, after in zip(names, names[1:], strict=False):
        given, wanted = flow.layer_inputs.get(after), flow.layer_outputs.get(before)
        if given is None or wanted is None or given.value != wanted.value:
            problems.append(f"{after} does not read what {before} gives")
            break
    if problems:
        raise joined(problems)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
