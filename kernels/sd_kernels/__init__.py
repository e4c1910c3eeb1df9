"""Operators of the Stable Diffusion v2 UNet: plain references, and faster backends chosen by name.

One folder an op: `reference.py` is plain torch, `triton.py` and the adapters named after a package
are faster, and `__init__.py` holds the op's `SPEC`. Needs torch and triton, nothing else; an
adapter imports its package when chosen. This file needs neither.
"""

from __future__ import annotations

import ast
import pkgutil
from pathlib import Path


def op_names() -> list[str]:
    """The folders of this package, which are its ops, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)


def op_help(op: str) -> str:
    """First line of the op's docstring, without importing the op (and torch with it)."""
    [source] = [file for root in __path__ if (file := Path(root, op, "__init__.py")).is_file()]
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    if not text:
        raise ValueError(f"{source}: begin it with a line that says what the op is")
    return text.partition("\n")[0]
