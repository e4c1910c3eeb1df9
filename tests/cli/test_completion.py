"""Completion, asked of bash itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
_tyro_sd_perf; printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    from sd_perf.cli.completion import completion_script
    from sd_perf.cli.dispatch import _COMMANDS, _GROUPS

    path = tmp_path_factory.mktemp("completion") / "sd-perf"
    path.write_text(completion_script(_COMMANDS, _GROUPS, "bash"))
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["wat"], "watch"),
        (["data", "pre"], "prepare"),
        (["config", "sch"], "schema"),
        (["mlperf", "ch"], "check"),
        (["train", "--training.global-b"], "--training.global-batch-size"),
        (["config", "show", "--logging.si"], "--logging.sinks"),
    ],
)
def test_a_word_is_completed(words: list[str], completed: str, script: Path) -> None:
    command = ["bash", "-c", ASK, "ask", script, "sd-perf", *words]
    asked = subprocess.run(command, capture_output=True, text=True, check=True)
    assert asked.stdout.split() == [completed]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_command(shell: str, sd_perf) -> None:
    code, output, _ = sd_perf("completion", shell)
    assert code == 0 and "sd-perf" in output and "global-batch-size" in output
