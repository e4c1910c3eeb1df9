"""Writes the generated parts of docs/when_something_goes_wrong.md from the code.

    python scripts/error_page.py

They are the exit codes, the kinds of errors, and the sentence and remedy of every error that is
raised where its text can be read off the code. A name in capitals stands for what a sentence fills
in, and ... for a longer expression. A test holds the page to what this writes.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from sd_perf.errors import RankLostError, UserError
from sd_perf.stopping import CTRL_C, STOPPED

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/when_something_goes_wrong.md"
SOURCES = ("sd_perf", "kernels/sd_kernels")
ROOTS = ("UserError", "KernelError")
"""classes that the command line prints (sd_perf/cli/dispatch.py), and with them all of theirs"""
BY_SITE = ("kind", "error")
"""names under which a function raises the kind that it is given"""

CODES = {
    0: ("done", "nothing"),
    1: (
        "a check failed, output could not be written, or a bug (with a traceback)",
        "read what the check says; report the traceback",
    ),
    UserError.exit_code: (
        "input that cannot be used: one sentence",
        "do what follows its last semicolon; `--debug` adds the traceback",
    ),
    STOPPED: (
        "stopped by a signal; training has saved",
        "give the command again; training prints it, with `--resume`",
    ),
    RankLostError.exit_code: (
        "another process of the run was lost or hung",
        "look at the rank and host that are named, then give the command again with `--resume`",
    ),
    CTRL_C: (
        "stopped by Ctrl-C, nothing saved",
        "give the command again; training with `--resume`",
    ),
    137: (
        "ended by SIGKILL, as the system ends a process when memory is short",
        "look at memory (`dmesg`), then give the command again with `--resume`",
    ),
}
"""by exit code: what has happened, and what to do"""

ROOMS = {
    "data": "Data sets, shards, samples",
    "runs": "Run folders and checkpoints",
    "training": "Training",
    "config": "Config files and options",
    "distributed": "Several processes",
    "cluster": "run_and_time.sh, Slurm",
    "evaluation": "Evaluation",
    "models": "Weights and networks",
    "mlperf": "MLPerf logs and submissions",
    "fetch": "Downloads",
    "sinks": "TensorBoard, W&B, CSV",
    "tools": "Estimate, parity, reports",
    "fast": "The fast network",
    "cli": "The command line",
    "kernels": "Kernels",
    "": "Anywhere",
}
"""title by room; the files beside the rooms are where anything may end up"""


def main() -> None:
    """Write the page's generated parts anew."""
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def updated(page: str) -> str:
    """A page with its generated parts as the code now has them."""
    for name, lines in (("codes", _codes()), ("kinds", _kinds()), ("sentences", _sentences())):
        pattern = rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)"
        text = "\n".join(lines)
        page, count = re.subn(pattern, lambda m, t=text: f"{m[1]}{t}\n{m[2]}", page, flags=re.S)
        if count != 1:
            raise ValueError(f"the page needs one part `<!-- generated: {name} -->`, has {count}")
    return page


def _codes() -> Iterator[str]:
    yield from ("| exit code | what has happened | what to do |", "|---|---|---|")
    for code, (what, remedy) in sorted(CODES.items()):
        yield f"| {code} | {what} | {remedy} |"


def kinds() -> dict[str, tuple[int, str]]:
    """Exit code and docstring of every class of errors that the command line prints as a
    sentence, bases first."""
    classes = [node for tree in _trees().values() for node in tree.body]
    found: dict[str, tuple[int, str]] = {}
    while new := {
        node.name: (_exit_code(node, found), " ".join((ast.get_docstring(node) or "").split()))
        for node in classes
        if isinstance(node, ast.ClassDef) and node.name not in found
        if node.name in ROOTS or any(ast.unparse(base) in found for base in node.bases)
    }:
        found |= new
    return found


def _exit_code(node: ast.ClassDef, found: dict[str, tuple[int, str]]) -> int:
    own = [
        part.value.value
        for part in node.body
        if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "exit_code"
        if isinstance(part.value, ast.Constant)
    ]
    bases = [found[name][0] for name in map(ast.unparse, node.bases) if name in found]
    return [*own, *bases, UserError.exit_code][0]


def _kinds() -> Iterator[str]:
    yield from ("| kind | exit code | what it says |", "|---|---|---|")
    for name, (code, says) in kinds().items():
        yield f"| `{name}` | {code} | {says} |"


def _sentences() -> Iterator[str]:
    shared = {name: text for tree in _trees().values() for name, text in _constants(tree)}
    names = {*kinds(), *BY_SITE}
    rows = sorted(
        {
            (_room(path), *row)
            for path, tree in _trees().items()
            for row in sentences(tree, names, {**shared, **dict(_constants(tree))})
        }
    )
    if unknown := {row[0] for row in rows} - ROOMS.keys():
        raise ValueError(f"rooms without a title in ROOMS: {', '.join(sorted(unknown))}")
    for room, title in ROOMS.items():
        ours = [row[1:] for row in rows if row[0] == room]
        if ours:
            yield from (f"### {title}", "", "| sentence | what to do |", "|---|---|")
            yield from (f"| {sentence} | {remedy or '–'} |" for sentence, remedy in ours)
            yield ""


@functools.cache
def _trees() -> dict[Path, ast.Module]:
    files = sorted(path for source in SOURCES for path in (ROOT / source).rglob("*.py"))
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}


def _room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] == "kernels":
        return "kernels"
    room = parts[1] if len(parts) > 2 else ""
    return "config" if path.name == "presets.py" else room


def sentences(
    tree: ast.Module, names: set[str], texts: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """(sentence, remedy) of every error of these names that a file raises with a text of its own.

    `texts` are the strings that have names.
    """
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else None
        if not isinstance(call, ast.Call) or ast.unparse(call.func) not in names or not call.args:
            continue
        text = _escaped(_text(call.args[0], texts))
        sentence, semicolon, remedy = text.rpartition("; ")
        if len(re.findall(r"[a-z]{2,}", text)) > 2:  # more than what is filled in
            told = remedy if re.search("[a-z]", remedy) else "as it says there"
            yield (sentence, told) if semicolon else (text, "")


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The strings to which a module gives names."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = node.value
            if isinstance(value, ast.JoinedStr) or (
                isinstance(value, ast.Constant) and isinstance(value.value, str)
            ):
                yield node.targets[0].id, _text(value, {})


def _text(node: ast.expr, texts: dict[str, str]) -> str:
    """A string as a reader sees it, with what is filled in as capitals, or as ... ."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, texts) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, texts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, texts) + _text(node.right, texts)
    if isinstance(node, ast.Name) and node.id in texts:
        return texts[node.id]
    if isinstance(node, ast.Name | ast.Attribute):
        return ast.unparse(node).rpartition(".")[2].strip("_").upper()
    return "..."


def _escaped(text: str) -> str:
    """Text for a cell of a table."""
    return re.sub(r"([|<*])", r"\\\1", " ".join(text.split()))


if __name__ == "__main__":
    main()
