# SPDX-License-Identifier: Apache-2.0
"""Every benchmark can be imported: the slow tests alone run them."""

import importlib
import pkgutil

import pytest

import benchmarks

# Runs in an environment of its own, with packages that are not in ours.
_ELSEWHERE = {"peers_runner"}


@pytest.mark.parametrize(
    "name", [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in _ELSEWHERE]
)
def test_it_can_be_imported(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")
