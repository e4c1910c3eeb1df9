"""Commands that are printed for pasting: quoted for a shell, and of commands that there are."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sd_perf.cli import dispatch
from sd_perf.commands import resume_command, sd_perf_command
from sd_perf.visible import visible

ROOT = Path(__file__).parent.parent
HOSTILE = [
    "plain",
    "",
    "a b",
    "$(touch pwned)",
    "`touch pwned`",
    'it\'s "quoted"',
    "; touch pwned #",
    "*",
    "~",
    "!1",
    "back\\slash",
    "line\nbreak\ttab",
    "\x1b[31mred'\\",
    "Ünï©ode",
    "right\u202eleft",
    os.fsdecode(b"no\xffutf8"),
]


def test_a_shell_reads_what_was_meant(tmp_path):
    line = sd_perf_command(*HOSTILE)
    assert visible(line) == line
    show = f"sd-perf() {{ printf '%s\\0' \"$@\"; }}; {line}"
    done = subprocess.run(["bash", "-c", show], cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == list(map(os.fsencode, HOSTILE))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("typed", "printed"),
    [
        ("sd-perf train --fresh --run.dir a", "sd-perf train --run.dir a --resume"),
        ("./b/sd-perf train --resume --debug", "./b/sd-perf train --debug --resume"),
        ("/lib/sd_perf/__main__.py train --no-resume", "python -m sd_perf train --resume"),
        ("/lib/pytest/__main__.py train", "sd-perf train --resume"),
    ],
)
def test_the_command_to_resume(typed, printed, monkeypatch):
    arguments = shlex.split(typed)
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "sd_perf", *arguments[1:]])
    assert resume_command() == printed


def test_a_program_on_the_path_is_named_short(tmp_path, monkeypatch):
    program = tmp_path / "sd-perf"
    program.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(program), "train"])
    assert resume_command() == f"{program} train --resume"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert resume_command() == "sd-perf train --resume"


def texts(path: Path) -> list[str]:
    """The strings of a Python file, docstrings among them, or the whole of another."""
    if path.suffix != ".py":
        return [path.read_text(encoding="utf-8")]
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    constants = (node.value for node in nodes if isinstance(node, ast.Constant))
    return [text for text in constants if isinstance(text, str)]


def test_commands_that_are_named_exist():
    pattern = re.compile(
        r"(?:`|\$ |bin/|with |see |^(?=.* --))sd-perf ([a-z][a-z-]+)(?: ([a-z][a-z-]*[a-z])\b)?",
        re.MULTILINE,
    )
    files = [*ROOT.glob("sd_perf/**/*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]
    named = {
        match
        for path in [*files, ROOT / "Makefile"]
        for text in texts(path)
        for match in pattern.findall(text)
    }
    assert len(named) > 10
    for command, inner in named:
        assert command in dispatch._COMMANDS, command
        if inner and command in dispatch._GROUPS:
            assert inner in dispatch._GROUPS[command], (command, inner)


def test_packages_that_are_advised_can_be_pasted():
    """A bracket without quotes is a pattern for file names, which zsh refuses."""
    files = [*ROOT.glob("sd_perf/**/*.py"), *ROOT.glob("kernels/sd_kernels/**/*.py")]
    advised = [
        text[text.index("pip install") :]
        for path in files
        for text in texts(path)
        if "pip install" in text
    ]
    assert len(advised) > 5
    for command in advised:
        assert "[" not in re.sub(r"'[^']*('|$)", "", command), command
