"""What stands under each field of a section: its meaning and unit, as text."""

from __future__ import annotations

import ast
import inspect
import re


def field_descriptions(section: type) -> dict[str, str]:
    """{field: its text on one line} of a section of the config, in the order of the source."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    # Fields without a text of their own, the operators of `kernels`, have it in the class's.
    found = dict(re.findall(r"^ {4}(\w+): (.+)$", section.__doc__ or "", re.M))
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            found[field.target.id] = _text(text)
    return found


def section_description(section: type) -> str:
    """The first sentence of a section's docstring."""
    return (section.__doc__ or "").partition("\n\n")[0].strip()


def _text(statement: ast.stmt) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return " ".join(str(statement.value.value).split())
    return ""
