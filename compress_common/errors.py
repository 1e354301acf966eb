# SPDX-License-Identifier: Apache-2.0
"""The exception that users see as a message without a traceback, and how its text is made."""

from collections.abc import Iterable
from difflib import get_close_matches

from pydantic import ValidationError

MISSING = "is missing"  # what ``explain`` says at the end of a line about a required setting


class CompressError(ValueError):
    """A problem that the user can fix.

    The text says what was found, what is allowed and what to change.
    """

    _problems: list[str] | None = None

    @property
    def problems(self) -> list[str]:
        """Each problem on its own: several, where ``joined`` made the error."""
        return self._problems or [str(self)]


class LimitError(CompressError):
    """What this process lacks for a piece of work: memory, time. Another one may have it."""


def joined(problems: list[str]) -> CompressError:
    """Return one error that lists every problem.

    Args:
        problems: At least one line of text.
    """
    if len(problems) == 1:
        return CompressError(problems[0])
    error = CompressError(f"{len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems))
    error._problems = list(problems)
    return error


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` when a valid name is close, else an empty text.

    Args:
        name: What the user wrote.
        valid: The names that are allowed.
    """
    close = get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def explain(error: ValidationError, where: str, valid: Iterable[str]) -> list[str]:
    """Return one line for each problem of a pydantic error.

    Args:
        error: The error.
        where: Name of the section that was validated.
        valid: Keys of that section. The nearest is suggested for an unknown key.
    """
    valid = list(valid)
    lines = []
    for problem in error.errors():
        path = [where, *map(str, problem["loc"])]
        section, key, at = ".".join(path[:-1]), path[-1], ".".join(path)
        message, got = problem["msg"], problem["input"]
        if problem["type"] == "extra_forbidden":
            line = f"{section}: unknown setting {key!r}"
            if section == where:  # pydantic does not say what a nested section allows
                line += f"{nearest(key, valid)} (valid: {', '.join(valid) or 'none'})"
        elif problem["type"] == "missing":
            line = f"{section}: {key!r} {MISSING}"
        elif problem["type"] == "value_error":
            message = message.removeprefix("Value error, ")
            # A validator of a whole section gets all of it, and ours may say what they got.
            told = isinstance(got, dict) or ", got " in message
            line = f"{at}: {message}" if told else f"{at}: {message}, got {got!r}"
        else:
            line = f"{at}: {message}, got {got!r}"
        lines.append(line)
    return lines
