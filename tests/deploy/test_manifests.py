# SPDX-License-Identifier: Apache-2.0
"""Manifests without a cluster: schemas, and whether what they name exists."""

import os
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

Object = dict[str, Any]
Build = Callable[[str], list[Object]]

SERVERS = ("overlays/cpu", "overlays/gpu")
WORKLOADS = (*SERVERS, "overlays/ray")
ALL = ("base", *WORKLOADS, "monitoring", "autoscaling")
KUBERNETES = "1.34"  # schemas of this version; the oldest that has all fields is 1.30
CRDS = Path(os.environ.get("VLLM_COMPRESS_CRDS", Path(__file__).parents[3] / "shared" / "crds"))
CUSTOM = re.compile(r"(ray\.io|monitoring\.coreos\.com|keda\.sh)/")


def one(objects: list[Object], kind: str) -> Object:
    (found,) = [each for each in objects if each["kind"] == kind]
    return found


def pods(objects: list[Object]) -> Iterator[Object]:
    """Pod templates, those of KubeRay included."""
    for each in objects:
        if each["kind"] == "Deployment":
            yield each["spec"]["template"]
        elif each["kind"] == "RayService":
            cluster = each["spec"]["rayClusterConfig"]
            for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
                yield group["template"]


def selected(selector: Object, objects: list[Object]) -> list[Object]:
    """Pod templates that a label selector chooses."""

    def matches(labels: dict[str, str]) -> bool:
        wanted = [(key, [value]) for key, value in selector.get("matchLabels", {}).items()]
        for expression in selector.get("matchExpressions", []):
            assert expression["operator"] == "In"
            wanted.append((expression["key"], expression["values"]))
        return all(labels.get(key) in values for key, values in wanted)

    return [pod for pod in pods(objects) if matches(pod["metadata"]["labels"])]


def port_names(pod: Object) -> set[str]:
    return {port["name"] for each in pod["spec"]["containers"] for port in each["ports"]}


def values(node: Any, key: str) -> Iterator[Any]:
    """Each value under ``key``, however deep."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from values(value, key)


@pytest.mark.parametrize("name", ALL)
def test_core_kinds_are_strictly_valid(name: str, build: Build) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for each in build(name):
        if not CUSTOM.match(each["apiVersion"]):
            validate(each, KUBERNETES, strict=True)


@cache
def custom_schema(api_version: str, kind: str) -> Object:
    """The schema of a custom resource; properties that it does not list are refused."""
    group, _, version = api_version.partition("/")
    file = CRDS / f"{group}_{kind.lower()}s.yaml"
    if not file.is_file():
        pytest.skip(f"no {file.name} in {CRDS}: name a folder of CRDs in VLLM_COMPRESS_CRDS")
    crd = yaml.load(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))

    def close(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("properties"), dict) and not node.get(
                "x-kubernetes-preserve-unknown-fields"
            ):
                node.setdefault("additionalProperties", False)
            for value in node.values():
                close(value)
        elif isinstance(node, list):
            for value in node:
                close(value)

    (schema,) = [
        each["schema"]["openAPIV3Schema"]
        for each in crd["spec"]["versions"]
        if each["name"] == version
    ]
    close(schema)
    return schema


@pytest.mark.parametrize("name", ["overlays/ray", "monitoring", "autoscaling"])
def test_custom_kinds_are_strictly_valid(name: str, build: Build) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    custom = [each for each in build(name) if CUSTOM.match(each["apiVersion"])]
    assert custom
    for each in custom:
        # The schema itself is not checked: its patterns are Go's, some are none of Python's.
        schema = jsonschema.Draft202012Validator(custom_schema(each["apiVersion"], each["kind"]))
        schema.validate(each)
        with pytest.raises(jsonschema.ValidationError, match="misspelt"):
            schema.validate(each | {"spec": each["spec"] | {"misspelt": 1}})


@pytest.mark.parametrize("name", ["base", *WORKLOADS])
def test_what_is_named_exists(name: str, build: Build) -> None:
    objects = build(name)
    have = {(each["kind"], each["metadata"]["name"]) for each in objects}
    for pod in pods(objects):
        spec = pod["spec"]
        named = [("ServiceAccount", account) for account in values(spec, "serviceAccountName")]
        named += [("PersistentVolumeClaim", claim) for claim in values(spec, "claimName")]
        named += [("ConfigMap", volume["name"]) for volume in values(spec, "configMap")]
        named += [("Secret", reference["name"]) for reference in values(spec, "secretKeyRef")]
        assert set(named) <= have

        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in spec["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        for probe in values(spec, "httpGet"):
            assert probe["port"] in port_names(pod)

    for each in objects:
        spec = each.get("spec", {})
        if each["kind"] == "Service":
            chosen = selected({"matchLabels": spec["selector"]}, objects)
            ports = {port["targetPort"] for port in spec["ports"]}
        elif each["kind"] == "NetworkPolicy":
            chosen = selected(spec["podSelector"], objects)
            ports = {p for p in values(spec["ingress"], "port") if isinstance(p, str)}
            assert len(chosen) == len(list(pods(objects))), "some pod is open to everybody"
        elif each["kind"] in ("Deployment", "PodDisruptionBudget"):
            chosen, ports = selected(spec["selector"], objects), set()
        else:
            continue
        assert chosen
        assert ports <= set().union(*map(port_names, chosen))


@pytest.mark.parametrize("name", WORKLOADS)
def test_pods_are_restricted(name: str, build: Build) -> None:
    """What the namespace enforces (Pod Security Standard "restricted"), and a read-only root."""
    for pod in pods(build(name)):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec["enableServiceLinks"]
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert re.fullmatch(r".+:\d+\.\d+\.\d+(-\w+)?", container["image"])


@pytest.mark.parametrize("name", WORKLOADS)
def test_prometheus_finds_all_pods(name: str, build: Build) -> None:
    spec = one(build("monitoring"), "PodMonitor")["spec"]
    objects = build(name)
    ports = {endpoint["port"] for endpoint in spec["podMetricsEndpoints"]}
    chosen = selected(spec["selector"], objects)
    assert len(chosen) == len(list(pods(objects)))
    assert all(len(ports & port_names(pod)) == 1 for pod in chosen)


def test_keda_scales_the_deployment(build: Build) -> None:
    scaled = one(build("autoscaling"), "ScaledObject")
    deployment = one(build("base"), "Deployment")
    assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]
    namespace = deployment["metadata"]["namespace"]
    for trigger in scaled["spec"]["triggers"]:
        assert f'namespace="{namespace}"' in trigger["metadata"]["query"]


@pytest.mark.parametrize("name", ["base", *SERVERS])
def test_arguments_are_vllms_and_ours(name: str, build: Build, tmp_path: Path) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.instrumentator.health import router
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from quant_methods.registry import methods
    from vllm_plugin.settings import parse_settings

    objects = build(name)
    spec = one(objects, "Deployment")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    file = tmp_path / "serve.yaml"
    file.write_text(one(objects, "ConfigMap")["data"][file.name])
    assert container["command"] == ["vllm", "serve"]
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == "config"]
    arguments = [each.replace(mount["mountPath"], str(tmp_path)) for each in container["args"]]
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)

    settings = parse_settings(parsed.additional_config)
    assert settings.kv is not None
    settings.kv.build()
    assert parsed.quantization in methods()

    health = {probe["path"] for probe in values(container, "httpGet")}
    assert health <= {route.path for route in router.routes}
    wait = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > wait + parsed.shutdown_timeout


def test_plugin_is_named(build: Build, deploy: Path) -> None:
    """VLLM_PLUGINS is an allow-list of entry points."""
    from importlib.metadata import entry_points

    (container,) = one(build("base"), "Deployment")["spec"]["template"]["spec"]["containers"]
    environment = {each["name"]: each.get("value") for each in container["env"]}
    (application,) = serve_config(deploy)["applications"]
    (config,) = application["args"]["llm_configs"]
    for plugins in (environment["VLLM_PLUGINS"], config["runtime_env"]["env_vars"]["VLLM_PLUGINS"]):
        assert entry_points(group="vllm.general_plugins", name=plugins)


def test_image_has_what_the_package_needs(deploy: Path) -> None:
    """The tested vLLM, and each package of pyproject.toml."""
    import vllm_plugin

    recipe = (deploy / "Containerfile").read_text()
    (version,) = re.findall(r"^ARG BASE=vllm/vllm-openai:v(.+)$", recipe, re.MULTILINE)
    assert SpecifierSet(vllm_plugin.SUPPORTED_VLLM).contains(version)
    project = tomllib.loads((deploy.parent / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    copied = re.findall(r"^COPY (\w+) /src/\w+$", recipe, re.MULTILINE)
    assert copied == [package.removesuffix("*") for package in packages]


def serve_config(deploy: Path) -> Object:
    return yaml.safe_load((deploy / "ray" / "two_replicas.yaml").read_text())


def test_rayservice_is_the_serve_config(build: Build, deploy: Path) -> None:
    spec = one(build("overlays/ray"), "RayService")["spec"]
    assert yaml.safe_load(spec["serveConfigV2"]) == serve_config(deploy)
    (application,) = serve_config(deploy)["applications"]
    (config,) = application["args"]["llm_configs"]
    scaling = config["deployment_config"]["autoscaling_config"]
    (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["minReplicas"] == workers["replicas"] == scaling["min_replicas"] == 2
    assert workers["maxReplicas"] == scaling["max_replicas"]
    version = spec["rayClusterConfig"]["rayVersion"]
    assert f"ray[serve]=={version}" in (deploy / "Containerfile").read_text()


def test_serve_config_is_rays_and_ours(deploy: Path) -> None:
    """Needs the extra ``ray``."""
    llm = pytest.importorskip("ray.serve.llm")
    from ray.serve.schema import ServeDeploySchema

    from quant_methods.registry import methods
    from vllm_plugin.settings import parse_settings

    (application,) = ServeDeploySchema(**serve_config(deploy)).applications
    assert application.import_path == "ray.serve.llm:build_openai_app"
    (config,) = llm.LLMServingArgs(**application.args).llm_configs
    config.get_engine_config()  # refuses engine arguments that vLLM does not have
    settings = parse_settings(config.engine_kwargs["additional_config"])
    assert settings.kv is not None
    settings.kv.build()
    assert config.engine_kwargs["quantization"] in methods()
