"""What a config field's value must be: the rule stands in the field's type.

steps: Count = 50                                                # an int of at least 1
seed: Annotated[int, Rule(lambda seed: seed >= 0, "0 or more")]  # a rule of its own

Every integer has an upper limit, far above what anyone computes with and far below what overflows
an int64, takes hours to refuse or aborts the process. Every float is finite. Whether a run of large
but possible sizes fits the machine is asked when it starts (`sd_perf.memory`).
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
    schema: tuple[tuple[str, float], ...] = ()
    """(key, limit) of the values, where a JSON schema can say them"""


def at_most(limit: int) -> Rule:
    """A rule for integers: no more than this limit."""
    return Rule(lambda value: value <= limit, f"at most {limit:,}", (("maximum", limit),))


ONE = Rule(lambda value: value > 0, "at least 1", (("minimum", 1),))
ZERO = Rule(lambda value: value >= 0, "0 or more", (("minimum", 0),))

SEED = Rule(
    lambda seed: 0 <= seed < 2**63, "in [0, 2**63)", (("minimum", 0), ("maximum", 2**63 - 1))
)
"""rule of a seed: an int64 without sign"""
Count = Annotated[int, ONE, at_most(1_000_000)]
"""of what is held in memory together: channels, tokens, samples of a batch"""
Samples = Annotated[int, ONE, at_most(10**12)]
"""a position in a run or a distance: 1e12 take centuries, and an int64 holds their bytes"""
SamplesOrNone = Annotated[int, ZERO, at_most(10**12)]
"""a number of samples that may be 0"""
Steps = Annotated[int, ONE, at_most(10**9)]
"""optimizer steps"""
StepsOrNone = Annotated[int, ZERO, at_most(10**9)]
"""optimizer steps that may be 0"""
Side = Annotated[int, ONE, at_most(2048)]
"""height and width of latents: 2048 latent pixels are pictures of 16,384 pixels"""
Blocks = Annotated[int, ONE, at_most(64)]
"""layers in sequence: each is built, named and looked at by itself"""
Threads = Annotated[int, ONE, at_most(1024)]
"""threads, and what each keeps ready: OpenMP aborts the process where the system gives no more"""
Timesteps = Annotated[int, ONE, at_most(100_000)]
"""of the diffusion: a table entry each; sinusoidal embeddings are of float32"""
Pictures = Annotated[int, ONE, at_most(4096)]
"""pictures drawn at a time, each decoded to float32 pixels"""
Positive = Annotated[float, Rule(lambda value: value > 0, "positive", (("exclusiveMinimum", 0),))]
NotNegative = Annotated[float, ZERO]
Decay = Annotated[
    float,
    Rule(lambda value: 0 <= value < 1, "in [0, 1)", (("minimum", 0), ("exclusiveMaximum", 1))),
]
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
            right = "finite, and 0 or between 1.2e-38 and 3.4e38 (float32) but for its sign"
            self.require(not isinstance(value, float) or _in_float32(value), name, right)

    def require(self, ok: bool, name: str, right: str) -> None:
        """Raise ConfigError unless `ok`: the field's key, its value, and what is right instead."""
        if not ok:
            raise ConfigError(
                f"{self.section}.{name}: {quoted(getattr(self, name))} cannot be used; "
                f"it must be {right}"
            )


def _in_float32(value: float) -> bool:
    """Whether the number is finite and neither too large nor too small for a float32."""
    return value == 0 or 1.2e-38 <= abs(value) <= 3.4e38
