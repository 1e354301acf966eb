# SPDX-License-Identifier: Apache-2.0
"""Alerts, dashboard and scaling ask Prometheus for series that exist, in both families of names."""

import itertools
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from benchmarks.server import serving
from vllm_plugin.metrics.catalogue import BY_NAME, METRICS

TESTS = Path(__file__).parent / "alerts_test.yaml"
# What others export and the alerts ask for: Prometheus, a process, kube-state-metrics.
OTHERS = {"up", "process_start_time_seconds", "kube_pod_container_status_restarts_total"}
VLLMS = re.compile(r'self\._(gauge|counter|histogram)_cls\(\s*name="(vllm:\w+)"')


def to_ray(name: str) -> str:
    return "ray_" + name.replace(":", "_")


def series(name: str, kind: str) -> set[str]:
    """Names in PromQL of one metric."""
    suffixes = {"gauge": [""], "counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    return {name + suffix for suffix in suffixes[kind]}


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """What vLLM and the plugin export, without Ray."""
    vllm = find_spec("vllm")
    assert vllm is not None and vllm.origin is not None
    source = (Path(vllm.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    declared = [(name, kind) for kind, name in VLLMS.findall(source)]
    declared += [(metric.full_name, metric.kind) for metric in METRICS]
    return set().union(*(series(name, kind) for name, kind in declared))


@pytest.fixture(scope="module")
def dashboard(deploy: Path) -> dict[str, Any]:
    return json.loads((deploy / "monitoring" / "dashboard.json").read_text())


@pytest.fixture(scope="module")
def rules(deploy: Path) -> dict[str, Any]:
    return yaml.safe_load((deploy / "monitoring" / "prometheusrule.yaml").read_text())["spec"]


@pytest.fixture(scope="module")
def queries(deploy: Path, dashboard: dict[str, Any], rules: dict[str, Any]) -> dict[str, list[str]]:
    """Every expression, by who asks."""
    scaled = yaml.safe_load((deploy / "autoscaling" / "scaledobject.yaml").read_text())
    return {
        "alerts": [rule["expr"] for group in rules["groups"] for rule in group["rules"]],
        "dashboard": [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])],
        "scaling": [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]],
    }


def names(expression: str) -> Iterator[set[str]]:
    """The names that each selector of an expression stands for."""
    for pattern in re.findall(r'__name__=~"([^"]*)"', expression):
        parts = re.split(r"\(([^)]*)\)(\??)", pattern)  # text, alternatives, "?" or "", text, ...
        choices = [
            part.split("|") + ([""] if parts[i + 1] else []) if i % 3 == 1 else [part]
            for i, part in enumerate(parts)
            if i % 3 != 2
        ]
        yield {"".join(choice) for choice in itertools.product(*choices)}
    for name in re.findall(r"\b[a-z][\w:]+(?=[{\[])", expression):
        yield {name}


@pytest.mark.parametrize("who", ["alerts", "dashboard", "scaling"])
def test_asks_for_what_is_exported(
    who: str, queries: dict[str, list[str]], exported: set[str]
) -> None:
    assert {"vllm:num_requests_running", "vllm:request_success_total"} <= exported
    for expression in queries[who]:
        asked = list(names(expression))
        assert asked, expression
        for selector in asked:
            if selector <= OTHERS:
                continue
            direct = {name for name in selector if not name.startswith("ray_")}
            assert direct <= exported
            # KEDA scales the Deployment, so it needs no names of Ray's.
            assert selector - direct == ({*map(to_ray, direct)} if who != "scaling" else set())


@pytest.mark.parametrize("who", ["alerts", "dashboard", "scaling"])
def test_expressions_parse(who: str, queries: dict[str, list[str]]) -> None:
    parse = pytest.importorskip("promql_parser").parse
    for expression in queries[who]:
        parse(expression.replace("$__rate_interval", "5m"))
    with pytest.raises(ValueError):
        parse(expression + ")")


def test_dashboard(dashboard: dict[str, Any], queries: dict[str, list[str]]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {each["name"] for each in dashboard["templating"]["list"]}
    assert variables == {"datasource", "model_name"}
    occupied: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & occupied and all(x < 24 for x, _ in cells), panel["title"]
        occupied |= cells
        if panel["type"] == "row":
            continue
        assert panel["fieldConfig"]["defaults"]["unit"] and panel["description"]
        for each in [panel, *panel["targets"]]:
            assert each["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            if set().union(*names(target["expr"])) <= OTHERS:
                continue
            assert target["expr"].count("{") == target["expr"].count('model_name=~"$model_name"')
    shown = set().union(*(name for each in queries["dashboard"] for name in names(each)))
    assert not [each.name for each in METRICS if not shown & series(each.full_name, each.kind)]
    (settings,) = [each for each in queries["dashboard"] if "decode_window" in each]
    assert set(BY_NAME["info"].labels) < set(re.findall(r"\w+", settings))


def test_alerts_tell_models_apart_and_link_to_a_runbook(
    rules: dict[str, Any], deploy: Path
) -> None:
    page = (deploy / "runbook.md").read_text()
    anchors = {heading.lower() for heading in re.findall(r"^## (\w+)$", page, re.MULTILINE)}
    linked = set()
    for group in rules["groups"]:
        for rule in group["rules"]:
            page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
            assert (deploy.parent / page) == deploy / "runbook.md"
            linked.add(anchor)
            grouped = re.findall(r"by \(([^)]*)\)", rule["expr"])
            own = "pod" if rule["alert"] == "EngineRestarting" else "model_name"
            assert grouped and own in grouped[0]
    assert linked == anchors


def promtool(*arguments: object) -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("no promtool here: apt-get install prometheus")
    run = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("family", ["vllm", "ray"])
def test_alerts(family: str, rules: dict[str, Any], tmp_path: Path) -> None:
    """``promtool check rules`` and ``promtool test rules``; each alert fires in some test."""
    tests = TESTS.read_text()
    fired = {
        case["alertname"]
        for test in yaml.safe_load(tests)["tests"]
        for case in test.get("alert_rule_test", [])
        if case["exp_alerts"]
    }
    assert fired == {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    if family == "ray":
        tests = re.sub(r"(- series: )vllm[:_]", r"\1ray_vllm_", tests)
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    (tmp_path / "tests.yml").write_text(tests)
    promtool("check", "rules", "--lint=all", "--lint-fatal", tmp_path / "rules.yml")
    promtool("test", "rules", tmp_path / "tests.yml")


@contextmanager
def prometheus(target: str, rules: dict[str, Any], folder: Path) -> Iterator[str]:
    """The address of a Prometheus that scrapes a server every second and knows the alerts."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus here: apt-get install prometheus")
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
    scrape = {
        "job_name": "vllm-compress",
        "scrape_interval": "1s",
        "static_configs": [{"targets": [target.removeprefix("http://")]}],
    }
    config = {"rule_files": ["rules.yml"], "scrape_configs": [scrape]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    command = [program, f"--config.file={folder}/prometheus.yml", f"--web.listen-address={listen}"]
    command += [f"--storage.tsdb.path={folder}/data", "--log.level=warn"]
    process = subprocess.Popen(command)
    try:
        yield f"http://{listen}"
    finally:
        process.terminate()
        process.wait(30)


def ask(address: str, expression: str) -> list[dict[str, Any]]:
    """The series that an expression gives now."""
    query = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"{address}/api/v1/query?{query}", timeout=10) as answer:
        found = json.load(answer)
    assert found["status"] == "success", found
    return found["data"]["result"]


@pytest.mark.slow
def test_a_real_prometheus_finds_every_name(
    demo_model: Path, queries: dict[str, list[str]], rules: dict[str, Any], tmp_path: Path
) -> None:
    """Names and expressions on a scrape of `vllm serve` under load, not on our own lists."""
    kv = {"policy": "snap_kv", "keep": 0.25, "decode_window": 32}
    arguments = ["--additional-config", json.dumps({"compress": {"kv": kv}})]
    arguments += ["--quantization", "smoothquant_plus", "--max-model-len", "1024"]
    with (
        serving(demo_model, *arguments) as server,
        prometheus(server.url, rules, tmp_path) as address,
        ThreadPoolExecutor(4) as clients,
    ):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")

        def complete(number: int) -> None:
            prompt = f"Story {number}. " + "The sun is yellow and the river is long. " * 40
            client.completions.create(model="demo", prompt=prompt, max_tokens=80)

        list(clients.map(complete, range(8)))
        time.sleep(3)
        asked = set().union(*(n for each in queries.values() for q in each for n in names(q)))
        direct = sorted(name for name in asked if not name.startswith(("ray_", "kube_")))
        assert [name for name in direct if not ask(address, name)] == []
        assert ask(address, "sum(vllm_compress_kv_evicted_tokens_total) > 0")
        assert ask(address, 'vllm_compress_info{policy="snap_kv", method="smoothquant_plus"} == 1')
        for expression in itertools.chain(queries["alerts"], queries["scaling"]):
            ask(address, expression)
        for expression in queries["dashboard"]:
            ask(address, expression.replace("$__rate_interval", "5m").replace("$model_name", ".*"))
        with urllib.request.urlopen(f"{server.url}/metrics") as answer:
            lines = answer.read().decode().splitlines(keepends=True)
        ours = "".join(line for line in lines if "vllm_compress_" in line)
        tool = shutil.which("promtool")
        assert tool is not None
        checked = subprocess.run(
            [tool, "check", "metrics"], input=ours, capture_output=True, text=True
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr
