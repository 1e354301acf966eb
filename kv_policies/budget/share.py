# SPDX-License-Identifier: Apache-2.0
"""A share of the cache as users write it. Imports nothing large: commands check it first."""

from fractions import Fraction

from compress_common.errors import CompressError


def exact(keep: float | str | Fraction) -> Fraction:
    """The keep share as typed: 0.1, "0.1" and "1/10" are all one tenth; outside (0, 1] an error."""
    try:
        value = keep if isinstance(keep, Fraction) else Fraction(str(keep))
    except (ValueError, ZeroDivisionError):
        raise CompressError(f"keep must be a number in (0, 1], got {keep!r}") from None
    if not 0 < value <= 1:
        raise CompressError(
            f"keep is the share of the cache that stays and must be in (0, 1], got {keep}"
        )
    return value
