# SPDX-License-Identifier: Apache-2.0
"""`vllm-compress recommend`: the choice, what is looked up and what is measured, its refusals."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from vllm_plugin.capacity.blocks import RequestBlocks
from vllm_plugin.commands.judging.engine import Judged
from vllm_plugin.commands.judging.questions import WORDINGS
from vllm_plugin.commands.recommending.candidates import Setting, settings
from vllm_plugin.commands.recommending.frontier import Candidate, choose, frontier
from vllm_plugin.commands.recommending.known import Known
from vllm_plugin.commands.recommending.memory import Size
from vllm_plugin.presets import PRESETS

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        name=st.text(max_size=3),
        needs=st.integers(1, 30),
        loss=st.integers(-5, 30).map(lambda n: n / 10),
        error=st.integers(0, 10).map(lambda n: n / 10),
        forgets=st.booleans(),
    ),
    min_size=1,
    max_size=9,
)


@given(CANDIDATES)
def test_the_frontier_beats_everything_else(candidates: list[Candidate]) -> None:
    chain = frontier(candidates)
    assert set(chain) <= set(candidates)
    for smaller, larger in zip(chain, chain[1:], strict=False):
        assert smaller.needs < larger.needs and smaller.risk > larger.risk
    for candidate in candidates:
        assert any(c.needs <= candidate.needs and c.risk <= candidate.risk for c in chain)


@given(CANDIDATES, st.integers(0, 35), st.integers(0, 10))
def test_a_choice_fits_and_more_memory_makes_it_safer(
    candidates: list[Candidate], memory: int, more: int
) -> None:
    chain = frontier(candidates)
    chosen = choose(chain, memory)
    if chosen is None:
        assert all(candidate.needs > memory for candidate in candidates)
        return
    taken = chain[chosen]
    assert taken.needs <= memory
    fitting = [candidate for candidate in candidates if candidate.needs <= memory]
    safest = min(fitting, key=lambda candidate: candidate.risk)
    assert taken.forgets == safest.forgets
    assert taken.loss - taken.error <= safest.loss
    larger = choose(chain, memory + more)
    assert larger is not None
    assert chain[larger].needs >= taken.needs and chain[larger].risk <= taken.risk


def test_what_is_within_its_error_is_equal_and_lost_keys_are_not() -> None:
    whole = Candidate("whole", 30, 0.0)
    half = Candidate("half", 20, 0.05, 0.06)
    quarter = Candidate("quarter", 10, 0.04, 0.06, forgets=True)
    assert choose(frontier([whole, half, quarter]), 30) == 1
    assert choose(frontier([whole, replace(half, error=0.04), quarter]), 30) == 2
    assert choose(frontier([whole, half, quarter]), 19) == 0  # nothing else fits
    assert choose(frontier([whole, half, quarter]), 9) is None


def test_presets_are_among_the_settings() -> None:
    known = [setting.preset for setting in settings()]
    assert set(PRESETS) <= set(known)
    for setting in settings():
        command = setting.command("M", "--max-model-len", "9").split()
        assert command[-2:] == ["--max-model-len", "9"] and "M" in command
        assert ("--preset" in command) == (setting.preset is not None)
    assert Setting("16 bits", "full cache").command("M") == "vllm serve M"
    assert Setting("16 bits", "cskv").command("M").startswith("vllm-compress serve M ")


class Engines:
    """Stands for the processes that measure: settings that keep less lose more."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.left = 99

    def judge(
        self,
        model: str,
        given: Any,
        engine_args: dict[str, Any],
        name: str,
        measures: Any,
        environment: Any,
    ) -> Judged:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked.append(name.partition("(")[2].rstrip(")"))
        kv = engine_args.get("additional_config", {}).get("compress", {}).get("kv", {})
        worse = 1 - kv.get("keep", 0.9 if kv else 1)
        loss = worse / 10 + (0.1 if engine_args.get("quantization") else 0)
        nats = [[2.0 + loss * (1 + at / 10)] * 3 for at in range(4)]
        right = {name: [True, worse < 0.6] for name in WORDINGS}
        return Judged(right, {}, nats, nats)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engines:
    """No engine runs, and what "was measured" stays in a store of this test."""
    from vllm_plugin.commands import missing
    from vllm_plugin.commands.recommending import losses

    made = Engines()
    monkeypatch.setattr(losses, "judge", made.judge)
    monkeypatch.setattr(missing, "SAMPLES", 4)  # of text that bases are fitted to
    monkeypatch.setattr(missing, "LENGTH", 64)
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    return made


def test_it_measures_once_and_goes_on_after_an_interruption(
    run: Callable, tiny_model: Callable[..., Path], engines: Engines
) -> None:
    model = tiny_model("llama")
    arguments = ("recommend", model, "--gpu-memory", "4GiB", "--context", 2000, "--json")
    engines.left = 2
    code, output, err = run(*arguments)
    assert (code, output) == (130, "")
    assert "run the same command again to continue" in err
    first, engines.left = list(engines.asked), 99
    code, output, err = run(*arguments)
    assert code == 0, err
    assert len(engines.asked) == len(set(engines.asked)) and engines.asked[:2] == first
    found = json.loads(output)
    names = [row["setting"] for row in found["settings"]]
    assert len(names) + len(found["left_out"]) == len(settings())
    assert found["take"] == "16 bits, full cache" and found["safer"] is None
    by_name = {row["setting"]: row for row in found["settings"]}
    both = by_name["int4, snap_kv 0.5"]
    assert both["preset"] == "balanced" and "--preset balanced" in both["command"]
    assert both["nats"] == pytest.approx(both["weights"]["nats"] + both["cache"]["nats"])
    assert both["nats"] == pytest.approx(0.15 * 1.15)
    assert not both["forgets"] and by_name["16 bits, snap_kv 0.25"]["forgets"]
    # All is known now, in less memory and with more requests too.
    count = len(engines.asked)
    tight = by_name["16 bits, full cache"]["needs_bytes"] + 1
    script = """if True:
        import sys
        from vllm_plugin import cli
        from vllm_plugin.commands import missing
        missing.SAMPLES, missing.LENGTH = 4, 64
        try:
            cli.main()
        except SystemExit as end:
            assert not end.code
        print("vllm" in sys.modules)
    """
    words = ["recommend", str(model), "--gpu-memory", f"{tight}B", "--context", "2000"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    # What compaction works in is more than such a small cache.
    assert "take 16 bits, full cache:" in done.stdout and "smaller, " in done.stdout
    assert "measured on this machine before" in done.stdout
    assert len(engines.asked) == count
    code, _, err = run(*arguments[:2], "--gpu-memory", "1MiB", "--context", "2000")
    assert code == 1
    assert "no setting serves 1 request of 2,000 tokens in 0.00 GiB: the smallest, " in err
    assert "int4, full cache, serves 0" in err
    assert len(engines.asked) == count


def test_bases_are_fitted_last(
    tiny_model: Callable[..., Path],
    engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """What can be refused without bases is, before they are fitted. Measurements are counted."""
    from vllm_plugin.commands import missing, recommendation

    checked: list[Any] = []
    fitted: list[bool] = []
    told: list[tuple[int, int]] = []

    def bases(*_: Any, **__: Any) -> Path:
        fitted.append(True)
        raise CompressError("no bases for this model")

    def progress(step: str, done: int, total: int) -> None:
        if step.startswith("measure"):
            told.append((done, total))

    monkeypatch.setattr(recommendation, "_check", lambda *given: checked.append(given[3]))
    monkeypatch.setattr(missing, "default_bases", bases)
    model, text = str(tiny_model("llama")), tmp_path / "short.txt"
    text.write_text("too short")
    wanted = recommendation.Wanted(4 << 30, 0.92, 2000, 1750, 1)
    with pytest.raises(CompressError, match="the smallest, but for cskv, int4, "):
        recommendation.recommend(model, replace(wanted, memory=1 << 20))
    with pytest.raises(CompressError, match="tokens, .* are needed"):
        recommendation.recommend(model, wanted, text)
    assert not fitted and not engines.asked
    assert {"policy": "cskv", "keep": 1} in checked
    found = recommendation.recommend(model, wanted, progress=progress)
    assert len(fitted) == 1 and [*found.left_out.values()] == ["no bases for this model"] * 2
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_a_refusal_is_not_kept(
    tiny_model: Callable[..., Path], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reason can be a package that is missing today."""
    from compress_common.progress import silent
    from vllm_plugin.commands import recommendation
    from vllm_plugin.commands.judging import checks

    checkpoint = Checkpoint(tiny_model("llama"))
    answers: list[list[str]] = [["No module named 'x'"], []]
    monkeypatch.setattr(checks, "check_installation", lambda: None)
    monkeypatch.setattr(checks, "refused", lambda *_: answers.pop(0))
    wanted = recommendation.Wanted(4 << 30, 0.92, 2000, 1750, 1)
    given = (Known(checkpoint), checkpoint, settings()[0], None, wanted, silent)
    with pytest.raises(CompressError, match="No module named 'x'"):
        recommendation._check(*given)
    recommendation._check(*given)
    recommendation._check(*given)  # known: there is no third answer
    assert not answers


@pytest.mark.parametrize(
    ("concurrency", "flags"),
    [
        (128, []),
        (300, ["--max-num-seqs", "300"]),
        (3000, ["--max-num-seqs", "3000", "--max-num-batched-tokens", "8192"]),
    ],
)
def test_the_command_runs_as_many_requests_as_were_counted(
    concurrency: int, flags: list[str]
) -> None:
    from vllm_plugin.commands.recommend import _command
    from vllm_plugin.commands.recommendation import Row, Wanted
    from vllm_plugin.commands.recommending.losses import Loss

    size = Size(0, 1, RequestBlocks(1, 1), 0.92)
    row = Row(Setting("16 bits", "full cache"), size, Loss(), Loss())
    command = _command("M", row, Wanted(1 << 30, 0.92, 2000, 1750, concurrency))
    assert command.split() == ["vllm", "serve", "M", "--max-model-len", "2000", *flags]


def test_everything_wrong_is_said_at_once(
    run: Callable, tiny_model: Callable[..., Path], engines: Engines
) -> None:
    arguments = ("--gpu-memory", "24", "--context", "1k", "--prompt", "2k", "--text", "nowhere.txt")
    code, _, err = run("recommend", "./nowhere", *arguments, "--plot", "x.nothing")
    assert code == 1
    for problem in (
        "./nowhere does not exist",
        "--gpu-memory '24' has no unit",
        "--prompt 2000 leaves no room",
        "--text nowhere.txt is not a file",
        "--plot x.nothing has an unknown kind",
    ):
        assert problem in err, (problem, err)
    code, _, err = run("recommend", tiny_model("llama"), "--gpu-memory", "4GiB", "--context", "1M")
    assert "1,000,000 is more than the model's 2,048 positions" in err
    assert not engines.asked


def test_a_quantized_model_is_refused_before_its_weights_are_hashed(
    run: Callable, tiny_model: Callable[..., Path], engines: Engines, tmp_path: Path
) -> None:
    model = tmp_path / "int4"
    shutil.copytree(tiny_model("llama"), model)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (model / "config.json").write_text(json.dumps(config))
    code, _, err = run("recommend", model, "--gpu-memory", "4GiB", "--context", "1M")
    assert code == 1
    assert "is quantized already" in err and "2,048 positions" in err
    assert not Checkpoint(model).digests_are_known()


def test_what_doctor_refuses_is_left_out(
    run: Callable, tiny_model: Callable[..., Path], engines: Engines
) -> None:
    """Every layer has a sliding window: no policy can act."""
    model = tiny_model("mistral", sliding_window=64)
    code, output, err = run(
        "recommend", model, "--gpu-memory", "4GiB", "--context", "2000", "--json"
    )
    assert code == 0, err
    found = json.loads(output)
    assert {row["setting"] for row in found["settings"]} == {
        "16 bits, full cache",
        "int4, full cache",
    }
    assert len(found["left_out"]) == 6
    assert all("full attention" in reason for reason in found["left_out"].values())


@pytest.mark.slow
def test_the_demo_model_gets_figures(run: Callable, demo_model: Path, tmp_path: Path) -> None:
    arguments = ("recommend", demo_model, "--context", "4000", "--concurrency", 8)
    code, output, err = run(
        *arguments, "--gpu-memory", "2GiB", "--json", "--plot", tmp_path / "frontier.png"
    )
    assert code == 0, err
    found = json.loads(output)
    assert not found["left_out"] and (tmp_path / "frontier.png").is_file()
    rows = {row["setting"]: row for row in found["settings"]}
    assert rows["16 bits, full cache"]["nats"] == 0
    assert 0.05 < rows["int4, full cache"]["nats"] < 0.2
    half, quarter = (rows[f"16 bits, snap_kv {keep}"] for keep in (0.5, 0.25))
    assert half["nats"] < quarter["nats"] < 0.5
    assert rows["16 bits, cskv"]["needs_bytes"] < quarter["needs_bytes"] < half["needs_bytes"]
    taken = rows[found["take"]]
    assert taken["needs_bytes"] <= 2 << 30 and taken["requests"] >= 8
