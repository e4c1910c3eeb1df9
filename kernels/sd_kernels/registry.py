"""All ops of this package, found by their folders."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from functools import cache
from pathlib import Path

import sd_kernels
from sd_kernels.spec import OpSpec


@cache
def all_ops() -> dict[str, OpSpec]:
    """Every op's spec by name, in alphabetical order."""
    folders = [module.name for module in pkgutil.iter_modules(sd_kernels.__path__) if module.ispkg]
    return {name: importlib.import_module(f"sd_kernels.{name}").SPEC for name in sorted(folders)}


def source_digest(op: str) -> str:
    """Of an op's files: it tells whether a measured result is of this source."""
    folder = Path(sd_kernels.__path__[0]) / op
    sources = b"".join(path.name.encode() + path.read_bytes() for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(sources).hexdigest()[:12]
