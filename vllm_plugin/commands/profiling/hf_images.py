# SPDX-License-Identifier: Apache-2.0
"""A model of images and text in transformers, measured on chats with images."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from compress_common.calibration.placement import HOST
from compress_common.checkpoints.local import load_processor
from compress_common.errors import CompressError
from compress_common.progress import Progress
from quant_methods.calibration.images import MADE, ImageSettings, image_chats, model_inputs
from vllm_plugin.commands.profiling.hf_model import HFModel


class HFImageModel(HFModel):
    """A checkpoint that is measured on chats with images, which its own processor prepares.

    Args:
        model: A model folder or hub id.
        images: The calibration chats.
        least: Tokens that a chat must have.

    Raises:
        CompressError: There is no such model, it does not take images, its processor is missing, or
            a chat cannot be read or is too short or too long.
    """

    def __init__(self, model: str, images: ImageSettings, least: int) -> None:
        self.images = images
        self._open(model)
        if not hasattr(self.config, "wrapper"):
            raise CompressError(
                f"{self.name} ({self.config.model_type}) is a model of text alone; leave --images "
                "out, and give a text with --text"
            )
        processor = load_processor(self.checkpoint.folder)
        chats, self._digest = image_chats(images)
        token = getattr(self.config.wrapper, "image_token_id", None)
        self._inputs = [model_inputs(chat, processor, token) for chat in chats]
        self._lengths = [inputs["input_ids"].shape[1] for inputs in self._inputs]
        limit = getattr(self.config, "max_position_embeddings", None) or max(self._lengths)
        for chat, length in zip(chats, self._lengths, strict=True):
            if not least <= length <= limit:
                raise CompressError(
                    f"{chat.where} has {length} tokens; for this share and this model it must have "
                    f"{least} to {limit}"
                )

    @property
    def token_count(self) -> int:
        return sum(self._lengths)

    def network(self, progress: Progress, device: torch.device = HOST, **options: Any) -> Any:
        """Load the whole model in the checkpoint's dtype; arguments as for ``HFModel``."""
        progress("load model", 0, 1)
        network = self._load(AutoModelForImageTextToText, dtype="auto", **options).eval()
        self.checkpoint.check_unchanged()
        return network.to(device)

    def inputs(self, network: Any, progress: Progress) -> list[dict[str, torch.Tensor]]:
        return self._inputs

    def origin(self) -> dict[str, Any]:
        made = self.images.source == MADE
        name = f"pictures, seed {self.images.seed}" if made else Path(self.images.source).name
        return self._made_now(name, self._digest, max(self._lengths))
