# SPDX-License-Identifier: Apache-2.0
"""tools/next_vllm.py: the newer Python beside the installed libraries, and what it says without."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tools" / "next_vllm.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("next_vllm", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with the parts that matter."""
    path = tmp_path_factory.mktemp("wheel") / "vllm-9.1.0-cp38-abi3-manylinux_2_31_x86_64.whl"
    with ZipFile(path, "w") as archive:
        for name, text in {
            "vllm/__init__.py": "__version__ = '9.1.0'",
            "vllm/v1/new.py": "",
            "vllm/_C.abi3.so": "CUDA",
            "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": "CUDA",
            "vllm-9.1.0.dist-info/METADATA": "Name: vllm\nVersion: 9.1.0",
        }.items():
            archive.writestr(name, text)
    return path


def test_new_python_beside_the_installed_libraries(
    tool: ModuleType, wheel: Path, tmp_path: Path
) -> None:
    overlay = tool.build("9.1.0", tmp_path, wheel)
    libraries = tool.compiled(tool.installed())
    assert libraries
    for library in libraries:
        assert (overlay / "vllm" / library.name).resolve() == library.resolve()
    assert not (overlay / "vllm" / "vllm_flash_attn").exists()
    script = "import vllm; from importlib.metadata import version as v; "
    script += "print(vllm.__version__, v('vllm'), v('vllm-compress-plugin'))"
    said = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(overlay)},
        capture_output=True,
        text=True,
        check=True,
    )
    # "cpu" is how vLLM infers its platform.
    assert said.stdout.split()[:2] == ["9.1.0", "9.1.0+cpu"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vllm-9.1.0"]
    assert tool.build("9.1.0", tmp_path) == overlay  # without pip


def test_without_the_wheel_it_says_what_was_not_tested(tool: ModuleType, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--version", "9.1.0", "--into", tmp_path],
        env=os.environ | {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
    )
    assert done.returncode == tool.NO_WHEEL, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("next_vllm: vLLM 9.1.0 was not tested: pip cannot download vllm==9.1.0")
    assert not list(tmp_path.iterdir())


def test_its_tests_are_there(tool: ModuleType) -> None:
    for test in tool.TESTS:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in (ROOT / file).read_text()


@pytest.mark.slow
def test_the_next_vllm(tool: ModuleType) -> None:
    """What `make test-next` runs; it downloads half a gigabyte once."""
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    if done.returncode == tool.NO_WHEEL:
        pytest.skip(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout[-8000:]
