# SPDX-License-Identifier: Apache-2.0
"""``status`` against servers that are not as it expects. Of real engines: ``metrics/``."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.support.fixed_server import answering

INFO = (
    'vllm_compress_info{engine="%s",model_name="%s",version="1",policy="snap_kv",keep="0.25",'
    'budget="none",levels="1",decode_window="64",profile="none",method="none"} 1.0\n'
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "/metrics: HTTP 404; give the URL of the server"),
        ("<html>\n", "does not answer in Prometheus's format"),
        ('vllm:num_requests_running{engine="0",model_name="m"} 1.0\n', "no compression"),
    ],
)
def test_not_a_compressed_server(run: Callable, text: str | None, expected: str) -> None:
    with answering({} if text is None else {"/metrics": text}) as url:
        status, _, errors = run("status", url)
    assert status == 1 and expected in errors and errors.count("\n") == 1


def test_nobody_answers(run: Callable) -> None:
    with answering({}) as url:
        pass
    code, _, errors = run("status", url)
    assert code == 1 and f"no metrics at http://{url}/metrics: " in errors


@pytest.mark.parametrize("form", ["%s", "http://%s", "http://%s/", "%s/metrics", "http://%s/v1"])
def test_forms_of_a_url(run: Callable, form: str) -> None:
    with answering({"/metrics": INFO % (0, "m")}) as url:
        code, printed, _ = run("status", form % url)
    assert code == 0 and "snap_kv, keep 0.25" in printed


def test_a_prompt_window_is_told(run: Callable) -> None:
    """The other tests' servers are older: they have no such label."""
    budget = INFO.replace('keep="0.25",budget="none"', 'keep="none",budget="64",prompt_window="96"')
    with answering({"/metrics": budget % (0, "m")}) as url:
        code, printed, _ = run("status", url)
    assert code == 0 and "snap_kv, budget 64, prompt window 96" in printed


def test_a_single_segment_is_singular(run: Callable) -> None:
    name = 'vllm_compress_kv_compactions_total{engine="0",model_name="m",segment="%s"} %s\n'
    text = INFO % (0, "m") + name % ("prompt", 1) + name % ("window", 2)
    with answering({"/metrics": text}) as url:
        assert "1 prompt, 2 windows" in run("status", url)[1]


def test_engines_of_a_model_add_up_and_models_stay_apart(run: Callable) -> None:
    """As behind data parallelism, and as Ray's agent names them."""
    count = (
        'ray_vllm_compress_kv_skipped_requests_total{engine="%s",model_name="%s",reason="%s"} %s\n'
    )
    text = "".join("ray_" + INFO % key for key in ((0, "a"), (1, "a"), (0, "b")))
    text += count % (0, "a", "short_prompt", 2) + count % (1, "a", "short_prompt", 3)
    text += count % (0, "b", "opted_out", 1)
    text += 'ray_vllm_compress_kv_eligible_requests_total{engine="0",model_name="b"} 4\n'
    with answering({"/metrics": text}) as url:
        first, second = json.loads(run("status", url, "--json")[1])
        table = run("status", url)[1]
    assert (first["model"], first["engines"]) == ("a", 2) and second["model"] == "b"
    assert first["metrics"]["kv_skipped_requests"] == {"short_prompt": 5}
    (warning,) = first["warnings"]
    assert "nothing of a was compacted yet: 5 too short to compact" in warning
    assert warning in table
    assert not second["warnings"] and "4 compacted, 1 opted out" in table


@pytest.mark.parametrize("end", ["raise KeyboardInterrupt", "os._exit(130)"])
def test_watching_prints_again_until_it_is_interrupted(end: str) -> None:
    """Into a pipe too, and at once: os._exit drops what was not flushed."""
    program = (
        "import os, sys, time; from vllm_plugin.commands import status, served_figures as s; "
        "calls = []\n"
        "def fetch(url):\n"
        "    calls.append(url)\n"
        f"    if len(calls) == 3: {end}\n"
        f"    return {INFO % (0, 'm')!r}\n"
        "s.fetch = fetch\n"
        "from vllm_plugin import cli\n"
        "sys.argv = ['vllm-compress', 'status', 'x', '--watch', '0.2']\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert done.stdout.count("snap_kv") == 2


def test_json_and_watch_exclude_each_other(run: Callable) -> None:
    code, _, errors = run("status", "--json", "--watch", "5")
    assert code == 1 and "--json prints once; leave out --watch" in errors
