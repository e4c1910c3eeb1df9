"""Planting faults in an op: a copy of its modules with some source text replaced.

A copy has module names and registered ops of its own, so that the op itself stays as it is.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
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
    """The function of a backend, from a copy of its modules with faults: see `replaced`."""
    chosen = all_ops()[op].backend(backend)
    with replaced(chosen.module, *replacements) as loaded:
        yield getattr(loaded, chosen.attribute or op)


def with_siblings(module: str) -> dict[str, str]:
    """Sources by module name: the siblings that this module imports, then itself."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    package = re.escape(module.rpartition(".")[0])
    sources: dict[str, str] = {}
    for sibling in re.findall(rf"^from ({package}\.\w+) import", source, re.MULTILINE):
        sources |= with_siblings(sibling)
    return sources | {module: source}


@contextmanager
def replaced(module: str, *replacements: tuple[str, str]) -> Iterator[Any]:
    """A copy of the module in which each text, found in it or in a sibling, is replaced."""
    sources = with_siblings(module)
    for old, new in replacements:
        holders = [name for name, source in sources.items() if old in source]
        assert holders, f"none of {', '.join(sources)} has {old!r}"
        sources |= {name: sources[name].replace(old, new) for name in holders}
    copies = {name: f"planted_{next(_numbers)}" for name in sources}
    with TemporaryDirectory() as folder:
        try:
            for name, source in sources.items():
                load(Path(folder) / f"{copies[name]}.py", renamed(source, copies))
            yield sys.modules[copies[module]]
        finally:
            for copy in copies.values():
                sys.modules.pop(copy, None)


def renamed(source: str, copies: Mapping[str, str]) -> str:
    """The source importing copies instead of modules, and registering ops under their names."""
    for name, copy in copies.items():
        source = re.sub(
            rf"^from {re.escape(name)} import", f"from {copy} import", source, flags=re.M
        )
    return source.replace('"sd_kernels::', f'"{list(copies.values())[-1]}::')


def load(path: Path, source: str) -> None:
    """Import the source as a module from a file, where Triton reads the source of kernels."""
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    sys.modules[path.stem] = loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)


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
