# SPDX-License-Identifier: Apache-2.0
"""The folder of a checkpoint while it is written, and its shards."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from compress_common.checkpoints import shards
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.partial import Partial
from compress_common.checkpoints.shards import cut_into_shards, write_index, write_shards
from compress_common.errors import CompressError


def tensors(names: list[str]) -> dict[str, torch.Tensor]:
    return {name: torch.full((4,), float(name)) for name in names}


def test_it_is_complete_or_absent(tmp_path: Path) -> None:
    partial = Partial(tmp_path / "out")
    written: list[list[str]] = []

    def counted(names: list[str]) -> dict[str, torch.Tensor]:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(names)
        return tensors(names)

    with pytest.raises(KeyboardInterrupt), partial.writing():
        partial.start_or_resume({"drop": [3]})
        write_shards([["1"], ["2"], ["3"]], counted, partial.folder)
    assert not partial.target.exists() and partial.written
    (partial.folder / "model-00003-of-00003.tmp").write_bytes(b"half")
    (partial.folder / "report.json").write_text("half")
    written.clear()
    partial = Partial(tmp_path / "out")
    before = os.umask(0o027)
    try:
        with partial.writing():
            partial.start_or_resume({"drop": [3]})
            index = write_shards([["1"], ["2"], ["3"]], counted, partial.folder)
            write_index(partial.folder, index)
    finally:
        os.umask(before)
    assert written == [["3"]]  # the others were there
    (partial.target / "config.json").write_text("{}")
    checkpoint = Checkpoint(partial.target)
    assert {name: float(tensor[0]) for name, tensor in checkpoint.tensors()} == {
        "1": 1.0,
        "2": 2.0,
        "3": 3.0,
    }
    assert sorted(path.name for path in partial.target.glob("[!c]*")) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    mode = (partial.target / "model-00003-of-00003.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_identity_keeps_nothing(tmp_path: Path) -> None:
    partial = Partial(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), partial.writing():
        partial.start_or_resume({"drop": [3]})
        write_shards([["1"]], tensors, partial.folder)
        (partial.folder / "1_Pooling").mkdir()
        (partial.folder / "1_Pooling" / "config.json").write_text("{}")
        raise KeyboardInterrupt
    with partial.writing():
        partial.start_or_resume({"drop": [4]})
        assert sorted(path.name for path in partial.folder.iterdir()) == [".lock", "state.json"]
        assert json.loads((partial.folder / "state.json").read_text()) == {"drop": [4]}


@pytest.mark.parametrize("finished", [False, True])
def test_a_failure_leaves_only_finished_shards(tmp_path: Path, finished: bool) -> None:
    partial = Partial(tmp_path / "out")
    with pytest.raises(CompressError, match="refused"), partial.writing():
        partial.start_or_resume({})
        if finished:
            write_shards([["1"]], tensors, partial.folder)
        raise CompressError("refused")
    assert partial.folder.exists() == finished


def test_refusals(tmp_path: Path) -> None:
    partial = Partial(tmp_path / "out")
    partial.folder.mkdir()
    message = "another process is writing .*out right now"
    with (
        FileLock(partial.folder / ".lock"),
        pytest.raises(CompressError, match=message),
        partial.writing(),
    ):
        pytest.fail("entered")
    partial.target.mkdir()  # another process has finished meanwhile
    with pytest.raises(CompressError, match="out exists"), partial.writing():
        pytest.fail("entered")
    with pytest.raises(CompressError, match="out exists"):
        Partial(tmp_path / "out")
    (tmp_path / "file").write_text("")
    partial = Partial(tmp_path / "file" / "out")
    with pytest.raises(CompressError, match="cannot write .*writable --out"), partial.writing():
        pytest.fail("entered")


@given(st.lists(st.integers(0, 100), max_size=20))
def test_shards_are_as_large_as_they_may_be(sizes: list[int]) -> None:
    names = [str(index) for index in range(len(sizes))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 60)
        cut = cut_into_shards(names, dict(zip(names, sizes, strict=True)))
    assert [name for shard in cut for name in shard] == names
    totals = [sum(sizes[int(name)] for name in shard) for shard in cut]
    for shard, total in zip(cut, totals, strict=True):
        assert total <= 60 or sum(sizes[int(name)] > 0 for name in shard) == 1
    for shard, total in zip(cut[1:], totals, strict=False):
        assert total + sizes[int(shard[0])] > 60
