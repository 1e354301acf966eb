# SPDX-License-Identifier: Apache-2.0
"""The exception of this package that reaches users as a message without a traceback."""


class KVPolicyError(ValueError):
    """A problem the user can fix: the text says what was found, what is allowed, what to change."""


def joined(problems: list[str]) -> KVPolicyError:
    """One error that lists every problem found."""
    if len(problems) == 1:
        return KVPolicyError(problems[0])
    return KVPolicyError(f"{len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems))
