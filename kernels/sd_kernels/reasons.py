"""Why a backend does not run: what kind of reason it is, in full, and in few words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["hardware", "package", "dtype", "case", "named", "deterministic"]
"""hardware: not for such a device; package: what it adapts cannot be imported; dtype: not computed
on a GPU; case: sizes or options of a call; named: runs only when the config names it;
deterministic: its sums may differ from run to run"""


@dataclass(frozen=True)
class Reason:
    """`str(reason)` is the whole reason."""

    kind: Kind
    text: str
    short: str
    """for a table, where the reader knows the device and can look up the rest"""

    def __str__(self) -> str:
        return self.text


ONLY_NAMED = Reason("named", "only when named", "only when named")
NOT_DETERMINISTIC = Reason(
    "deterministic",
    "its gradients may differ in their last bits from run to run, and this run is deterministic",
    "not deterministic",
)


def refusal(takes: str, got: str = "") -> Reason:
    """Why a backend refuses a call: what it takes and, where that helps, what it was given."""
    return Reason("case", f"{takes}, not {got}" if got else takes, takes)


def of_case(name: str, why: Reason) -> Reason:
    """The same reason, said of the case of that name."""
    return Reason(why.kind, f"{name}: {why.text}", f"{name}: {why.short}")
