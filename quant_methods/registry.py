# SPDX-License-Identifier: Apache-2.0
"""Methods by name: ours, and third parties' through an entry-point group. Fails closed."""

from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

from quant_methods.base import QuantMethod
from quant_methods.errors import CompressError, joined
from quant_methods.rtn import RoundToNearest
from quant_methods.smoothquant_plus import SmoothQuantPlus

ENTRY_POINT_GROUP = "vllm_compress.quant_methods"
_BUILT_IN: tuple[type[QuantMethod], ...] = (SmoothQuantPlus, RoundToNearest)


def methods() -> dict[str, type[QuantMethod]]:
    """Every registered method; CompressError when two claim one name."""
    found: dict[str, type[QuantMethod]] = {method.name: method for method in _BUILT_IN}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        method = entry.load()
        if found.setdefault(method.name, method) is not method:
            raise CompressError(
                f"entry point {entry.name!r} ({entry.value}) registers method {method.name!r}, "
                "which exists; rename or uninstall it"
            )
    return found


def nearest(name: str, valid: list[str]) -> str:
    """``; did you mean 'x'?`` when a valid name is close, else nothing."""
    close = get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def build_method(name: str, settings: dict[str, Any]) -> QuantMethod:
    """The method with validated settings; CompressError lists every bad key and value at once."""
    known = methods()
    if name not in known:
        raise CompressError(
            f"unknown method {name!r}{nearest(name, list(known))} "
            f"(registered: {', '.join(sorted(known))})"
        )
    kind = known[name]
    try:
        return kind(kind.settings_type(**settings))
    except ValidationError as error:
        raise joined(explain(error, name, list(kind.settings_type.model_fields))) from error


def explain(error: ValidationError, where: str, valid: list[str]) -> list[str]:
    """One line per problem of a pydantic error, with the nearest valid name for unknown keys."""
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(
                f"{where}: unknown setting {path!r}{nearest(path, valid)} "
                f"(valid: {', '.join(valid)})"
            )
        else:
            lines.append(f"{where}.{path}: {problem['msg']}, got {problem['input']!r}")
    return lines
