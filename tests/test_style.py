"""The size budget: rooms, files and functions; and what no source file may hold."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = sorted([*ROOT.glob("sd_perf/**/*.py"), *ROOT.glob("kernels/sd_kernels/**/*.py")])
TOOLS = sorted([*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("scripts/**/*.py")])
SOURCES = [*PRODUCT, *TOOLS, *sorted(ROOT.glob("tests/**/*.py"))]
BLOCKS = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.Match)

CODE_LINES = {
    "sd_perf/reference": 260,
    "sd_perf/fast": 760,
    "sd_perf/diffusion": 175,
    "sd_perf/models": 1600,
    "sd_perf/fetch": 1200,
    "sd_perf/data": 3910,
    "sd_perf/runs": 1190,
    "sd_perf/sinks": 285,
    "sd_perf/training": 1860,
    "sd_perf/cluster": 1180,
    "sd_perf/distributed": 510,
    "sd_perf/evaluation": 1420,
    "sd_perf/mlperf": 1750,
    "sd_perf/tools": 5455,
    "sd_perf": 2765,
    "kernels": 5980,
    "benchmarks": 6150,
}
"""of each room; `sd_perf` is the command line, the config and the files beside the rooms"""
COMMENTED = ("sd_perf/fast", "sd_perf/tools/estimate")
"""rooms that need comments as Triton kernels do"""
COMMENTS_PER_100_LINES = 5


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(path: Path) -> str:
    """The room of CODE_LINES with the longest matching path; empty for scripts and tests."""
    return max((key for key in CODE_LINES if name(path).startswith(f"{key}/")), key=len, default="")


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
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def holds_triton_kernels(path: Path) -> bool:
    return any(is_triton_kernel(function) for function in functions(path))


def documentation(text: str) -> set[int]:
    """Numbers of the lines of docstrings, also those under fields."""
    statements = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr))
    constants = (node for node in statements if isinstance(node.value, ast.Constant))
    texts = (node for node in constants if isinstance(node.value.value, str))  # type: ignore[attr-defined]
    return {line for node in texts for line in range(node.lineno, (node.end_lineno or 0) + 1)}


def code_lines(path: Path) -> int:
    """Lines that are neither blank, nor comments, nor docstrings."""
    text = path.read_text()
    lines = enumerate(text.splitlines(), 1)
    code = {number for number, line in lines if line.strip() and line.strip()[0] != "#"}
    return len(code - documentation(text))


def comments(path: Path) -> int:
    """Lines that hold a comment for people, alone or after code."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    directives = ("# type:", "# fmt:", "# noqa")
    found = (token for token in tokens if token.type == tokenize.COMMENT)
    return sum(not token.string.startswith(directives) for token in found)


@pytest.mark.parametrize("key", CODE_LINES)
def test_room(key: str) -> None:
    paths = [path for path in (*PRODUCT, *TOOLS) if room(path) == key]
    assert paths
    assert sum(map(code_lines, paths)) <= CODE_LINES[key]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_file(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= (500 if holds_triton_kernels(path) else 400)
    for function in functions(path):
        where = f"{path.name}:{function.lineno} {function.name}"
        assert length(function) <= (100 if is_triton_kernel(function) else 60), where
        assert nesting(function) <= 3, where


@pytest.mark.parametrize(
    "paths",
    [
        *([path] for path in PRODUCT if holds_triton_kernels(path)),
        *([path for path in PRODUCT if name(path).startswith(key)] for key in COMMENTED),
    ],
    ids=lambda paths: name(paths[0] if len(paths) == 1 else paths[0].parent),
)
def test_comments_where_a_reader_stops(paths: list[Path]) -> None:
    code, remarks = sum(map(code_lines, paths)), sum(map(comments, paths))
    assert 100 * remarks >= COMMENTS_PER_100_LINES * code, f"{remarks} in {code} lines of code"


def test_the_formatter_rules() -> None:
    """`fmt: skip` stands at signatures of Triton kernels alone, and at ten of them at most."""
    skips = 0
    for path in SOURCES:
        lines = path.read_text().splitlines()
        ends = {
            function.body[0].lineno for function in functions(path) if is_triton_kernel(function)
        }
        for number, line in enumerate(lines, 1):
            if re.search(r"# fmt: (skip|off)", line) and path != Path(__file__):
                assert any(number < end <= number + 2 for end in ends), f"{name(path)}:{number}"
                skips += 1
    assert skips <= 10


def test_training_loop_is_short() -> None:
    trainer = ROOT / "sd_perf/training/trainer.py"
    loop = next(function for function in functions(trainer) if function.name == "fit")
    assert length(loop) <= 80


def test_nothing_names_this_machine() -> None:
    patterns = re.compile(r"/work/|\.\./shared/(?!data)|/root/|/home/\w")
    suffixes = ("py", "md", "yaml", "toml", "sh")
    texts = [path for suffix in suffixes for path in ROOT.glob(f"**/*.{suffix}")]
    skipped = {".venv", "runs", "data", "build"}
    for path in texts:
        if skipped.isdisjoint(path.relative_to(ROOT).parts[:1]) and path != Path(__file__):
            assert not patterns.search(path.read_text()), path
