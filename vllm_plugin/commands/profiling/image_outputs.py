# SPDX-License-Identifier: Apache-2.0
"""What the layers of a decoder make of chats with images."""

import torch

from compress_common.calibration.precision import computed_in
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent
from vllm_plugin.commands.profiling.attention_capture import on_device
from vllm_plugin.commands.profiling.hf_images import HFImageModel


def check_tokens(subject: HFImageModel, wanted: int) -> None:
    """Raise CompressError when the chats have fewer tokens than are wanted."""
    if subject.token_count < wanted:
        raise CompressError(
            f"{subject.images.samples} chats with images have {subject.token_count} tokens, and "
            f"{wanted} are wanted; raise --image-samples, or lower `tokens` or `image_share`"
        )


@torch.no_grad()
def image_outputs(
    subject: HFImageModel, most: int, device: str = "cpu", progress: Progress = silent
) -> list[torch.Tensor]:
    """Return the outputs of each decoder layer, [tokens, hidden] each, on the host.

    The whole model computes them in transformers, its towers and projectors included.

    Args:
        subject: The model with its chats.
        most: Tokens, drawn from all chats; the same ones in each layer.
        device: Where the model runs, with all of its weights: a name, or "auto".
        progress: Told of each chat.

    Raises:
        CompressError: The device has too little memory, or transformers cannot load the model.
    """
    place = subject.placement(device, whole=True)
    network = subject.network(progress, place.model)
    network.to(computed_in(subject.checkpoint.weight_bytes, place.device))
    chosen = torch.randperm(subject.token_count, generator=torch.Generator().manual_seed(0))[:most]
    layers = network.get_decoder().layers
    seen: list[torch.Tensor | tuple[torch.Tensor, ...]] = []
    hooks = [layer.register_forward_hook(lambda *call: seen.append(call[2])) for layer in layers]
    found: list[list[torch.Tensor]] = [[] for _ in layers]
    inputs, start = subject.inputs(network, progress), 0
    try:
        for number, chat in enumerate(inputs):
            progress("chats with images", number, len(inputs))
            seen.clear()
            network.base_model(**on_device(chat, network), use_cache=False)
            length = chat["input_ids"].shape[1]
            here = chosen[(chosen >= start) & (chosen < start + length)] - start
            start += length
            for outputs, output in zip(found, seen, strict=True):
                hidden = output[0] if isinstance(output, tuple) else output
                outputs.append(hidden[0, here.to(hidden.device)].cpu())
    finally:
        for hook in hooks:
            hook.remove()
    progress("chats with images", len(inputs), len(inputs))
    return [torch.cat(outputs) for outputs in found]
