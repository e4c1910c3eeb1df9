"""What a config field's value must be: the rule stands in the field's type.

steps: Count = 50                                                # an int of at least 1
seed: Annotated[int, Rule(lambda seed: seed >= 0, "0 or more")]  # a rule of its own
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, get_type_hints

from sd_perf.errors import ConfigError
from sd_perf.files import is_storable, quoted


class Rule(NamedTuple):
    """A condition on a field's value. It is not asked where the value is None."""

    holds: Callable[[Any], bool]
    right: str
    """values that can be used, in words that follow "it must be" """


Count = Annotated[int, Rule(lambda value: value > 0, "at least 1")]
Positive = Annotated[float, Rule(lambda value: value > 0, "positive")]
NotNegative = Annotated[float, Rule(lambda value: value >= 0, "0 or more")]
Decay = Annotated[float, Rule(lambda value: 0 <= value < 1, "in [0, 1)")]
PathText = Annotated[
    str,
    Rule(lambda path: not path.startswith("~"), "a path without ~: write out the home folder"),
    Rule(is_storable, "a path that a disk can hold (names of at most 255 bytes)"),
]
"""path of a file or folder. Nothing expands ~ but a shell, so it would be a folder's own name."""


class Section:
    """Base of the sections of a config. Checks every field against the rules in its type.

    A rule between fields of one section is checked in the `__post_init__` of that section, and a
    rule between sections in that of `Config`; both call `require`.
    """

    # Without a type, so that it is no field: presets take every annotated name as a key.
    section = ""
    """name of the section in `Config`, which the keys in error messages begin with"""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for rule in getattr(hint, "__metadata__", ()):
                self.require(value is None or rule.holds(value), name, rule.right)

    def require(self, ok: bool, name: str, right: str) -> None:
        """Raise ConfigError unless `ok`: the field's key, its value, and what is right instead."""
        if not ok:
            raise ConfigError(
                f"{self.section}.{name}: {quoted(getattr(self, name))} cannot be used; "
                f"it must be {right}"
            )
