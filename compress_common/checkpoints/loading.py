# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to a ``transformers`` model that calibration can run."""

import copy
import gc
from collections.abc import Iterable
from typing import Any

import torch

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.parts import trim_heap
from compress_common.calibration.placement import HOST, Placement
from compress_common.calibration.precision import WHOLE
from compress_common.calibration.residency import widen
from compress_common.calibration.stages import Stages
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from compress_common.structure.derive import structure_of
from compress_common.structure.experts import unstack
from compress_common.structure.structure import Structure
from compress_common.structure.wrapper import decoder_class


def check_decoder(checkpoint: Checkpoint) -> None:
    """Raise CompressError when the tensors are not those of a decoder that can be quantized."""
    config = checkpoint.hf_config
    structure = structure_of(config)
    problem = decoder_problem(checkpoint.decoder_files(), structure)
    if problem := problem or _shape_problem(checkpoint, structure):
        raise CompressError(f"{checkpoint.folder} cannot be quantized: {problem}")


def decoder_problem(names: Iterable[str], structure: Structure) -> str | None:
    """Say why the tensors of a checkpoint are not those of a supported decoder; None: they are.

    Args:
        names: Of all tensors of the checkpoint.
        structure: Of the model that its config describes.
    """
    have, prefix, layers = set(names), structure.layers, structure.depth
    endings = tuple(f".{name}.weight" for name in structure.names)
    wanted = {
        f"{prefix}.{index}.{name}.weight"
        for index in range(layers)
        for name in (*structure.layer(index).names, *structure.layer(index).kept)
    }
    behind = tuple(f"{prefix}.{layers + index}." for index in range(structure.predicting))
    linears = {
        name
        for name in have
        if name.startswith(f"{prefix}.") and name.endswith(endings) and not name.startswith(behind)
    }
    if not any(name.startswith(f"{prefix}.") for name in have):
        if any(".attention.wq." in name for name in have):
            return (
                "its weights have Mistral's own names (consolidated.safetensors), which are not "
                "quantized; serve a repository with Hugging Face files (model*.safetensors) and "
                "--load-format hf --config-format hf --tokenizer-mode hf"
            )
        first = min(have, default="none")
        return f"its tensors are not named {prefix}.*, {first} for one: this is not supported"
    if missing := sorted(wanted - have):
        return (
            f"it lacks {len(missing)} of {len(wanted)} weights, {missing[0]} for one: it is "
            "incomplete, or its config is that of another model"
        )
    if unknown := sorted(linears - wanted):
        return (
            f"it has {len(unknown)} linears that its config of {layers} layers does not name, "
            f"{unknown[0]} for one; give the config that belongs to the weights"
        )
    return None


def _shape_problem(checkpoint: Checkpoint, structure: Structure) -> str | None:
    """Say which weight has another shape than the config gives it; None: none has."""
    config, names = checkpoint.hf_config, checkpoint.names
    found = {names.inner(name): entry for name, entry in checkpoint.shapes().items()}
    wanted = {
        f"{structure.layers}.{index}.{name}.weight": shape
        for index in range(structure.depth)
        for name, shape in structure.layer(index).shapes.items()
    }
    wanted[f"{structure.embedding}.weight"] = (
        config.vocab_size,
        config.hidden_size,
    )
    for name, shape in wanted.items():
        if name in found and found[name][0] != tuple(shape):
            return (
                f"{names.outer(name)} has the shape {list(found[name][0])}, and its config gives "
                f"it {list(shape)}; give the config that belongs to the weights"
            )
    if structure.towers and not (config.tie_word_embeddings or names.head):
        return f"it has no {structure.head}.weight, and its config ties it to no embedding"
    return None


def calibration_blocks(
    checkpoint: Checkpoint,
    model: Any,
    tokens: torch.Tensor,
    placement: Placement,
    stages: Stages,
    dtype: torch.dtype | None,
) -> Blocks:
    """Return the decoder of a loaded model, with calibration tokens.

    Args:
        checkpoint: What the model was loaded from.
        model: As ``load_model`` returns it.
        tokens: int64 [samples, length].
        placement: What computes, and where hidden states lie.
        stages: Where finished parts are kept.
        dtype: What calibration computes in; None: the model's own type.
    """
    config = checkpoint.hf_config
    served = torch.float16 if config.dtype == torch.float16 else torch.bfloat16
    structure = structure_of(config)
    device, states = placement.device, placement.states
    served = dtype and served
    return Blocks(
        model, structure, tokens, device, stages, dtype=served, states=states, computed=dtype
    )


def release(device: torch.device) -> None:
    """Give the memory of a calibration that is over back to the host and the device."""
    gc.collect()
    trim_heap()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    device: torch.device = HOST,
    *,
    linear_experts: bool = True,
    **options: Any,
) -> Any:
    """Return the ``transformers`` model of exactly the checkpoint's files and config.

    Of a wrapped model that is the language model alone.

    Args:
        checkpoint: The files.
        dtype: What it computes in; None: its own type. A model of more than ``precision.WHOLE``
            bytes stays as it is, and modules are converted one at a time.
        device: Where the model lies.
        linear_experts: Whether routed experts become linears, which a plan knows them as.
        **options: For ``from_pretrained``.
    """
    config = _with_window(checkpoint.hf_config)
    kind = decoder_class(config)
    widened = dtype is not None and checkpoint.weight_bytes > WHOLE
    loaded = "auto" if dtype is None or widened else dtype
    names = checkpoint.names
    found = ((names.inner(n), tensor) for n, tensor in checkpoint.verified_tensors().items())
    state = {name: tensor for name, tensor in found if name is not None}
    if not checkpoint.has_head:
        structure = structure_of(config)
        state = {n: t for n, t in state.items() if n.startswith(f"{structure.backbone}.")}
        # Nothing reads the head that the class has, and transformers would invent one.
        state[f"{structure.head}.weight"] = state[f"{structure.embedding}.weight"]
    try:
        model = kind.from_pretrained(None, config=config, state_dict=state, dtype=loaded, **options)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise CompressError(
            f"transformers cannot build the model of {checkpoint.folder} ({reason}); its config is "
            "damaged, or is that of another model"
        ) from error
    if linear_experts:
        unstack(model)
        _keep_mapped(model, structure_of(config), state)
    if dtype is not None and widened:
        widen(model, structure_of(config), dtype)
    return model.eval().to(device)


def _with_window(config: Any) -> Any:
    """Give a config the window back that vLLM takes away where no layer uses it.

    Some models make a mask for it all the same.
    """
    full = set(getattr(config, "layer_types", None) or ()) == {"full_attention"}
    if not full or getattr(config, "sliding_window", 0) is not None:
        return config
    config = copy.copy(config)
    config.sliding_window = config.max_position_embeddings
    return config


def _keep_mapped(model: Any, structure: Structure, state: dict[str, torch.Tensor]) -> None:
    """Let routed experts use the mapped tensors of the files, and free the stacks of them.

    Raises:
        CompressError: An expert has other weights than the tensor of its name.
    """
    for index in range(structure.depth):
        for name in structure.layer(index).routed:
            full = f"{structure.layers}.{index}.{name}"
            linear = model.get_submodule(full)
            tensor = state[f"{full}.weight"].to(linear.weight.dtype)
            if not torch.equal(tensor, linear.weight):
                raise CompressError(
                    f"transformers loads other weights as {full} than its checkpoint has there; "
                    "this is not supported"
                )
            linear.weight = torch.nn.Parameter(tensor, requires_grad=False)
