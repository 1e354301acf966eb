# SPDX-License-Identifier: Apache-2.0
"""Classes by name: ours, and third parties' through an entry-point group. Fails closed."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import ValidationError

from compress_common.errors import CompressError, explain, joined, nearest


class Named(Protocol):
    """A class that can be registered: a name, a pydantic model of settings, built from one."""

    name: ClassVar[str]
    settings_type: ClassVar[Any]

    def __init__(self, settings: Any) -> None: ...


T = TypeVar("T", bound=Named)


@dataclass(frozen=True)
class Registry(Generic[T]):
    """The classes of one kind.

    noun: what one of them is called in messages.
    group: entry-point group of those from other packages.
    """

    noun: str
    group: str
    built_in: tuple[type[T], ...]

    def classes(self) -> dict[str, type[T]]:
        """Every registered class; CompressError when two claim one name or one cannot be loaded."""
        return self._classes

    @cached_property  # requests ask too, and looking through what is installed takes 15 ms
    def _classes(self) -> dict[str, type[T]]:
        found = {kind.name: kind for kind in self.built_in}
        for entry in entry_points(group=self.group):
            source = f"entry point {entry.name!r} ({entry.value})"
            try:
                kind = entry.load()
                name = kind.name
            except (ImportError, AttributeError) as error:
                raise CompressError(
                    f"{source} gives no {self.noun}: {error}; repair or uninstall it"
                ) from error
            if found.setdefault(name, kind) is not kind:
                raise CompressError(
                    f"{source} registers {self.noun} {name!r}, which exists; rename or uninstall it"
                )
        return found

    def refuse_unknown(self, settings: dict[str, Any], own: Iterable[str], name: str) -> None:
        """ValueError for keys that neither a section (``own``) nor the class ``name`` has.

        If there is no such class, the settings of all are taken for valid: its name is the problem.
        """
        known = self.classes()
        valid = list(own)
        for kind in [known[name]] if name in known else known.values():
            valid += kind.settings_type.model_fields
        unknown = [f"unknown setting {k!r}{nearest(k, valid)}" for k in settings if k not in valid]
        if unknown:
            raise ValueError(f"{'; '.join(unknown)} (valid: {', '.join(dict.fromkeys(valid))})")

    def build(self, name: str, settings: dict[str, Any]) -> T:
        """One, with validated settings; CompressError lists every bad key and value at once."""
        known = self.classes()
        if name not in known:
            raise CompressError(
                f"unknown {self.noun} {name!r}{nearest(name, known)} "
                f"(registered: {', '.join(sorted(known))})"
            )
        kind = known[name]
        try:
            return kind(kind.settings_type(**settings))
        except ValidationError as error:
            raise joined(explain(error, name, kind.settings_type.model_fields)) from error
