#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Test with the Python of a vLLM that has no CPU wheel yet: `make test-next`.

vLLM's CUDA wheel has the Python files of the release. They are put beside the compiled libraries of
the CPU wheel that is installed, in a folder outside of the repository, and tests run with that
folder in front of the environment. So this tests what Python changed; the compiled operations are
still those of the installed version, and nothing of CUDA is tested.

Where the wheel cannot be had, nothing is tested: the last line says so with the reason, and the
exit status is 75.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
VERSION = "0.33.0"
NO_WHEEL = 75  # EX_TEMPFAIL

_ENGINE = "tests/vllm_plugin/kv_cache/test_engine.py"
# What vLLM's Python can break: what we build on, the scheduler's side, where blocks lie, what is
# refused, and two engines.
TESTS = [
    "tests/vllm_plugin/test_contracts.py",
    *(f"tests/vllm_plugin/{part}/test_contracts.py" for part in ("kv_cache", "metrics")),
    "tests/vllm_plugin/diffusion/test_contracts.py",
    *(f"tests/vllm_plugin/kv_cache/test_{name}.py" for name in ("manager", "pages", "refusals")),
    "tests/vllm_plugin/diffusion/test_refusals.py",
    "tests/vllm_plugin/test_capacity.py",
    "tests/vllm_plugin/commands/test_doctor.py",
    f"{_ENGINE}::test_prefix_cache_hits_and_changes_nothing[random-snap_kv]",
]


class NoWheel(Exception):
    """The wheel cannot be had; the text says why."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--version", default=VERSION, help="of vLLM (%(default)s)")
    parser.add_argument("--wheel", type=Path, help="use this file; otherwise pip downloads it")
    parser.add_argument("--into", type=Path, default=_cache(), help="folder (%(default)s)")
    parser.add_argument("tests", nargs="*", default=TESTS, help="pytest's arguments")
    options = parser.parse_args()
    try:
        overlay = build(options.version, options.into, options.wheel)
    except NoWheel as reason:
        print(f"next_vllm: vLLM {options.version} was not tested: {reason}")
        sys.exit(NO_WHEEL)
    print(f"next_vllm: {overlay}", flush=True)
    sys.exit(run_tests(overlay, options.tests))


def build(version: str, into: Path, wheel: Path | None = None) -> Path:
    """Make the folder that takes the place of vLLM's, unless it is there.

    Args:
        version: Of vLLM.
        into: Where folders of all versions are.
        wheel: vLLM's CUDA wheel; None: pip downloads it from the index that it is configured for.

    Returns:
        The folder, to be put on PYTHONPATH.

    Raises:
        NoWheel: pip cannot download it.
    """
    libraries = compiled(installed())
    folder = into / f"vllm-{version}"
    if folder.exists():
        return folder
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        made = Path(scratch) / "overlay"
        unpack(wheel or download(version, Path(scratch)), made)
        for library in libraries:
            (made / "vllm" / library.name).symlink_to(library)
        _name_platform(version, made)
        made.rename(folder)  # complete or not there
    return folder


def installed() -> Path:
    """The folder of the vLLM in this environment, without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        sys.exit("next_vllm: vLLM is not installed here; run `make setup`")
    return Path(spec.origin).parent


def compiled(package: Path) -> list[Path]:
    """The compiled libraries of a vLLM."""
    return sorted(package.glob("*.so"))


def download(version: str, folder: Path) -> Path:
    """Download vLLM's wheel, about half a gigabyte."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"vllm=={version}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found = sorted(folder.glob("vllm-*.whl"))
    if done.returncode or not found:
        said = done.stdout.strip().splitlines() or ["pip downloaded nothing"]
        raise NoWheel(f"pip cannot download vllm=={version}: {said[-1]}")
    return found[0]


def unpack(wheel: Path, folder: Path) -> None:
    """Extract the package without what is compiled for CUDA."""
    with ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.filename.startswith("vllm/") and ".so" not in Path(member.filename).suffixes:
                archive.extract(member, folder)


def run_tests(overlay: Path, tests: list[str]) -> int:
    """Run pytest with the overlay in front of the environment; its exit status."""
    path = os.pathsep.join([str(overlay), str(ROOT)])
    command = [sys.executable, "-m", "pytest", "-m", "not slow", *tests]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}).returncode


def _name_platform(version: str, folder: Path) -> None:
    """Record a distribution `vllm`, whose version tells vLLM that it runs on a CPU."""
    info = folder / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "vllm-compress-plugin"


if __name__ == "__main__":
    main()
