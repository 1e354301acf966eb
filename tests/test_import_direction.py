# SPDX-License-Identifier: Apache-2.0
"""Packages beside vllm_plugin import compress_common alone, and it imports none of them."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(
    path.parent.name
    for path in ROOT.glob("*/__init__.py")
    if path.parent.name not in ("benchmarks", "tests", "tools", "vllm_plugin")
)
SHARED = "compress_common"


def imported(path: Path) -> Iterator[str]:
    """Name every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_package_is_looked_at() -> None:
    assert {SHARED, "quant_methods", "kv_policies", "dllm_denoising"} <= set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_it_imports_only_what_is_shared(package: str) -> None:
    forbidden = {"vllm", "vllm_plugin", "benchmarks", "tests", "tools", *PACKAGES}
    forbidden -= {package, SHARED}
    for path in (ROOT / package).rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & forbidden, path


def test_what_is_shared_has_no_circles() -> None:
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (ROOT / SHARED).rglob("*.py")
        if path.stem != "__init__"
    }
    graph = {name: files.keys() & set(imported(path)) for name, path in files.items()}
    assert graph[f"{SHARED}.checkpoints.checkpoint"]  # it sees imports
    TopologicalSorter(graph).prepare()  # CycleError names the modules
