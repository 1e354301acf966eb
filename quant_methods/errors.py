# SPDX-License-Identifier: Apache-2.0
"""The one exception type that reaches users as a message without a traceback."""


class CompressError(ValueError):
    """A problem the user can fix: the text says what was found, what is allowed, what to change."""


def joined(problems: list[str]) -> CompressError:
    """One error that lists every problem found."""
    if len(problems) == 1:
        return CompressError(problems[0])
    return CompressError(f"{len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems))
