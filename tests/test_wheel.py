# SPDX-License-Identifier: Apache-2.0
"""The plugin as users install it: a wheel, not editable, in an environment beside other code.

The environment has everything that this one has, through a path file, but our packages only from
the wheel. A path file's own path files are not followed, so that the editable install is hidden.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "compress_common",
    "depth_pruning",
    "dllm_denoising",
    "kv_policies",
    "quant_methods",
    "vllm_plugin",
)
BROKEN = "raise ImportError('a folder of the user, not of the plugin')"
RESULT = "RESULT "

# Run beside the folders `diffusion` and `kv_policies`, both broken. One process goes through all
# cases, because importing vLLM takes most of the time.
SCRIPT = """
import json, logging, os, sys
import vllm
from vllm.engine.arg_utils import EngineArgs
import vllm_plugin

MODEL = sys.argv[1]
said, opened = [], []
class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
keep = Keep()
logging.getLogger("vllm.vllm_plugin").addHandler(keep)
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
stock = EngineArgs.create_engine_config

def register():
    logging.getLogger("vllm.vllm_plugin").addHandler(keep)  # vLLM's set-up of logging removes it
    EngineArgs.create_engine_config, vllm_plugin._registered = stock, False
    vllm_plugin.register()

def told():
    EngineArgs(model=MODEL).create_engine_config()  # must not raise
    lines, refused = list(said), []
    said.clear()
    for asked in ({"additional_config": {"compress": {"kv": {"policy": "snap_kv", "keep": 0.5}}}},
                  {"quantization": "smoothquant_plus"}):
        try:
            EngineArgs(model=MODEL, **asked).create_engine_config()
            refused.append(None)
        except Exception as error:
            refused.append(f"{type(error).__name__}: {error}")
    return {"said": lines, "refused": refused}

def configured(create):
    opened.clear()
    config = create(EngineArgs(model=MODEL, enforce_eager=True))
    text = str(config).replace(config.instance_id, "")
    return text, config.compute_hash(), sorted(name for name in opened if MODEL in name)

version, vllm.__version__ = vllm.__version__, "0.34.0"
EngineArgs(model=MODEL)  # vLLM loads the plugin
other_version = told()
vllm.__version__ = version
register()
hidden = told()
sys.path = [path for path in sys.path if path != os.getcwd()]
register()
import kv_policies
wrapped = EngineArgs.create_engine_config
expected, found = configured(stock), configured(wrapped)
print("RESULT " + json.dumps({
    "version": other_version, "folder": hidden, "said": said,
    "from": [kv_policies.__file__, vllm_plugin.__file__],
    "disabled": vllm_plugin.why_disabled(), "wrapped": wrapped is not stock,
    "same": [a == b for a, b in zip(expected, found)], "opened": found[2],
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with our wheel in it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    pip = [sys.executable, "-m", "pip", "-q", "--no-input", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", symlinks=True, with_pip=False)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    install = ["install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=120)
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin" / "python"


def test_it_leaves_stock_engines_alone(
    installed: Path, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    """Under another vLLM, beside folders with names of ours, and with nothing configured."""
    for folder in ("diffusion", "kv_policies"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(BROKEN)
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ("PYTHONPATH", "VLLM_PLUGINS"):
        environment.pop(name, None)
    done = subprocess.run(
        [installed, "script.py", tiny_model("llama")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.split(RESULT)[-1])

    for case, reason in (("version", "0.34.0; install a matching"), ("folder", "a folder of the")):
        (line,) = told[case]["said"]
        assert line.startswith("vllm-compress-plugin is disabled: ") and reason in line
        section, method = told[case]["refused"]
        for text, asked in ((section, "compress"), (method, "--quantization smoothquant_plus")):
            assert text.startswith("RuntimeError: ") and asked in text and reason in text

    assert all(str(installed.parents[1]) in name for name in told["from"])
    assert told["wrapped"] and told["disabled"] is None and not told["said"]
    assert any(name.endswith("config.json") for name in told["opened"])
    assert told["same"] == [True, True, True]  # the config, its hash, the files that are read
