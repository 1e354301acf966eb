# SPDX-License-Identifier: Apache-2.0
"""`vllm-compress serve`: twenty mistakes, each refused before an engine starts, and one server."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from quant_methods.formats.checkpoint_formats import MARKER
from vllm_plugin import presets
from vllm_plugin.command_line import additional_config_of, with_additional_config, without_secrets
from vllm_plugin.commands import early, launch, missing, server_process
from vllm_plugin.commands.address import Address
from vllm_plugin.commands.missing import lacks_bases
from vllm_plugin.settings import KEY, parse_settings

KV = f"--additional-config.{KEY}.kv"


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not refused must not start a server here."""

    def run(*_: object) -> int:
        raise AssertionError("was not refused")

    monkeypatch.setattr(server_process, "run", run)
    monkeypatch.setattr(missing, "default_bases", run)  # takes minutes


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    """Where the command runs, with what the mistakes name."""
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "bad.yaml").write_text("a: [1,\nb: 2\n")
    (tmp_path / "kv.yaml").write_text(presets.text("safe"))
    (tmp_path / "bases.safetensors").write_bytes(b"no bases")
    (tmp_path / "bare").mkdir()
    shutil.copy(model / "config.json", tmp_path / "bare")
    quantized = tmp_path / "quantized"
    shutil.copytree(model, quantized)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (quantized / "config.json").write_text(json.dumps(config))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        MARKER: {"method": "rtn"},
    }
    for name in ("incomplete", "damaged"):
        shutil.copytree(model, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        file = tmp_path / name / "model.safetensors"
        file.write_bytes(file.read_bytes()[:5000] if name == "incomplete" else b"\xff" * 5000)
    return tmp_path


MISTAKES = {
    "a preset's name": (
        "./model --preset tiny",
        "'tiny' is not one of 'safe', 'balanced', 'small'",
    ),
    "no model": ("--preset safe", "no model is given"),
    "a folder's name": ("./modl --preset safe", "model folder './modl' does not exist"),
    "a space": ("'./model ' --preset safe", "has spaces around its name"),
    "a file": ("./model.gguf --preset safe", "is a file; give the folder"),
    "a flag's name": (
        "./model --prot 8001",
        "unrecognized arguments: --prot 8001; did you mean '--port'?",
    ),
    "our flag's name": (
        "./model --presets balanced",
        "unrecognized arguments: --presets balanced; did you mean '--preset'?",
    ),
    "a port": ("./model --port 80x", "--port '80x' is not a number"),
    "a port's range": ("./model --port 70000", "--port 70000 is not a port"),
    "a host": ("./model --host 203.0.113.7", "--host 203.0.113.7: Cannot assign"),
    "an equals sign": ("./model --config=kv.yaml", "vLLM ignores the file of --config behind `=`"),
    "a busy port": ("./model --preset safe --port BUSY", "Address already in use"),
    "JSON": ("./model --additional-config '{compress'", "--additional-config is not JSON"),
    "two forms": (
        f"./model {KV}.policy snap_kv --additional-config '{json.dumps({KEY: {}})}'",
        "is given as JSON and with dotted flags",
    ),
    "a preset and JSON": (
        f"./model --preset safe --additional-config '{json.dumps({KEY: {'kv': {'keep': 0.25}}})}'",
        f"vLLM drops JSON beside them; in place of the JSON, write {KV}.keep 0.25\n",
    ),
    "two forms, a file": (
        "./model --preset safe --config kv.yaml",
        "--config kv.yaml has 'additional-config', and so does the preset",
    ),
    "no such file": ("./model --config none.yaml", "--config none.yaml: No such file"),
    "not YAML": ("./model --config bad.yaml", "--config is not YAML"),
    "a list": ("./model --config list.yaml", "--config list.yaml has no flags"),
    "no config": (". --preset safe", "has no config.json: not a model folder"),
    "no weights": ("./bare --preset balanced", "has no *.safetensors files"),
    "a key's name": (f"./model {KV}.policy snap_kv {KV}.kep 0.5", "did you mean 'keep'?"),
    "a section's name": (
        "./model --additional-config.comprss.kv.policy snap_kv",
        "did you mean 'compress'?",
    ),
    "a share": (f"./model {KV}.policy snap_kv {KV}.keep 1.5", "compress.kv.keep"),
    "a method's name": (
        "./model --quantization smoothqant_plus",
        "did you mean 'smoothquant_plus'?",
    ),
    "a group size": (
        f"./model --preset balanced --additional-config.{KEY}.weights.group_size 48",
        "group_size",
    ),
    "adapters": ("./model --preset small --enable-lora", "--enable-lora"),
    "quantized": ("./quantized --preset balanced", "quantized"),
    "half a file": ("./incomplete --preset safe", "model.safetensors is damaged or incomplete"),
    "a damaged file": ("./damaged", "model.safetensors is damaged or incomplete"),
    "too long": ("./model --preset safe --max-model-len 99999999", "max_model_len"),
    "a budget of latents": (
        f"./model {KV}.policy cskv {KV}.budget 256",
        "cskv keeps every token; remove `budget`",
    ),
    "blocks of latents": (
        f"./model {KV}.policy cskv {KV}.min_blocks 2",
        "cskv keeps every token; leave min_blocks out",
    ),
    "bases": (f"./model {KV}.policy cskv {KV}.bases bases.safetensors", "bases.safetensors"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_on_one_screen(
    run: Callable, folder: Path, busy_port: int, name: str
) -> None:
    line, expected = MISTAKES[name]
    code, out, err = run("serve", *shlex.split(line.replace("BUSY", str(busy_port))))
    assert code in (1, 2)
    assert out == ""
    # vLLM's log comes first, and is silent in a process of its own.
    refusal = err[err.index("error: ") :]
    assert expected in refusal
    assert len(refusal.splitlines()) <= 5


# What vLLM alone can tell: its flags, its methods, and what follows from a model's config.
NEED_VLLM = {"a flag's name", "our flag's name", "a method's name", "adapters", "too long"}
# What our settings, methods and files tell, whose modules import torch.
NEED_TORCH = {
    *("a key's name", "a section's name", "a share", "a group size"),
    *("bases", "quantized", "no weights", "a budget of latents", "blocks of latents"),
    *("half a file", "a damaged file"),
}
REFUSED = """if True:
    import json, sys
    from vllm_plugin import cli
    for lines in json.loads(sys.argv.pop()):
        for line in lines:
            sys.argv[1:] = ["serve", *line]
            try:
                cli.main()
            except SystemExit as end:
                assert end.code, line
        large = ("torch", "transformers", "compressed_tensors", "vllm")
        print([name for name in large if name in sys.modules])
"""


def test_most_mistakes_are_refused_before_vllm_is_imported(folder: Path, busy_port: int) -> None:
    """That takes seconds. In a process of its own: in this one all of them are imported."""
    assert MISTAKES.keys() >= NEED_VLLM | NEED_TORCH
    lines = {
        name: shlex.split(line.replace("BUSY", str(busy_port)))
        for name, (line, _) in MISTAKES.items()
    }
    early = [line for name, line in lines.items() if name not in NEED_VLLM | NEED_TORCH]
    groups = [early, [lines[name] for name in sorted(NEED_TORCH)]]
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, json.dumps(groups)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "['torch']"]


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_a_preset_is_a_file_for_vllm(run: Callable, tmp_path: Path, preset: presets.Preset) -> None:
    code, shown, _ = run("serve", "--preset", preset, "--show")
    assert code == 0
    file = tmp_path / "shown.yaml"
    file.write_text(shown)
    from_file = launch.parse(["M", "--config", str(file)])
    from_flags = launch.parse(["M", *presets.flags(preset)])
    for parsed in (from_file, from_flags):
        del parsed.config
    assert vars(from_file) == vars(from_flags)
    config = dict(from_flags.additional_config)
    if lacks_bases(config):
        config[KEY]["kv"]["bases"] = "kv.safetensors"
    assert parse_settings(config).kv is not None


def test_all_presets_are_shown(run: Callable) -> None:
    code, shown, _ = run("serve", "--show")
    assert code == 0
    for preset in presets.PRESETS:
        assert f"# {preset}.yaml" in shown
        assert yaml.safe_load(presets.text(preset))["additional-config"][KEY]["kv"]


def test_a_preset_named_behind_show_is_shown_alone(run: Callable) -> None:
    assert run("serve", "--show", "small")[:2] == (0, f"# small.yaml\n{presets.text('small')}")


def test_flags_win_over_the_preset() -> None:
    line = ["M", *presets.flags("balanced"), "--quantization", "rtn", f"{KV}.keep", "0.75"]
    parsed = launch.parse(line)
    assert parsed.quantization == "rtn"
    assert parsed.additional_config == {KEY: {"kv": {"policy": "snap_kv", "keep": 0.75}}}


def test_a_server_sees_every_plugin_and_the_check_of_streams() -> None:
    names = server_process.environment({})["VLLM_PLUGINS"].split(",")
    assert "compress" in names
    assert "compress_page" not in names  # off by default
    assert (
        server_process.environment({"VLLM_PLUGINS": "compress,x"})["VLLM_PLUGINS"] == "compress,x"
    )
    path = server_process.environment({"PATH": "/bin"})["PATH"].split(os.pathsep)
    assert path == [str(Path(sys.executable).parent), "/bin"]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        (None, "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::1", "http://[::1]:80"),
        ("gpu7", "http://gpu7:80"),
    ],
)
def test_a_client_is_told_an_address_that_it_can_use(host: str | None, url: str) -> None:
    address = Address(host, 80, secure=False, path=None)
    assert address.url == url
    assert replace(address, secure=True).url == url.replace("http", "https")


@pytest.mark.parametrize("form", ["a preset", "flags", "JSON", "a file"])
def test_bases_are_named_in_whatever_form_the_policy_was(tmp_path: Path, form: str) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(presets.text("small"))
    kv = {"kv": {"policy": "cskv"}}
    given = {
        "a preset": presets.flags("small"),
        "flags": [f"{KV}.policy", "cskv", f"{KV}.recent=32"],
        "JSON": ["--additional_config", json.dumps({KEY: kv, "other": {"a": 1}})],
        "a file": ["--config", str(file)],
    }[form]
    parsed = launch.parse(["M", *given, "--port", "8001"])
    assert lacks_bases(parsed.additional_config)
    assert missing.whole(parsed.additional_config)[KEY]["kv"]["keep"] == 1
    assert additional_config_of(["M", *given]) == parsed.additional_config
    config = dict(parsed.additional_config)
    config[KEY] = config[KEY] | {"kv": config[KEY]["kv"] | {"bases": "b"}}
    again = launch.parse(with_additional_config(["M", *given, "--port", "8001"], config))
    assert again.additional_config == config
    assert again.port == 8001 and again.quantization == parsed.quantization


@pytest.mark.parametrize(
    "line",
    [
        [*presets.flags("safe"), KV, '{"keep": 0.25}'],
        [KV, '{"keep": 0.5, "pool": 1}', f"{KV}.policy=snap_kv", f"{KV}.keep", "0.25"],
        [f"{KV}.a", "[1]", f"{KV}.a", "[2]", "--additional-config.other", "x"],
        [f"{KV}.keep", "0.5", f"{KV}", "null"],
    ],
)
def test_dotted_flags_are_joined_as_vllm_joins_them(line: list[str]) -> None:
    assert additional_config_of(["M", *line]) == launch.parse(["M", *line]).additional_config


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("M --api-key a b --port 1", "M --api-key *** *** --port 1"),
        ("M --api_key=a --hf-token=b --port=1", "M --api_key=*** --hf-token=*** --port=1"),
        ("M --hf-token --port 1", "M --hf-token --port 1"),
    ],
)
def test_keys_are_not_shown(line: str, shown: str) -> None:
    assert without_secrets(line.split()) == shown.split()


def test_dotted_keys_of_a_file_are_left_to_vllm(tmp_path: Path) -> None:
    file = tmp_path / "kv.yaml"
    file.write_text(f"additional_config.{KEY}.kv.policy: snap_kv\n")
    line = ["M", "--config", str(file), f"{KV}.keep", "0.25"]
    kv = {"policy": "snap_kv", "keep": 0.25}
    assert launch.parse(line).additional_config == {KEY: {"kv": kv}}
    assert additional_config_of(line) is None


SERVER = """if True:
    import http.server, os, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(os.getpid(), child.pid, flush=True)
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
        log_message = lambda *_: None
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("ending", ["a broken pipe", "SIGTERM", "SIGHUP"])
def test_no_process_outlives_the_command(
    busy_port: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not for this machine
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = Address("127.0.0.1", port, secure=False, path=None)

    def ready() -> None:
        if ending == "a broken pipe":
            raise SystemExit(1)  # as rich does
        os.kill(os.getpid(), getattr(signal, ending))

    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        if ending == "a broken pipe":
            with pytest.raises(SystemExit):
                server_process.run([sys.executable, "-c", SERVER, str(port)], address, {}, ready)
        else:
            code = server_process.run([sys.executable, "-c", SERVER, str(port)], address, {}, ready)
            assert code == 128 + signal.SIGTERM
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, before[number])
    processes = list(map(int, capfd.readouterr().out.split()))
    assert len(processes) == 2
    deadline = time.monotonic() + 10
    while any(map(running, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


# While vLLM's engine starts, its first process acts on no SIGINT, but its workers end of it.
STARTING = """if True:
    import signal, subprocess, sys, time
    mode, file, port = sys.argv[1:]
    deaf = "trap '' INT TERM; " if mode != "workers end" else ""
    child = subprocess.Popen(["sh", "-c", f"{deaf}echo ready; sleep 600"], stdout=subprocess.PIPE)
    child.stdout.readline()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    if mode == "listens":
        import socket
        listener = socket.create_server(("127.0.0.1", int(port)))
    open(file, "w").write(str(child.pid))
    sys.exit(child.wait())
"""


@pytest.mark.parametrize(
    ("mode", "grace", "signals"),
    [("workers end", 60, 1), ("deaf", 0.3, 1), ("listens", 0.3, 2)],
)
def test_ctrl_c_ends_a_server_that_does_not_act_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, grace: float, signals: int
) -> None:
    """All of its processes get it while it starts; afterwards only from the second one on."""
    monkeypatch.undo()
    monkeypatch.setattr(server_process, "_GRACE", grace)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = Address("127.0.0.1", port, secure=False, path=None)
    monkeypatch.setattr(Address, "answers", lambda _: False)
    file, sent = tmp_path / "pid", []

    def interrupt() -> None:
        while not (file.exists() and file.read_text()):
            time.sleep(0.05)
        for _ in range(signals):
            time.sleep(1)
            sent.append(running(int(file.read_text())))
            os.kill(os.getpid(), signal.SIGINT)

    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    program = [sys.executable, "-c", STARTING, mode, str(file), str(port)]
    thread = threading.Thread(target=interrupt)
    thread.start()
    started = time.monotonic()
    try:
        code = server_process.run(program, address, {"PATH": os.environ["PATH"]}, pytest.fail)
    finally:
        thread.join()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, before[number])
    assert code == 128 + signal.SIGINT
    assert sent == [True] * signals  # the first one did not end what listens
    assert time.monotonic() - started < 30
    assert not running(int(file.read_text()))


def test_an_interrupted_server_is_not_said_to_write(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(early, "refuse_early", interrupted)
    code, _, errors = run("serve", "./model")
    assert (code, errors) == (130, "interrupted; no server is left running\n")


def running(process: int) -> bool:
    """Whether a process has not ended; one that nobody waited for has."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_figures_are_promised_where_something_is_compressed(
    run: Callable, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_process, "run", lambda *given: given[-1]() or 0)
    ours = (f"{KV}.policy", "recent", f"{KV}.keep", "0.5")
    for flags, told, other in (
        ((), "nothing is compressed", "vllm-compress status"),
        (ours, "vllm-compress status", "nothing is compressed"),
    ):
        code, output, errors = run("serve", model, "--max-model-len", 256, *flags)
        assert code == 0, errors
        assert told in output and other not in output


@pytest.mark.slow
def test_it_serves_what_it_says_and_stops_at_once(demo_model: Path, tmp_path: Path) -> None:
    """The smallest preset, whose bases are fitted first. Its own request is sent as printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm_plugin.cli", "serve", str(demo_model)]
    command += ["--preset", "small", "--port", str(port), "--max-model-len", "512"]
    command += ["--enforce-eager", "--served-model-name", "demo"]
    log = tmp_path / "log"
    with log.open("w") as written:
        process = subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT)
        try:
            while "undo:" not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(1)
            request = re.search(r"try it: +(curl .*)", log.read_text())
            assert request is not None
            answer = subprocess.run(shlex.split(request[1]), capture_output=True, check=True)
            assert json.loads(answer.stdout)["choices"][0]["text"]
            figures = subprocess.run(
                [*command[:3], "status", f"http://127.0.0.1:{port}", "--json"],
                capture_output=True,
                check=True,
            )
            assert b"cskv" in figures.stdout and b"smoothquant_plus" in figures.stdout
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) in (0, 128 + signal.SIGINT)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
