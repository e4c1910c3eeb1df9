"""All ops of this package, found by their folders."""

from __future__ import annotations

import hashlib
import importlib
import re
from functools import cache
from pathlib import Path

import sd_kernels
from sd_kernels.spec import OpSpec

_IMPORT = re.compile(r"^ *from sd_kernels\.([\w.]+) import ", re.MULTILINE)
"""the one form of import of this package that its modules use"""
_DESCRIBING = ("spec", "sd_v2_shapes", "targets", "reasons")
"""modules that describe calls, GPUs and reasons; they compute nothing"""


@cache
def all_ops() -> dict[str, OpSpec]:
    """Every op's spec by name, in alphabetical order."""
    return {op: importlib.import_module(f"sd_kernels.{op}").SPEC for op in sd_kernels.op_names()}


def sources(op: str) -> list[Path]:
    """The op's files and all files of this package that these import, by path."""
    root = Path(sd_kernels.__path__[0])
    found: set[Path] = set()
    waiting = [*(root / op).glob("*.py")]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            modules = _IMPORT.findall(path.read_text(encoding="utf-8"))
            imported = (
                root / f"{module.replace('.', '/')}.py"
                for module in modules
                if module not in _DESCRIBING
            )
            waiting += [file for file in imported if file.is_file()]
    return sorted(found)


def source_digest(op: str) -> str:
    """Digest of an op's sources. A measured result holds it, so that later changes show."""
    root = Path(sd_kernels.__path__[0])
    contents = b"".join(
        str(path.relative_to(root)).encode() + path.read_bytes() for path in sources(op)
    )
    return hashlib.sha256(contents).hexdigest()[:12]
