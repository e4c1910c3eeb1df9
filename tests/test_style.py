"""The size budget: small files, short functions, shallow nesting."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = sorted([*ROOT.glob("sd_perf/**/*.py"), *ROOT.glob("kernels/sd_kernels/**/*.py")])
SOURCES = [*PRODUCT, *sorted(ROOT.glob("benchmarks/**/*.py")), *sorted(ROOT.glob("tests/**/*.py"))]
BLOCKS = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


def nesting(node: ast.AST) -> int:
    """Deepest nesting of blocks below a function; elif is not deeper than its if."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        inner = nesting(child)
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        deepest = max(deepest, inner + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def length(function: ast.FunctionDef) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def is_triton_kernel(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def code_lines(path: Path) -> int:
    """Lines that are neither blank, nor comments, nor docstrings (or the text under a field)."""
    text = path.read_text()
    statements = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr))
    texts = (
        node
        for node in statements
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )
    documentation = {
        number for node in texts for number in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    code = (
        number
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and line.strip()[0] != "#"
    )
    return len(set(code) - documentation)


def test_total_and_median() -> None:
    assert sum(map(code_lines, PRODUCT)) <= 10_000
    lines = [len(path.read_text().splitlines()) for path in PRODUCT]
    assert statistics.median(count for count in lines if count) < 170


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 831
    for function in functions(path):
        where = f"{path.name}:{function.lineno} {function.name}"
        assert length(function) <= (160 if is_triton_kernel(function) else 60), where
        assert nesting(function) <= 3, where


def test_training_loop_is_short() -> None:
    trainer = ROOT / "sd_perf/training/trainer.py"
    loop = next(function for function in functions(trainer) if function.name == "fit")
    assert length(loop) <= 80


def test_nothing_names_this_machine() -> None:
    patterns = re.compile(r"/work/|\.\./shared/(?!data)|/root/|/home/\w")
    texts = [
        path
        for suffix in ("py", "md", "yaml", "toml", "sh")
        for path in ROOT.glob(f"**/*.{suffix}")
    ]
    skipped = {".venv", "runs", "data", "build"}
    for path in texts:
        if skipped.isdisjoint(path.relative_to(ROOT).parts[:1]) and path != Path(__file__):
            assert not patterns.search(path.read_text()), path
