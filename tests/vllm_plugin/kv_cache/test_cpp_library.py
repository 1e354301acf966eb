# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels come intact from the store, or torch computes and one line says why."""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compress_common.store import Store
from vllm_plugin.kv_cache import latent_cpu_build
from vllm_plugin.kv_cache.cpp_library import CppLibrary
from vllm_plugin.kv_cache.latent_cpu_build import latent_reader, why_not

SOURCE = 'extern "C" int twice(int x) { return 2 * x; }'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def library(tmp_path: Path, cache: Path) -> CppLibrary:
    if shutil.which("c++") is None:
        pytest.skip("needs a compiler")
    (tmp_path / "small.cpp").write_text(SOURCE)
    return CppLibrary(tmp_path / "small.cpp", ("-O0",))


@pytest.fixture
def avx512(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything up to the use of the kernel, on any processor."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for cached in (latent_cpu_build.load, why_not):
        cached.cache_clear()
    yield
    for cached in (latent_cpu_build.load, why_not):
        cached.cache_clear()


def compiler(folder: Path, script: str) -> str:
    """A program that stands for the compiler. $target is the file to write."""
    path = folder / "compiler"
    find = 'while [ "$1" != -o ]; do shift; done; target=$2\n'
    path.write_text(f"#!/bin/sh\n{find}{script}\n")
    path.chmod(0o755)
    return str(path)


def stored(library: CppLibrary) -> Path:
    folder = Store().find("kernel", library.key)
    assert folder is not None
    return folder / "small.so"


def test_compiled_once_into_a_private_folder(
    library: CppLibrary, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.load()
    assert ctypes.CDLL(str(stored(library))).twice(21) == 42
    assert stored(library).parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("CXX", "/no/compiler")
    library.load()


def test_a_damaged_library_is_compiled_again(
    library: CppLibrary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library.load()
    path, intact = stored(library), stored(library).read_bytes()
    path.unlink()  # a new file: the old one is mapped
    path.write_bytes(intact[:500] + bytes([intact[500] ^ 1]) + intact[501:])
    (tmp_path / "intact.so").write_bytes(intact)
    script = f"echo x >> {tmp_path}/ran; cp {tmp_path}/intact.so $target"
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    library.load()
    assert stored(library).read_bytes() == intact and (tmp_path / "ran").read_text() == "x\n"


def test_the_key_is_of_all_that_decides_the_code(
    library: CppLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {library.key, CppLibrary(library.source, ("-O1",)).key}
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
        keys.add(library.key)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0")
        keys.add(library.key)
    library.source.write_text(f"{SOURCE}\n")
    keys.add(library.key)
    assert len(keys) == 5


def test_compile_errors_are_one_line(library: CppLibrary, cache: Path) -> None:
    library.source.write_text("int x = y;\nint z = w;\n")
    with pytest.raises(RuntimeError, match=r"small.cpp:1:9: error: .y. was not declared") as error:
        library.load()
    assert "\n" not in str(error.value)
    assert [p.suffix for p in (cache / "kernel").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "script, reason",
    [
        (None, "install g++"),
        ("echo 'x.cpp: error: no such thing' >&2; exit 1", "error: no such thing"),
        ("echo garbage > $target", "cannot be loaded"),
        ("exit 0", "cannot be loaded"),
        ("exit 3", "exit status 3"),
    ],
    ids=["no compiler", "error", "garbage", "nothing", "silent"],
)
def test_no_kernel_is_slow_in_one_line(
    avx512: None, script: str | None, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, script) if script else "/no/compiler")
    reader = latent_reader(torch.bfloat16)
    assert reader.status == "slow" and reason in reader.text and "\n" not in reader.text


def test_the_environment_need_not_be_on_path(
    library: CppLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `.venv/bin/vllm`, with ninja and perhaps the compiler beside Python alone."""
    own = str(Path(sys.executable).parent)
    folders = os.environ["PATH"].split(os.pathsep)
    left = [f for f in folders if f != own and not shutil.which("ninja", path=f)]
    tools = library.source.parent / "tools"
    tools.mkdir()
    for tool in ("c++", "as", "ld"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    monkeypatch.setenv("PATH", os.pathsep.join([str(tools), *left]))
    assert shutil.which("ninja") is None
    library.load()
    assert stored(library).exists()


def test_other_types_are_slow() -> None:
    assert latent_reader(torch.float32).status == "slow"
