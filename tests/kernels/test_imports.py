"""What the kernel package imports: torch and Triton; another package only in the file named after
it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels/sd_kernels"
KERNELS = sorted(PACKAGE.rglob("*.py"))
SOURCES = [
    *KERNELS,
    *sorted(ROOT.glob("sd_perf/**/*.py")),
    *sorted(ROOT.glob("benchmarks/**/*.py")),
]
ADAPTED = {
    "apex.py": {"apex", "amp_C"},
    "te.py": {"transformer_engine", "transformer_engine_torch"},
    "flash.py": {"flash_attn", "flash_attn_interface", "flash_attn_3"},
    "cudnn.py": {"cudnn"},
    "cudnn_graph.py": {"cudnn"},
}


def imported(path: Path) -> Iterator[str]:
    """Top-level names of all that a file imports, wherever in it, by statement or by
    import_module("...")."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path}:{node.lineno} imports relatively; torch.py beside it would be torch"
            )
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            named = (argument.value for argument in node.args if isinstance(argument, ast.Constant))
            yield from (str(value).partition(".")[0] for value in named)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_kernels_import_torch_and_triton(path: Path) -> None:
    allowed = {
        "torch",
        "triton",
        "sd_kernels",
        *sys.stdlib_module_names,
        *ADAPTED.get(path.name, set()),
    }
    assert set(imported(path)) <= allowed


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_this_package_is_imported_in_the_one_form_that_digests_know(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom) and "sd_kernels" in ast.unparse(node):
            is_known = isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "sd_kernels."
            )
            assert is_known or path.name == "registry.py", f"{path}:{node.lineno}"


def globals_of(source: str) -> set[str]:
    """Names that a module imports, assigns or reads: a submodule of that name would overwrite or
    be overwritten by them."""
    tree = ast.parse(source)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    return names


def shadowed(package: Path) -> set[str]:
    """Submodules whose import sets a global of the package that its `__init__.py` uses.

    Importing `package.torch` makes `torch` in `package/__init__.py` mean that submodule.
    """
    children = {path.stem for path in package.glob("*.py")} - {"__init__"}
    children |= {path.parent.name for path in package.glob("*/__init__.py")}
    return children & globals_of((package / "__init__.py").read_text(encoding="utf-8"))


PACKAGES = sorted(path.parent for path in SOURCES if path.name == "__init__.py")


@pytest.mark.parametrize("package", PACKAGES, ids=name)
def test_no_submodule_shadows_a_name_of_its_package(package: Path) -> None:
    assert not shadowed(package)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import torch", {"torch"}),
        ("from torch import nn as apex", {"apex"}),
        ("import torch.nn.functional as F", set()),
        ("def f(case):\n    return triton.cdiv(case, 2)", {"triton"}),
        ("from torch import float32", set()),
    ],
)
def test_a_shadowed_name_is_seen(text: str, found: set[str], tmp_path: Path) -> None:
    for module in ("torch", "apex", "triton"):
        (tmp_path / f"{module}.py").touch()
    (tmp_path / "__init__.py").write_text(text)
    assert shadowed(tmp_path) == found


def test_an_adapted_package_is_imported_by_its_adapter_alone() -> None:
    adapted = set().union(*ADAPTED.values())
    wrong = {name(path): found for path in SOURCES if (found := set(imported(path)) & adapted)}
    adapters = {name(path) for path in KERNELS if path.name in ADAPTED}
    assert wrong.keys() <= adapters, wrong


@pytest.mark.parametrize(
    "text",
    [
        "import apex",
        "from apex.contrib import x",
        "def f():\n    importlib.import_module('apex.contrib')",
    ],
)
def test_an_import_is_seen(text: str, tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text(text)
    assert "apex" in set(imported(tmp_path / "triton.py"))


NOTHING_ELSE = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

import torch, triton
BLOCKED = {"sd_perf", "numpy", "yaml", "rich", "tyro"}
BLOCKED |= {"apex", "transformer_engine", "flash_attn", "cudnn"}
# What torch and Triton import themselves
BLOCKED -= {name.partition(".")[0] for name in sys.modules}
assert "sd_perf" in BLOCKED and "rich" in BLOCKED
sys.meta_path.insert(0, Blocker())
before = {name.partition(".")[0] for name in sys.modules}
import sd_kernels.harness, sd_kernels.selection
from sd_kernels.registry import all_ops
for spec in all_ops().values():
    for backend in spec.backends:
        if not backend.package:
            backend.function(spec.name)
new = {name.partition(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
print(sorted(new - {"torchgen", "functorch", "sympy", "mpmath", "networkx", "numpy"}))
"""


def test_torch_and_triton_are_enough(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, "-c", NOTHING_ELSE]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['sd_kernels']"
