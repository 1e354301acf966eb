# SPDX-License-Identifier: Apache-2.0
"""Finds classes by name: built-in ones, and those that other packages name as entry points."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from compress_common.errors import CompressError, explain, joined, nearest


class Named(Protocol):
    """What a class must have to be registered.

    Attributes:
        name: What users write.
        settings_type: The pydantic model of its settings. An instance is built from one.
    """

    name: ClassVar[str]
    settings_type: ClassVar[Any]

    def __init__(self, settings: Any) -> None: ...


T = TypeVar("T", bound=Named)
S = TypeVar("S")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """The classes of one kind.

    Args:
        noun: What a class of this kind is called in messages.
        group: Entry-point group in which other packages register theirs.
        built_in: The classes of this package.
    """

    noun: str
    group: str
    built_in: tuple[type[T], ...]

    def classes(self) -> dict[str, type[T]]:
        """Return every registered class by its name.

        Raises:
            CompressError: Two classes have one name, or a class cannot be loaded.
        """
        return self._classes

    @cached_property  # requests ask too, and a search of all installed packages takes 15 ms
    def _classes(self) -> dict[str, type[T]]:
        found = {kind.name: kind for kind in self.built_in}
        for entry in entry_points(group=self.group):
            source = f"entry point {entry.name!r} ({entry.value})"
            try:
                kind = entry.load()
                name = kind.name
            except (ImportError, AttributeError, TypeError) as error:
                raise CompressError(
                    f"{source} gives no {self.noun}: {error}; repair or uninstall it"
                ) from error
            if found.setdefault(name, kind) is not kind:
                raise CompressError(
                    f"{source} registers {self.noun} {name!r}, which exists; rename or uninstall it"
                )
        return found

    def validate(
        self, settings: Any, section: Callable[[Any], S], own: Collection[str], name: str
    ) -> S:
        """Validate a section that also takes the settings of the class that it names.

        When no class has the name, the settings of every class count as known: the name is the
        problem then.

        Args:
            settings: What the user gave.
            section: Validates what is left without unknown keys.
            own: Keys of the section itself.
            name: Name of the class.

        Returns:
            What ``section`` returned.

        Raises:
            ValidationError: All problems: unknown keys, with the nearest known one, wrong values of
                the section's keys and, where a key is unknown, of the class's.
        """
        if not isinstance(settings, dict):
            return section(settings)
        classes = self.classes()
        valid = list(own)
        for kind in [classes[name]] if name in classes else classes.values():
            valid += kind.settings_type.model_fields
        unknown = [f"unknown setting {k!r}{nearest(k, valid)}" for k in settings if k not in valid]
        if not unknown:
            return section(settings)
        problems = [f"{'; '.join(unknown)} (valid: {', '.join(dict.fromkeys(valid))})"]
        known = {key: value for key, value in settings.items() if key in valid}
        found: list[Any] = []
        try:
            section(known)
        except ValidationError as error:
            found = error.errors(include_url=False)
        if name in classes:
            try:
                self.build(name, {k: v for k, v in known.items() if k not in own})
            except CompressError as error:
                problems += error.problems
        for text in problems:
            kind_of = PydanticCustomError("value_error", "{text}", {"text": text})
            found.append(InitErrorDetails(type=kind_of, loc=(), input=settings))
        raise ValidationError.from_exception_data(self.noun, found)

    def build(self, name: str, settings: dict[str, Any]) -> T:
        """Return an instance of a class.

        Args:
            name: Name of the class.
            settings: Its settings, not yet validated.

        Raises:
            CompressError: The name is unknown, or settings are wrong. All of them are listed.
        """
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
