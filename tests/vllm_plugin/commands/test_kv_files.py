# SPDX-License-Identifier: Apache-2.0
"""What ``profile`` and ``calibrate-kv`` share: options, refusals, and whole files or none."""

import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from compress_common.calibration.text import CalibrationSettings
from compress_common.errors import CompressError
from kv_policies.budget.profile import Profile
from kv_policies.latents.bases import Bases
from vllm_plugin.commands.profiling.kv_bases import make_bases
from vllm_plugin.commands.profiling.kv_profile import make_profile


class Command(NamedTuple):
    """A command, its option that has no default, and what it makes."""

    name: str
    share: str
    file: type
    make: Callable[..., Any]
    samples: int
    length: int

    def line(self, model: object, *more: object) -> tuple[object, ...]:
        """A command line of seconds. Later options overrule earlier ones."""
        quick = ("--samples", self.samples, "--length", self.length)
        return (self.name, model, self.share, "0.8", *quick, *more)


PROFILE = Command("profile", "--keep", Profile, make_profile, 2, 48)
BASES = Command("calibrate-kv", "--ratio", Bases, make_bases, 8, 64)
both = pytest.mark.parametrize("command", [PROFILE, BASES], ids=lambda command: command.name)

# Options, and a part of the error.
BAD: dict[Command | None, list[tuple[str, str]]] = {
    None: [
        ("--samples 0", "--samples: "),
        ("--length 4000", "exceeds the model's 2048 positions"),
        ("--text missing.txt", "missing.txt is not a file"),
        ("--samples 400", "00 are needed"),
        ("--out missing/file", "writable folder"),
        ("--plot plot.xyz", "unknown kind of file"),
        ("--device abacus", "device abacus cannot be used"),
    ],
    PROFILE: [
        ("--keep 0", "must be in (0, 1], got 0"),
        ("--keep 1.5", "must be in (0, 1], got 1.5"),
        ("--keep much", "must be a number"),
        ("--keep 0.01", "raise the length to at least 100"),
        ("--levels 3", "2 layers cannot be cut into 3 levels"),
    ],
    BASES: [
        ("--ratio 1", "a number in [0, 1), got 1"),
        ("--ratio much", "a number in [0, 1), got much"),
        ("--bits 8", "--bits 8 has no format; allowed: 4, 16"),
        ("--ratio 0.5", "give a ratio from 0.71 to 0.97, or --bits 16"),
        ("--method snap_kv", "allowed: cskv"),
        ("--objective beauty", "allowed: reconstruction, attention"),
        ("--samples 3", "3 samples are too few"),
        ("--samples 4 --length 16", "48 tokens cannot tell 64 features apart"),
    ],
}
# An architecture of tests/conftest.py, what its config has, and a part of the error.
UNFIT: dict[Command | None, list[tuple[str, dict[str, Any], str]]] = {
    None: [
        ("mistral", {"sliding_window": 64}, "no layer with full attention"),
        ("llama", {"kv_lora_rank": 16}, "multi-head latent attention"),
        ("llama", {"is_encoder_decoder": True}, "encoder-decoder"),
        ("llama", {"num_kv_shared_layers": 1}, "share the KV cache"),
    ],
    BASES: [("llama", {"attn_logit_softcapping": 50.0}, "attention logits are capped")],
}


def cases(table: dict[Command | None, list[Any]]) -> list[Any]:
    return [
        pytest.param(command, *case, id=f"{command.name} {case[0]} {case[-1]}")
        for command in (PROFILE, BASES)
        for case in [*table[None], *table.get(command, [])]
    ]


@pytest.mark.parametrize(("command", "options", "expected"), cases(BAD))
def test_bad_options_are_one_line(
    run: Callable,
    tiny_model: Callable[..., Path],
    text: Path,
    command: Command,
    options: str,
    expected: str,
) -> None:
    code, output, errors = run(*command.line(tiny_model(), "--text", text, *options.split()))
    assert code == 1
    [line] = [line for line in errors.splitlines() if "error: " in line]
    assert expected in line
    assert not output
    assert sorted(Path().iterdir()) == [Path("text.txt")]


def test_all_bad_options_are_listed(run: Callable, tiny_model: Callable[..., Path]) -> None:
    wrong = ("--ratio", "2", "--bits", "3", "--method", "prefix_kv", "--objective", "beauty")
    code, _, errors = run(*BASES.line(tiny_model(), *wrong))
    assert code == 1
    assert "4 problems" in errors
    # Files come first: torch is not needed to look for them.
    _, _, errors = run(*BASES.line("/no/such/model", "--out", "a/b", "--plot", "c/d.png"))
    assert "3 problems" in errors and "a/b" in errors and "c/d.png" in errors


@both
def test_missing_model_and_missing_matplotlib(
    run: Callable, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    code, _, errors = run(*command.line("/no/such/model"))
    assert code == 1
    assert "does not exist" in errors
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, errors = run(*command.line("/no/such/model", "--plot", "p.png"))
    assert code == 1
    assert "pip install 'vllm-compress-plugin[plot]'" in errors


@both
def test_an_interrupted_write_leaves_the_old_file(
    run: Callable,
    tiny_model: Callable[..., Path],
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
) -> None:
    def half(self: object, path: Path) -> None:
        path.write_text("{")
        raise KeyboardInterrupt

    Path("old").write_text("old")
    monkeypatch.setattr(command.file, "save", half)
    code, _, errors = run(*command.line(tiny_model(), "--text", text, "--out", "old"))
    assert code == 130
    assert "interrupted; nothing was written" in errors
    assert Path("old").read_text() == "old"
    assert sorted(Path().iterdir()) == [Path("old"), Path("text.txt")]


@pytest.mark.parametrize(("command", "arch", "config", "expected"), cases(UNFIT))
def test_unfit_models_are_refused(
    tiny_model: Callable[..., Path], command: Command, arch: str, config: dict, expected: str
) -> None:
    folder = tiny_model(arch, **config)
    with pytest.raises(CompressError, match=expected):
        command.make(str(folder), Fraction(1, 2), CalibrationSettings())
