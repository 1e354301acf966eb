# SPDX-License-Identifier: Apache-2.0
"""A model in transformers, for the commands that measure it before it is served."""

import hashlib
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from compress_common.calibration.placement import HOST, Placement, chosen_device, placed, sizes_of
from compress_common.calibration.text import SELF, CalibrationSettings, check_length, file_tokens
from compress_common.calibration.texts import stored_tokens
from compress_common.checkpoints.checkpoint import Checkpoint, resolve
from compress_common.checkpoints.loading import check_decoder, load_model
from compress_common.errors import CompressError, joined
from compress_common.progress import Progress
from compress_common.structure.derive import known_structure
from compress_common.structure.wrapper import language_config
from vllm_plugin.commands.profiling.attention_capture import ATTENTION, not_reached
from vllm_plugin.kv_fingerprint import fingerprint_of, full_attention_layers


class HFModel:
    """A checkpoint that is measured with transformers. The weights are loaded on request.

    Args:
        model: A model folder or hub id.
        text: The calibration text.

    Attributes:
        name: The hub id, or the name of the folder.
        checkpoint: Its files.
        config: The transformers config of its language model, without overrides.
        layers: Indices of the layers with full attention, ascending.
        fingerprint: What ties a file to this model.

    Raises:
        CompressError: There is no such model, it does not suit, or the file of text is missing,
            cannot be read or is too short.
    """

    def __init__(self, model: str, text: CalibrationSettings) -> None:
        given = text.source != SELF
        if given:
            path = Path(text.source).expanduser()
            text = text.model_copy(update={"source": str(path)})
        self.text = text
        self._open(model)
        check_length(text, self.config)
        # A bad file is refused before the weights are loaded.
        self._tokens = file_tokens(text, self.checkpoint.tokenizer) if given else None
        self._text_digest = hashlib.sha256(path.read_bytes()).hexdigest() if given else None

    def _open(self, model: str) -> None:
        """Read everything but the weights and the text."""
        folder = resolve(model)
        self.name = folder.resolve().name if Path(model).expanduser().is_dir() else model
        self.checkpoint = Checkpoint(folder)  # says what is wrong with the files
        whole = self._load(AutoConfig)
        self.config = language_config(whole)
        self.layers = _layers_to_measure(self.name, whole)
        self.fingerprint = fingerprint_of(self.name, self.config, self.checkpoint.weights_digest)

    @property
    def token_count(self) -> int:
        """Tokens of all samples."""
        return self.text.samples * self.text.length

    def placement(self, device: str, *, whole: bool) -> Placement:
        """Return where a measurement keeps what.

        Args:
            device: What computes: a name, or "auto".
            whole: Whether it needs the whole model on the device.

        Raises:
            CompressError: The device cannot be used, or has too little free memory.
        """
        sizes = sizes_of(self.config, self.checkpoint.weight_bytes, self.token_count)
        return placed(chosen_device(device, lambda: sizes, whole=whole), sizes, whole=whole)

    def network(self, progress: Progress, device: torch.device = HOST, **options: Any) -> Any:
        """Load the model in the checkpoint's dtype, of a wrapped one the language model alone.

        Args:
            progress: Told before the load, which may take minutes.
            device: Where the model lies.
            **options: For ``from_pretrained``.

        Raises:
            CompressError: transformers cannot load it, or the files have changed since they were
                hashed.
        """
        progress("load model", 0, 1)
        if hasattr(self.config, "wrapper") and known_structure(self.config) is not None:
            check_decoder(self.checkpoint)
            return load_model(self.checkpoint, None, device, linear_experts=False, **options)
        network = self._load(AutoModelForCausalLM, dtype="auto", **options).eval()
        self.checkpoint.check_unchanged()
        return network.to(device)

    def tokens(self, network: Any, progress: Progress) -> torch.Tensor:
        """Return the calibration text as token ids, int64 [samples, length].

        Text that the model samples is stored, so that the next measurement need not sample it.

        Args:
            network: Samples the text, unless it is in a file. Its dtype is part of the key.
            progress: Told of each step of sampling.
        """
        if self._tokens is not None:
            return self._tokens
        dtype = network.dtype if network.dtype == torch.float32 else None
        return stored_tokens(self.checkpoint, self.text, network, progress, dtype)

    def inputs(self, network: Any, progress: Progress) -> list[dict[str, torch.Tensor]]:
        """Return what ``network`` takes of each sample; see ``tokens``."""
        return [{"input_ids": row[None]} for row in self.tokens(network, progress)]

    def origin(self) -> dict[str, Any]:
        """Return the fields of a ``Calibration`` that is made now, without ``samples``."""
        text = self.text
        own = f"sampled by the model itself, seed {text.seed}"
        name = own if text.source == SELF else Path(text.source).name
        return self._made_now(name, self._text_digest, text.length)

    @staticmethod
    def _made_now(text: str, digest: str | None, longest: int) -> dict[str, Any]:
        return {
            "tool_version": version("vllm-compress-plugin"),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "text": text,
            "text_sha256": digest,
            "sample_tokens": longest,
        }

    def _load(self, loader: Any, **options: Any) -> Any:
        folder = self.checkpoint.folder
        try:
            return loader.from_pretrained(folder, trust_remote_code=False, **options)
        except (ValueError, OSError, KeyError, ImportError, StrictDataclassError) as error:
            if error.args == (ATTENTION,):  # looked up in a model's own table of attention classes
                raise not_reached(self.config) from error
            reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
            raise CompressError(f"transformers cannot load {self.name}: {reason}") from error


def _layers_to_measure(name: str, config: Any) -> tuple[int, ...]:
    decoder = language_config(config)
    problems = []
    if config.is_encoder_decoder:
        problems.append("is an encoder-decoder; decoders only")
    if rank := getattr(decoder, "kv_lora_rank", None):
        problems.append(f"uses multi-head latent attention (kv_lora_rank {rank}): no keys per head")
    if shared := getattr(decoder, "num_kv_shared_layers", None):
        problems.append(f"has {shared} layers that share the KV cache of another")
    layers = () if problems else full_attention_layers(decoder)
    if not problems and not layers:
        window = getattr(decoder, "sliding_window", None)
        problems.append(f"has no layer with full attention (sliding window {window})")
    if problems:
        kind = decoder.model_type
        raise joined([f"{name} ({kind}) cannot be measured: it {p}" for p in problems])
    return layers
