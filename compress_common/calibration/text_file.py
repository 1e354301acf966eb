# SPDX-License-Identifier: Apache-2.0
"""Calibration text from a file: plain text, or one JSON object a line. Errors name the line."""

import json
from pathlib import Path
from typing import Any

from compress_common.errors import CompressError


def read_tokens(source: str, tokenizer: Any) -> list[int]:
    """Return all tokens of a file. Documents of a JSONL file are joined by the end token.

    Args:
        source: Path of a text file, or of a ``.jsonl`` file with a ``text`` or a ``messages`` key
            on each line.
        tokenizer: A ``transformers`` tokenizer. Messages are rendered with its chat template.

    Raises:
        CompressError: The file cannot be read, or a line is not as above.
    """
    path = Path(source).expanduser()
    text = read_file(path, "calibration text", "give 'self' or the path of a .txt or .jsonl file")
    if path.suffix.lower() != ".jsonl":
        return list(tokenizer(text)["input_ids"])
    ids: list[int] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            ids += _row_tokens(f"{path}:{number}", line, tokenizer)
            if tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
    return ids


def read_file(path: Path, what: str, hint: str) -> str:
    """Return the text of a file in UTF-8.

    Args:
        path: The file.
        what: What it holds, for messages.
        hint: What to give instead.

    Raises:
        CompressError: There is no such file, or it cannot be read.
    """
    if path.is_dir():
        raise CompressError(f"{what} {path} is a folder, not a file; {hint}")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CompressError(f"{what} {path} is not a file; {hint}") from error
    except OSError as error:
        raise CompressError(f"cannot read {what} {path}: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise CompressError(f"{path}:{line} is not UTF-8 text: {error.reason}") from error


def _row_tokens(where: str, line: str, tokenizer: Any) -> list[int]:
    """The tokens of one line of a JSONL file."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise CompressError(f"{where} is not JSON: {error.msg}") from error
    if not isinstance(row, dict) or not ({"messages", "text"} & row.keys()):
        raise CompressError(f"{where} needs a 'text' or a 'messages' key")
    if "messages" not in row:
        if not isinstance(row["text"], str):
            raise CompressError(f"{where}: 'text' must be a string, got {shown(row['text'])}")
        return list(tokenizer(row["text"])["input_ids"])
    messages = _messages(where, row["messages"])
    if not getattr(tokenizer, "chat_template", None):
        raise CompressError(
            f"{where} has 'messages', but the tokenizer has no chat template; give 'text' instead"
        )
    try:
        document = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # whatever the template raises, jinja's errors included
        reason = str(error).strip().splitlines()[0]
        raise CompressError(f"{where}: the chat template refuses the messages: {reason}") from error
    # The template has written the special tokens.
    return list(tokenizer(document, add_special_tokens=False)["input_ids"])


def _messages(where: str, given: Any) -> list[dict[str, str]]:
    """Validate messages. Content parts of type ``text`` are joined."""
    if not isinstance(given, list) or not given:
        raise CompressError(f"{where}: 'messages' must be a list of messages, got {shown(given)}")
    messages = []
    for index, message in enumerate(given):
        at = f"{where}: messages[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise CompressError(
                f"{at} must be an object with 'role' and 'content', got {shown(message)}"
            )
        messages.append(message | {"content": _content(at, message.get("content"))})
    return messages


def _content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise CompressError(
            f"{where}: 'content' must be a string or a list of text parts, got {shown(content)}"
        )
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise CompressError(
                f"{where}: only content parts of type 'text' are read, got {shown(part)}"
            )
        texts.append(text)
    return "".join(texts)


def shown(value: Any) -> str:
    """Return JSON of at most 60 characters, for messages."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
