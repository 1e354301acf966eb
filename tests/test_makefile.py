# SPDX-License-Identifier: Apache-2.0
"""What the Makefile hands to the programs that it runs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("target", "program"), [("serve", "vllm"), ("serve MODEL=m", "vllm"), ("test", "python")]
)
def test_programs_find_others_of_their_environment(
    tmp_path: Path, target: str, program: str
) -> None:
    """Ninja and compilers from wheels lie beside `vllm`."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", tmp_path)
    setup = tmp_path / "tools" / "setup_env.py"
    setup.parent.mkdir()
    setup.write_text("import sys; assert '.venv' not in sys.executable\n")
    for name in ("vllm", "python", "python3"):
        file = programs / name
        file.write_text(f'#!/bin/sh\necho {name} "$PATH" >> path.log\n')
        file.chmod(0o755)
    done = subprocess.run(
        ["make", *target.split()], cwd=tmp_path, env=_outside(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    name, _, path = (tmp_path / "path.log").read_text().splitlines()[-1].partition(" ")
    assert name == program
    assert path.split(":")[0] == str(programs)


def _outside() -> dict[str, str]:
    """The environment of a shell outside of `make test`, which puts `.venv` on PATH."""
    shell = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    shell.pop("ARGS", None)
    folders = shell["PATH"].split(os.pathsep)
    shell["PATH"] = os.pathsep.join(folder for folder in folders if ".venv" not in folder)
    return shell
