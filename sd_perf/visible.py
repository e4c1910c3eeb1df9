"""Text that others wrote, made safe to print: control characters are shown, not obeyed."""

from __future__ import annotations

import unicodedata

_ESCAPED = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories: controls, lone surrogates (bytes of a name that are no UTF-8), separators"""
_BIDIRECTIONAL = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""characters that reorder the text around them on a screen"""


def visible(text: object, keep: str = "") -> str:
    r"""The text with each control character as Python writes it: an escape becomes \x1b.

    What takes no place on a screen and yet changes it is replaced: C0 and C1 controls, line breaks
    and tabs among them, lone surrogates and bidirectional controls. Characters of `keep` stay.
    """
    return "".join(
        repr(char)[1:-1] if char not in keep and _is_control(char) else char for char in str(text)
    )


def _is_control(char: str) -> bool:
    return char in _BIDIRECTIONAL or unicodedata.category(char) in _ESCAPED
