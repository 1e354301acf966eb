# SPDX-License-Identifier: Apache-2.0
"""A text that every Python has: technical prose of today."""

from compress_common.errors import CompressError


def reference() -> str:
    """Return the language reference that ``help()`` of Python shows.

    Raises:
        CompressError: this Python was installed without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CompressError(
            "this Python has no language reference to judge on (pydoc_data); give --text"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))
