# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint as one explicit source: weight files, config and tokenizer."""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from compress_common.checkpoints.folder import (
    MISTRAL_FILES,
    given_folder,
    hugging_face_files,
    read_config,
    weight_files,
)
from compress_common.checkpoints.identity import TensorDigests, hashed, hashing_threads
from compress_common.errors import CompressError
from compress_common.store import digest
from compress_common.structure.names import Names, names_of
from compress_common.structure.structure import EMBEDDINGS, HEAD
from compress_common.structure.wrapper import generates

# What a config has that says nothing about the language model.
_VOLATILE = ("_name_or_path", "transformers_version", "wrapper")


def resolve(model: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """Return the local folder of a model, which is downloaded once if need be.

    Args:
        model: A folder or a hub id.
        revision: Branch, tag or commit on the hub.
        download_dir: Cache folder of downloads; None: Hugging Face's own.

    Raises:
        CompressError: There is no such model.
    """
    if (folder := given_folder(model)) is not None:
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"],
                ignore_patterns=[f"{MISTRAL_FILES}*"],
            )
        )
    except Exception as error:  # the hub client raises many types, all meaning "not available"
        raise CompressError(
            f"{model!r} is neither a local folder nor available from the hub: "
            f"{str(error).splitlines()[0]}"
        ) from error


class Checkpoint:
    """The safetensors files, the config and the tokenizer that make up one model.

    Calibration, quantization and the engine read a model through the same object, so that they
    cannot choose different files. Files are opened lazily.

    Args:
        folder: Named in messages. Without the other arguments everything is read from it.
        files: The weight files that will be loaded; None: those that ``transformers`` would load.
        hf_config: The ``transformers`` config in effect, overrides included, as
            ``language_config`` returns it; None: read from ``folder``.
        load_tokenizer: Returns the tokenizer in effect; None: read from ``folder``.

    Raises:
        CompressError: config.json or the weights are missing, damaged or pickled.
    """

    def __init__(
        self,
        folder: Path,
        files: Iterable[Path] | None = None,
        *,
        hf_config: Any = None,
        load_tokenizer: Callable[[], Any] | None = None,
    ) -> None:
        self.folder = folder
        self._hf_config = hf_config
        self._load_tokenizer = load_tokenizer
        self.config: dict[str, Any] = (
            read_config(folder) if hf_config is None else hf_config.to_dict()
        )
        self.files: dict[str, Path] = {}  # tensor -> file
        for file in weight_files(folder) if files is None else hugging_face_files(files):
            for name in self.names_in(file):
                if self.files.setdefault(name, file) is not file:
                    raise CompressError(
                        f"{name} is in two weight files, {self.files[name].name} and {file.name}; "
                        "remove one of them"
                    )

    @staticmethod
    def names_in(file: Path) -> list[str]:
        """Return the names of the tensors of one safetensors file."""
        try:
            with safe_open(file, framework="pt") as opened:
                return list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise CompressError(
                f"{file} is damaged or incomplete ({error}); fetch the checkpoint again"
            ) from error

    def shapes(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Return ``{tensor: (shape, bytes)}``. Only headers are read."""
        sizes: dict[str, tuple[tuple[int, ...], int]] = {}
        for file in sorted(set(self.files.values())):
            try:
                with file.open("rb") as raw:
                    header = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
            except FileNotFoundError as error:
                raise self._changed(f"{file.name} is gone") from error
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    sizes[name] = (tuple(entry["shape"]), end - begin)
        return sizes

    @property
    def weight_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(size for _, size in self.shapes().values())

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``(name, tensor)`` in the given order. The tensors are views of mapped files.

        Args:
            names: Which; None: all.
        """
        opened: tuple[Path, safe_open] | None = None
        for name in self.files if names is None else names:
            file = self.files[name]
            if opened is None or opened[0] != file:
                opened = (file, safe_open(file, framework="pt"))
            yield name, opened[1].get_tensor(name)

    @cached_property
    def own_head(self) -> bool:
        """Whether lm_head.weight is there and differs from the embedding.

        Such a head is served even where the config says tied. An equal one is a second copy of a
        tied embedding, which tools for fine-tuning leave behind. Both tensors are read.
        """
        names = [f"{self.names.outer(name)}.weight" for name in EMBEDDINGS]
        if not all(name in self.files for name in names):
            return False
        (_, embedding), (_, head) = self.tensors(names)
        return embedding.dtype != head.dtype or not torch.equal(embedding, head)

    def verified_tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor, after a comparison with ``tensor_digests``.

        Raises:
            CompressError: A file was replaced or edited after it was hashed: the digests are
                forgotten, so that the next start reads every byte.
        """
        tensors: dict[str, torch.Tensor] = {}
        expected = self.tensor_digests
        try:
            for name, tensor, found in hashed(self.tensors(), hashing_threads()):
                if found != expected.get(name):
                    raise self._changed(f"{name} has other content")
                tensors[name] = tensor
        except (SafetensorError, OSError) as error:
            raise self._changed(str(error)) from error
        return tensors

    def check_unchanged(self) -> None:
        """Check that the files still hold what ``tensor_digests`` says.

        Raises:
            CompressError: They do not.
        """
        if TensorDigests(self.files.values()).load() != self.tensor_digests:
            raise self._changed("its tensors have other content")

    def _changed(self, reason: str) -> CompressError:
        self.forget_digests()
        return CompressError(
            f"{self.folder} changed while it was in use ({reason}); wait until the checkpoint is "
            "complete and start again"
        )

    @cached_property
    def names(self) -> Names:
        """How the tensors of the language model are named here.

        Raises:
            CompressError: There is more than one language model among them.
        """
        from compress_common.structure.derive import known_structure

        bare = any(name.startswith("layers.") for name in self.files)
        if not (bare or hasattr(self.hf_config, "wrapper")):
            return Names()
        try:
            return names_of(self.files, known_structure(self.hf_config))
        except CompressError as error:
            raise CompressError(f"{self.folder} cannot be quantized: {error}") from error

    @cached_property
    def has_head(self) -> bool:
        """Whether it gives logits, by an lm_head of its own or by its embedding.

        Models of embeddings, and those that classify, do not.
        """
        from compress_common.structure.derive import known_structure

        structure = known_structure(self.hf_config)
        head = HEAD if structure is None else structure.head
        if f"{self.names.outer(head)}.weight" in self.files:
            return True
        tied = getattr(self.hf_config, "tie_word_embeddings", False)
        return bool(tied) and not self.names.parts and generates(self.hf_config)

    def decoder_files(self) -> dict[str, Path]:
        """Return ``{tensor: file}`` of the language model, by inner names: see ``Names``."""
        found = ((self.names.inner(name), file) for name, file in self.files.items())
        return {name: file for name, file in found if name is not None}

    @property
    def hf_config(self) -> Any:
        """The language model's ``transformers`` config."""
        if self._hf_config is None:
            from compress_common.checkpoints.local import text_config

            self._hf_config = text_config(self.folder)
        return self._hf_config

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; CompressError when it cannot be loaded."""
        from compress_common.checkpoints.local import load_tokenizer

        if self._load_tokenizer is None:
            return load_tokenizer(self.folder)
        return self._load_tokenizer()

    @cached_property
    def tensor_digests(self) -> dict[str, str]:
        """The SHA-256 of each tensor: see ``identity.tensor_digest``. All of them are finite."""
        return TensorDigests(self.files.values()).load()

    @cached_property
    def weights_digest(self) -> str:
        """SHA-256 over the name, dtype, shape and bytes of every tensor."""
        return digest(*(part for item in sorted(self.tensor_digests.items()) for part in item))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over every tensor and the config: what a plan belongs to."""
        config = self.hf_config.to_dict()
        known = {key: value for key, value in config.items() if key not in _VOLATILE}
        return digest(self.weights_digest, json.dumps(known, sort_keys=True, default=str))

    def digests_are_known(self) -> bool:
        """Whether ``tensor_digests`` is remembered: no weights are read then."""
        return TensorDigests(self.files.values()).known()

    def forget_digests(self) -> None:
        """Make the next ``Checkpoint`` of these files read every byte again."""
        TensorDigests(self.files.values()).forget()
