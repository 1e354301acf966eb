# SPDX-License-Identifier: Apache-2.0
"""What safetensors says of a disk that is full becomes an error of files."""

import resource
import signal
from pathlib import Path

import pytest
import torch

from compress_common.tensor_file import save_tensors


def test_a_file_that_cannot_grow_is_an_error_of_the_file(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(1 << 16)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))
        with pytest.raises(OSError, match="File too large"):
            save_tensors(tensors, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    save_tensors(tensors, tmp_path / "b.safetensors", {"format": "pt"})
