# SPDX-License-Identifier: Apache-2.0
"""The init container that fetches the model, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from compress_common.errors import CompressError
from vllm_plugin.prefetch import prefetch, unreadable


def config(folder: Path, text: str) -> Path:
    file = folder / "serve.yaml"
    file.write_text(text)
    return file


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert prefetch(config(tmp_path, f"model: {tmp_path}/m\nmax-model-len: 8\n")) == tmp_path / "m"


@pytest.mark.parametrize("model", ["s3://bucket/m", "unsloth/Qwen3-0.6B-GGUF:Q4_K_M"])
def test_what_only_vllm_can_fetch_is_left_to_it(model: str, tmp_path: Path) -> None:
    assert prefetch(config(tmp_path, f"model: {model}\n")) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("served-model-name: m\n", "has no `model`"),
        ("[1]\n", "has no `model`"),
        ("model: [\n", "serve.yaml: while parsing"),
        ("model: nobody/nothing\n", "nor available from the hub"),
        ("model: nothing-without-an-owner\n", "nor available from the hub"),
        ("model: /cache/absent\n", "model folder /cache/absent does not exist"),
        ("model: ./no/such/folder\n", "model folder ./no/such/folder does not exist"),
    ],
)
def test_one_line_says_what_is_wrong(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=expected) as caught:
        prefetch(config(tmp_path, text))
    assert len(str(caught.value).splitlines()) == 1


def test_files_that_the_user_cannot_read_are_found(tmp_path: Path) -> None:
    owner, group = tmp_path.stat().st_uid, tmp_path.stat().st_gid
    tmp_path.chmod(0o755)
    for name, mode in (("open", 0o644), ("shared", 0o640), ("private", 0o600)):
        (tmp_path / name).touch(mode=mode)
        (tmp_path / name).chmod(mode)

    def names(user: int, groups: set[int]) -> list[str]:
        return [file.name for file in unreadable(tmp_path, user, groups)]

    assert names(owner + 1, {group + 1}) == ["private", "shared"]
    assert names(owner + 1, {group}) == ["private"]
    assert names(0, set()) == []


@pytest.mark.parametrize("mode", [0o700, 0o744, 0o711])
def test_a_folder_that_the_user_cannot_enter_or_list_is_found(tmp_path: Path, mode: int) -> None:
    owner, group = tmp_path.stat().st_uid, tmp_path.stat().st_gid
    tmp_path.chmod(0o755)
    inner = tmp_path / "inner"
    inner.mkdir()
    inner.chmod(mode)
    (inner / "file").touch(mode=0o644)
    assert unreadable(tmp_path, owner + 1, {group + 1}) == [inner]
    assert unreadable(inner, owner + 1, {group + 1}) == [inner]
    assert unreadable(tmp_path, owner or 1, {group}) == ([] if owner else [inner])
    inner.chmod(0o755)
    assert unreadable(tmp_path, owner + 1, {group + 1}) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert unreadable(tmp_path, 12345, {12345}) == [tmp_path / "model.safetensors"]


def test_the_command_ends_with_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    run = subprocess.run(
        [sys.executable, "-m", "vllm_plugin.prefetch", missing], capture_output=True, text=True
    )
    assert run.returncode == 1 and run.stderr.splitlines()[-1].startswith("prefetch: ")
    assert "Traceback" not in run.stderr and "none.yaml" in run.stderr
