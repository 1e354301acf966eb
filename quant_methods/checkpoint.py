# SPDX-License-Identifier: Apache-2.0
"""Read a Hugging Face checkpoint folder: names, tensors, fingerprint. Safetensors only."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from compress_common.errors import CompressError

# Fingerprints read this much from three places of each file: enough to tell checkpoints apart,
# fast on a 100 GB model.
_SAMPLE_BYTES = 1 << 20


def resolve(model: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The local folder of a path or hub id (downloaded once); CompressError when there is none."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise CompressError(f"model folder {model} does not exist; give a folder or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"],
            )
        )
    except Exception as error:  # the hub client raises many types, all meaning "not available"
        raise CompressError(
            f"{model!r} is neither a local folder nor available from the hub: "
            f"{str(error).splitlines()[0]}"
        ) from error


class Checkpoint:
    """The safetensors files of a model folder, opened lazily.

    Raises CompressError when config.json or the weights are missing, damaged, or pickled.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.config: dict = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CompressError(f"{folder} has no config.json: not a model folder") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CompressError(f"{folder / 'config.json'} is not JSON: {error}") from error
        self.files: dict[str, Path] = {}  # tensor -> file
        for file in self._weight_files():
            try:
                self.files.update(dict.fromkeys(self.names_in(file), file))
            except (SafetensorError, OSError) as error:
                raise CompressError(
                    f"{file} is damaged or incomplete ({error}); fetch the checkpoint again"
                ) from error

    def _weight_files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if missing := sorted(n for n in names if not (self.folder / n).is_file()):
                raise CompressError(
                    f"{self.folder} lacks {len(missing)} of {len(names)} weight files, "
                    f"{missing[0]} for one; fetch the checkpoint again"
                )
            return sorted(self.folder / name for name in names)
        if files := sorted(self.folder.glob("*.safetensors")):
            return files
        pickled = any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt"))
        hint = "; pickled weights are not read: convert them to safetensors" if pickled else ""
        raise CompressError(f"{self.folder} has no *.safetensors files{hint}")

    @staticmethod
    def names_in(file: Path) -> list[str]:
        """The tensors of one safetensors file."""
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())

    def shapes(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """``{tensor: (shape, bytes)}`` from the headers alone."""
        sizes: dict[str, tuple[tuple[int, ...], int]] = {}
        for file in sorted(set(self.files.values())):
            with file.open("rb") as raw:
                header = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    sizes[name] = (tuple(entry["shape"]), end - begin)
        return sizes

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """``(name, tensor)`` in the given order, one in memory at a time."""
        opened: tuple[Path, safe_open] | None = None
        for name in names:
            file = self.files[name]
            if opened is None or opened[0] != file:
                opened = (file, safe_open(file, framework="pt"))
            yield name, opened[1].get_tensor(name)

    def fingerprint(self) -> str:
        """A short hash of the config and of samples of every weight file."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted(set(self.files.values())):
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            with file.open("rb") as raw:
                for start in (0, size // 2, max(size - _SAMPLE_BYTES, 0)):
                    raw.seek(start)
                    digest.update(raw.read(_SAMPLE_BYTES))
        return digest.hexdigest()[:20]
