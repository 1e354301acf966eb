# SPDX-License-Identifier: Apache-2.0
"""Every command in the documents is one that its program accepts."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer
import yaml
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_plugin import cli
from vllm_plugin.settings import KEY, parse_settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TYPER = typer.main.get_command(cli.app)


def commands(document: Path) -> Iterator[list[str]]:
    """Each command in a console block, without its comment and its environment."""
    text = document.read_text(encoding="utf-8")
    for block in re.findall(r"```(?:console|bash)\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                yield words


@cache
def serve_parser() -> FlexibleArgumentParser:
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    return parser


def additional_config(*words: str) -> dict:
    """What `vllm serve` makes of its command line."""
    return serve_parser().parse_args(["serve", *words]).additional_config or {}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_program_accepts_them(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = document.read_text(encoding="utf-8")
    for name, content in re.findall(r"```yaml\n# (\w+\.yaml)\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(content)
    for program, *words in commands(document):
        if program == "vllm" and words[0] == "serve":
            config = additional_config(*words[1:])
            parse_settings(config)
            assert set(config) <= {KEY}
        elif program == "vllm-compress":
            with TYPER.make_context(cli.NAME, words) as context:
                name, command, rest = TYPER.resolve_command(context, words)  # type: ignore[attr-defined]
                with command.make_context(name, rest, parent=context):
                    pass


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_modules_and_tests_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"python -m (benchmarks[.\w]*)", text):
        assert importlib.util.find_spec(name), name
    for name in re.findall(r"`((?:tests|docs|deploy|benchmarks|tools)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text):
        assert (document.parent / name).exists(), name


def test_dotted_flags_json_and_a_file_are_the_same(tmp_path: Path) -> None:
    kv = {"policy": "snap_kv", "keep": 0.25}
    prefix = "--additional-config.compress.kv"
    dotted = additional_config("M", f"{prefix}.policy", "snap_kv", f"{prefix}.keep", "0.25")
    assert dotted == {KEY: {"kv": kv}}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"model": "M", "additional-config": {KEY: {"kv": kv}}}))
    from_file = additional_config("--config", str(file))
    assert from_file == {KEY: {"kv": kv}}
