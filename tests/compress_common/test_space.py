# SPDX-License-Identifier: Apache-2.0
"""Space that is needed against what a disk has."""

import os
import shutil
from pathlib import Path

import pytest

from compress_common.errors import CompressError
from compress_common.space import Need, check_space


def test_needs_on_one_disk_are_added_up(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    first = Need(tmp_path / "not" / "there", 0.6 * free, "the checkpoint", "--out")
    second = Need(tmp_path, 0.6 * free, "the plan", "VLLM_COMPRESS_CACHE")
    check_space([first])
    check_space([second])
    check_space([])
    with pytest.raises(CompressError) as told:
        check_space([first, second])
    text = str(told.value)
    assert len(told.value.problems) == 1
    assert f"for the checkpoint in {first.folder} (--out)" in text
    assert f"for the plan in {tmp_path} (VLLM_COMPRESS_CACHE)" in text
    assert "change --out or VLLM_COMPRESS_CACHE to a folder on a disk with more" in text
    check_space([first, Need(tmp_path, -1, "what is there already", "--out")])


@pytest.mark.parametrize("unknown", ["a file system without a size", "statfs", "stat"])
def test_room_that_is_not_known_is_not_refused(
    tmp_path: Path, unknown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = Need(tmp_path / "a" / "b", 1e18, "the plan", "VLLM_COMPRESS_CACHE")
    with pytest.raises(CompressError, match="not enough disk space"):
        check_space([need])
    usage, stat = shutil.disk_usage(tmp_path), os.stat

    def denied(path: Path) -> os.stat_result:
        if tmp_path in Path(path).parents:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path)

    def broken(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        if unknown == "stat":
            patch.setattr(os, "stat", denied)
        else:
            empty = unknown == "a file system without a size"
            found = usage._replace(total=0, free=0)
            patch.setattr(shutil, "disk_usage", (lambda _: found) if empty else broken)
        check_space([need])
