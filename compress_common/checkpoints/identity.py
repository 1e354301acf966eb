# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is: the SHA-256 of every tensor, remembered per file as git's index does.

A tensor with NaN or infinity has no digest here: whoever compares digests need not look again.
"""

import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from compress_common.checkpoints.finite import check_finite
from compress_common.errors import CompressError
from compress_common.store import Store, digest

KIND = "tensor-digests"
_REVISION = "2"  # raised when tensors are checked for more than before
_FILE = "digests.json"
# A file that changed this recently can change again within one tick of its clock, unseen.
_SETTLED_NS = 2_000_000_000
_LOOKAHEAD = 2  # tensors that are hashed ahead of the one in use
_THREADS = 8  # where all tensors are at hand
_LARGE = 4 << 30  # takes seconds: said in the log

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM only shows loggers below its own


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the hex SHA-256 of a tensor's dtype, shape and bytes.

    Args:
        tensor: Any dtype and shape. A tensor on another device is copied to the host.
    """
    total = sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if tensor.numel():
        host = tensor.detach().cpu().contiguous()
        total.update(host.view(-1).view(torch.uint8).numpy())  # releases the GIL
    return total.hexdigest()


def _checked_digest(name: str, tensor: torch.Tensor) -> str:
    check_finite(name, tensor)
    return tensor_digest(tensor)


def hashed(
    tensors: Iterable[tuple[str, torch.Tensor]], threads: int = 1
) -> Iterator[tuple[str, torch.Tensor, str]]:
    """Yield ``(name, tensor, digest)``. The next tensors are hashed while the caller works.

    Args:
        tensors: ``(name, tensor)``. For each thread two are read ahead.
        threads: How many tensors are hashed at once.
    """
    waiting: deque[tuple[str, torch.Tensor, Future[str]]] = deque()
    with ThreadPoolExecutor(threads, "compress-digest") as pool:
        for name, tensor in tensors:
            waiting.append((name, tensor, pool.submit(tensor_digest, tensor)))
            if len(waiting) > _LOOKAHEAD * threads:
                name, tensor, value = waiting.popleft()
                yield name, tensor, value.result()
        while waiting:
            name, tensor, value = waiting.popleft()
            yield name, tensor, value.result()


def hashing_threads() -> int:
    """Return how many tensors of a mapped file are hashed at once."""
    return min(_THREADS, os.cpu_count() or 1)


class TensorDigests:
    """The digests of all tensors of some safetensors files.

    They are computed once and remembered in the store under each file's real path, size, inode,
    mtime and ctime. An edit in place changes the ctime, which no ordinary user can set back.

    Args:
        files: Safetensors files.
        store: Where results are remembered.
    """

    def __init__(self, files: Iterable[Path], store: Store | None = None) -> None:
        self.files = sorted(set(files))
        self.store = store or Store()

    def load(self) -> dict[str, str]:
        """Return ``{tensor: digest}``.

        Raises:
            CompressError: A file cannot be read, or a tensor holds NaN or infinity.
        """
        key, settled = self._key()
        if not settled:
            return self._compute()
        digests: dict[str, str] = {}

        def build(folder: Path) -> None:  # other ranks wait instead of reading everything too
            digests.update(self._compute())
            (folder / _FILE).write_text(json.dumps(digests), encoding="utf-8")
            if self._key()[0] != key:
                raise CompressError(
                    f"{self.files[0].parent} changed while it was read; wait until the checkpoint "
                    "is complete and start again"
                )

        try:
            found = self.store.make(KIND, key, build)
        except OSError:  # no space left: the next start reads the files again
            return digests or self._compute()
        return digests or json.loads((found / _FILE).read_bytes())

    def known(self) -> bool:
        """Whether ``load`` reads no file, as it remembers the digests.

        Raises:
            CompressError: A file cannot be read.
        """
        return self.store.find(KIND, self._key()[0]) is not None

    def forget(self) -> None:
        """Remove what is remembered, so that the next ``load`` reads every byte."""
        with suppress(CompressError):  # a file has vanished: its present state has no digests
            self.store.remove(KIND, self._key()[0])

    def _key(self) -> tuple[str, bool]:
        """Return the key of the files' present state, and whether all are older than a tick.

        Raises:
            CompressError: A file has vanished or cannot be looked at.
        """
        parts, newest = [], 0
        for file in self.files:
            path = os.path.realpath(file)
            try:
                state = os.stat(path)
            except OSError as error:
                raise CompressError(
                    f"{file} cannot be read ({error.strerror}); fetch the checkpoint again"
                ) from error
            parts += [path, repr((state.st_size, state.st_ino, state.st_mtime_ns))]
            parts.append(repr(state.st_ctime_ns))
            newest = max(newest, state.st_mtime_ns, state.st_ctime_ns)
        return digest(_REVISION, *parts), time.time_ns() - newest > _SETTLED_NS

    def _compute(self) -> dict[str, str]:
        size = sum(file.stat().st_size for file in self.files if file.is_file())
        if size > _LARGE:
            logger.info("hashing %.1f GiB of weights once, to know them again", size / 2**30)
        with ThreadPoolExecutor(hashing_threads(), "compress-digest") as pool:
            digests: dict[str, str] = {}
            for file in self.files:
                try:
                    with safe_open(file, framework="pt") as opened:
                        names = list(opened.keys())
                        # Tensors are views of the mapped file: the threads read the pages.
                        tensors = [opened.get_tensor(name) for name in names]
                        found = pool.map(_checked_digest, names, tensors)
                        digests |= zip(names, found, strict=True)
                except (SafetensorError, OSError) as error:
                    raise CompressError(
                        f"{file} is damaged or incomplete ({error}); fetch the checkpoint again"
                    ) from error
        return digests
