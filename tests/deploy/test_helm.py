# SPDX-License-Identifier: Apache-2.0
"""The Helm chart: what differs from the manifests, and what it refuses.

The tests of the manifests run on what it renders as well.
"""

import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.conftest import CHARTS, KV

Object = dict[str, Any]
Build = Callable[[str], list[Object]]
Render = Callable[[Object], "subprocess.CompletedProcess[str]"]
SMALL = CHARTS["helm/several"]["models"][0]


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [each for each in objects if each["kind"] == kind]


def without_name(objects: list[Object], kind: str, model: str) -> Object:
    """An object without what a chart of several models adds: the model's name, and a checksum."""
    (found,) = deepcopy(of_kind(objects, kind))

    def strip(node: Any) -> Any:
        if isinstance(node, dict):
            for key in ("app.kubernetes.io/instance", "namespace", "annotations"):
                node.pop(key, None)
            return {key: strip(value) for key, value in sorted(node.items())}
        if isinstance(node, list):
            return sorted(map(strip, node), key=str)  # kustomize puts what it merges first
        if isinstance(node, str) and node.startswith("vllm-compress-"):
            return "vllm-compress"  # the model's name, or the hash of kustomize
        return node

    stripped = strip(found)
    stripped["metadata"].pop("labels", None)
    return stripped


@pytest.mark.parametrize(
    "kind", ["Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "Secret"]
)
def test_one_model_is_the_gpu_overlay(kind: str, build: Build) -> None:
    ours = without_name(build("helm"), kind, "qwen3-8b")
    assert ours == without_name(build("overlays/gpu"), kind, "qwen3-8b")


def test_the_cpu_is_served_as_by_the_cpu_overlay(build: Build, render: Render) -> None:
    model = {"name": "m", "gpus": 0, "serve": {"model": "/cache/m", "additional-config": KV}}
    run = render({"models": [model], "image": {"tag": "0.1.0-cpu"}})
    objects = list(yaml.safe_load_all(run.stdout))
    assert without_name(objects, "Deployment", "m") == without_name(
        build("overlays/cpu"), "Deployment", "m"
    )


def test_flags_arrive_as_they_are_written(build: Build, deploy: Path) -> None:
    values = yaml.safe_load((deploy / "helm" / "values.yaml").read_text())
    (config,) = of_kind(build("helm"), "ConfigMap")
    expected = values["models"][0]["serve"] | {"served-model-name": "qwen3-8b"}
    assert yaml.safe_load(config["data"]["serve.yaml"]) == expected
    overlay = yaml.safe_load((deploy / "overlays" / "gpu" / "serve.yaml").read_text())
    assert overlay == expected


def test_changed_flags_roll_the_pods(render: Render) -> None:
    def checksum(length: int) -> str:
        model = SMALL | {"serve": SMALL["serve"] | {"max-model-len": length}}
        objects = list(yaml.safe_load_all(render({"models": [model]}).stdout))
        (deployment,) = of_kind(objects, "Deployment")
        return deployment["spec"]["template"]["metadata"]["annotations"]["checksum/config"]

    # Floats would write a million as 1e+06, which vLLM refuses.
    assert checksum(1048576) != checksum(1048577)


def test_routes_lead_to_services(build: Build) -> None:
    objects = build("helm/several")
    services = {
        each["metadata"]["name"]: {port["name"]: port["port"] for port in each["spec"]["ports"]}
        for each in of_kind(objects, "Service")
    }
    hosts = []
    for ingress in of_kind(objects, "Ingress"):
        (rule,) = ingress["spec"]["rules"]
        (path,) = rule["http"]["paths"]
        backend = path["backend"]["service"]
        assert backend["port"]["name"] in services[backend["name"]]
        assert ingress["spec"]["tls"] == [{"hosts": [rule["host"]], "secretName": "llm-tls"}]
        hosts.append(rule["host"])
    for route in of_kind(objects, "HTTPRoute"):
        assert route["spec"]["parentRefs"] == [{"name": "public", "namespace": "gateways"}]
        (backend,) = route["spec"]["rules"][0]["backendRefs"]
        assert backend["port"] in services[backend["name"]].values()
        hosts += route["spec"]["hostnames"]
    assert hosts == ["small.llm.example.com", "large.llm.example.com"] * 2


def test_values_reach_the_pods(build: Build) -> None:
    objects = build("helm/several")
    small, large = (each["spec"]["template"]["spec"] for each in of_kind(objects, "Deployment"))
    for container in (*small["containers"], *small["initContainers"]):
        assert {"name": "HF_HUB_OFFLINE", "value": "1"} in container["env"]
    assert "HF_HUB_OFFLINE" not in str(large)
    assert large["containers"][0]["resources"]["limits"] == {
        "memory": "96Gi",
        "nvidia.com/gpu": "4",
    }
    (scaled,) = of_kind(objects, "ScaledObject")
    assert scaled["spec"]["maxReplicaCount"] == 3
    for trigger in scaled["spec"]["triggers"]:
        assert trigger["metadata"]["serverAddress"] == "http://prometheus.example:9090"
    (rules,) = of_kind(objects, "PrometheusRule")
    assert rules["metadata"]["labels"] == {"release": "prometheus"}
    for rule in rules["spec"]["groups"][0]["rules"]:
        assert rule["annotations"]["runbook_url"].startswith("https://example.com/runbook.md#")


def test_a_secret_of_ones_own_is_used(render: Render) -> None:
    objects = list(yaml.safe_load_all(render({"existingSecret": "mine"}).stdout))
    assert not of_kind(objects, "Secret")
    (deployment,) = of_kind(objects, "Deployment")
    assert "'name': 'mine'" in str(deployment) and "'name': 'vllm-compress', 'o" not in str(
        deployment
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"modelx": []}, "modelx"),
        ({"models": []}, "minItems"),
        ({"models": [SMALL | {"gpu": 1}]}, "'gpu' not allowed"),
        ({"models": [SMALL | {"name": "Qwen/Qwen3"}]}, "does not match pattern"),
        ({"models": [{"name": "m", "serve": {}}]}, "missing property 'model'"),
        ({"models": [SMALL, SMALL]}, "two models have one name"),
        ({"models": [SMALL | {"maxReplicas": 2}]}, "2 pods share the model cache"),
        ({"models": [SMALL, SMALL | {"name": "b"}]}, "Set cache.accessMode=ReadWriteMany"),
        ({"image": {"digest": "latest"}}, "does not match pattern"),
        ({"route": {"ingress": {"enabled": True}}}, "route.domain is empty"),
        ({"route": {"domain": "d", "gateway": {"enabled": True}}}, "route.gateway.name is empty"),
    ],
)
def test_values_that_cannot_work_are_refused(values: Object, expected: str, render: Render) -> None:
    run = render(values)
    assert run.returncode != 0 and expected in run.stderr
