"""Planting faults in an op: its module with some source text replaced, under a name of its own."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sd_kernels import harness
from sd_kernels.registry import all_ops
from sd_kernels.spec import Case, Function

_numbers = itertools.count()
_green: set[tuple[str, str, str, torch.dtype]] = set()
"""(op, backend, case, dtype) that `assert_caught` has seen green without a fault"""


@contextmanager
def planted(op: str, *replacements: tuple[str, str], backend: str = "triton") -> Iterator[Function]:
    """A backend's function from its module with faults: see `replaced`."""
    chosen = all_ops()[op].backend(backend)
    with replaced(chosen.module, *replacements) as loaded:
        yield getattr(loaded, chosen.attribute or op)


@contextmanager
def replaced(module: str, *replacements: tuple[str, str]) -> Iterator[Any]:
    """A copy of the module in which each text, found at least once, is replaced."""
    original = importlib.util.find_spec(module)
    assert original is not None and original.origin is not None
    source = Path(original.origin).read_text(encoding="utf-8")
    for old, new in replacements:
        assert old in source, f"{original.origin} has no {old!r}"
        source = source.replace(old, new)
    name = f"planted_{next(_numbers)}"
    # Registered ops need names of their own; Triton reads a kernel's source from its file.
    source = source.replace('"sd_kernels::', f'"{name}::')
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = loaded = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(loaded)
            yield loaded
        finally:
            del sys.modules[name]


def assert_caught(
    op: str,
    case: Case,
    *replacements: tuple[str, str],
    dtype: torch.dtype = torch.float32,
    backend: str = "triton",
) -> None:
    """The unplanted op is green on the case, and the planted one is red."""
    spec, unplanted = all_ops()[op], (op, backend, repr(case), dtype)
    if unplanted not in _green:
        assert all(verdict.ok for verdict in harness.check(spec, backend, case, dtype))
        _green.add(unplanted)
    with planted(op, *replacements, backend=backend) as function:
        verdicts = harness.check(spec, backend, case, dtype, function=function)
    assert not all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))
