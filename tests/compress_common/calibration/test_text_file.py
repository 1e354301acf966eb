# SPDX-License-Identifier: Apache-2.0
"""A calibration file works, or one sentence names the file and the line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from compress_common.calibration.text import CalibrationSettings, file_tokens
from compress_common.calibration.text_file import read_tokens
from compress_common.errors import CompressError

HELLO = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Callable[..., Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model("llama"))


def row(content: object) -> bytes:
    return json.dumps(content).encode()


def messages(content: object) -> bytes:
    return row({"messages": [{"role": "user", "content": content}]})


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"txt": "x"}', "needs a 'text' or a 'messages' key"),
        (b'["text"]', "needs a 'text' or a 'messages' key"),
        (b"3", "needs a 'text' or a 'messages' key"),
        (b"{", "is not JSON: "),
        (b'{"text": null}', "'text' must be a string, got null"),
        (b'{"text": 7}', "'text' must be a string, got 7"),
        (b'{"text": ["a"]}', "'text' must be a string, got"),
        (b'{"messages": "hi"}', "'messages' must be a list of messages"),
        (b'{"messages": []}', "'messages' must be a list of messages"),
        (b'{"messages": ["hi"]}', r"messages\[0\] must be an object with 'role' and 'content'"),
        (messages(None), "'content' must be a string or a list of text parts, got null"),
        (messages([{"type": "image_url"}]), "only content parts of type 'text' are read"),
        (b'{"text": "\xff"}', "is not UTF-8 text"),
    ],
)
def test_a_bad_line_is_named(tokenizer: Any, tmp_path: Path, line: bytes, error: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(row({"text": "fine"}) + b"\n\n" + line + b"\n")
    with pytest.raises(CompressError, match=f"a.jsonl:3.*{error}") as caught:
        read_tokens(str(file), tokenizer)
    assert "\n" not in str(caught.value)


def test_tokenizers_need_no_options_of_transformers(tokenizer: Any, tmp_path: Path) -> None:
    """vLLM's MistralTokenizer takes ``add_special_tokens`` and no ``verbose``."""

    class Strict:
        eos_token_id, chat_template = tokenizer.eos_token_id, tokenizer.chat_template
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            return tokenizer(text, add_special_tokens=add_special_tokens)

    (tmp_path / "a.txt").write_text("Hello there")
    (tmp_path / "a.jsonl").write_bytes(row({"text": "Hello"}) + b"\n" + messages("there"))
    for file in ("a.txt", "a.jsonl"):
        expected = read_tokens(str(tmp_path / file), tokenizer)
        assert read_tokens(str(tmp_path / file), Strict()) == expected != []


def test_files_that_are_none(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="is a folder, not a file"):
        read_tokens(str(tmp_path), tokenizer)
    with pytest.raises(CompressError, match="is not a file"):
        read_tokens(str(tmp_path / "none.txt"), tokenizer)
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).write_text("")
        settings = CalibrationSettings(source=str(tmp_path / name), samples=2, length=16)
        with pytest.raises(CompressError, match=f"{name} has 0 tokens, 32 are needed"):
            file_tokens(settings, tokenizer)


def test_messages_are_rendered_by_the_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    """With the special tokens of the template, and no others."""
    expected = tokenizer.apply_chat_template(HELLO, tokenize=True, return_dict=False)
    for content in ("Hello there", [{"type": "text", "text": p} for p in ("Hello", " there")]):
        (tmp_path / "a.jsonl").write_bytes(messages(content))
        got = read_tokens(str(tmp_path / "a.jsonl"), tokenizer)
        assert got == [*expected, tokenizer.eos_token_id]


def test_no_chat_template(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    bare = AutoTokenizer.from_pretrained(tiny_model("llama"))
    bare.chat_template = None
    (tmp_path / "a.jsonl").write_bytes(row({"messages": HELLO}))
    with pytest.raises(CompressError, match="a.jsonl:1 has 'messages'.*no chat template"):
        read_tokens(str(tmp_path / "a.jsonl"), bare)
    bare.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CompressError, match="a.jsonl:1: the chat template refuses.*alternate"):
        read_tokens(str(tmp_path / "a.jsonl"), bare)


def test_lines_end_at_newlines_only(tokenizer: Any, tmp_path: Path) -> None:
    """JSON may hold U+2028 as it is, and Windows editors begin a file with a mark."""
    text = json.dumps({"text": "one\u2028two"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    ids = tokenizer("one\u2028two")["input_ids"]
    assert read_tokens(str(tmp_path / "a.jsonl"), tokenizer) == [*ids, tokenizer.eos_token_id]
