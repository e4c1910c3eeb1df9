"""Commands start fast, are all listed, and take the fields of their preset as options."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sd_kernels.targets import names
from sd_perf.cli.dispatch import _DATA
from tests.cli.bad_input import matches

WITH_SETTINGS = [
    ["train"],
    ["estimate"],
    ["parity"],
    ["data", "prepare"],
    ["data", "statistics"],
]
DATA_COMMANDS = ", ".join(_DATA)
HELP = "from sd_perf.cli import main; main(['--help'])"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["data", "--help"]])
def test_help_does_not_load_torch(arguments):
    """Torch takes seconds to load. Under `--help` nothing needs it."""
    code = f"""
import sys
from sd_perf.cli import main
try:
    main({arguments})
except SystemExit as leaving:
    assert leaving.code == 0
sys.exit("torch was loaded" if "torch" in sys.modules else 0)
"""
    process = python(code)
    assert process.returncode == 0, process.stderr
    assert "usage: sd-perf" in process.stdout


@pytest.mark.parametrize("package", ["tyro", "rich", "yaml"])
def test_a_missing_package(package):
    process = python(f"import sys; sys.modules[{package!r}] = None; {HELP}")
    assert process.returncode == 1
    sentence = f"sd-perf: the command line needs {package}; pip install 'sd-perf[cli]'\n"
    assert process.stderr == sentence


def test_an_error_of_our_own_is_no_missing_package():
    process = python(f"import sys; sys.modules['sd_perf.presets'] = None; {HELP}")
    assert process.returncode == 1 and "Traceback" in process.stderr


@pytest.mark.parametrize(
    ("number", "exit_code"), [("SIGTERM", 75), ("SIGHUP", 75), ("SIGUSR1", 75), ("SIGINT", 130)]
)
def test_a_signal_while_the_command_line_is_imported(number, exit_code):
    """Handlers come before the imports, and an import is not interrupted."""
    process = python(signal_in_an_import(number))
    name = "Ctrl-C" if number == "SIGINT" else number
    assert (process.returncode, process.stderr) == (exit_code, f"sd-perf: stopped by {name}\n")


def test_other_ranks_are_silent_when_they_are_ended_in_an_import(monkeypatch):
    """As torchrun ends them when the first rank has failed, and has said why."""
    launcher = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in launcher.items():
        monkeypatch.setenv(name, str(value))
    process = python(signal_in_an_import("SIGTERM"))
    assert (process.returncode, process.stderr) == (75, "")


def signal_in_an_import(number: str) -> str:
    """A program: the command line, which gets a signal while it is imported."""
    return f"""
import signal, sys
from sd_perf.cli import main

class Signals:
    def find_spec(self, name, *_):
        if name == "tyro":
            signal.raise_signal(signal.{number})

sys.meta_path.insert(0, Signals())
main()
"""


def test_help_lists_every_command(sd_perf):
    code, output, _ = sd_perf("--help")
    running = "train evaluate sample score export data fetch mlperf cluster"
    looking = "watch compare report estimate parity config completion doctor"
    commands = f"{running} verify convert-checkpoints {looking}"
    assert code == 0 and f"{{{','.join(commands.split())}}}" in output
    assert "sd-perf mlperf check" in output


MLPERF_COMMANDS = "check, rcp, score, system, package, convergence"


@pytest.mark.parametrize(
    ("group", "commands"),
    [("data", DATA_COMMANDS), ("mlperf", MLPERF_COMMANDS), ("config", "show, diff, schema")],
)
def test_a_group_alone_names_its_commands(group, commands, sd_perf):
    code, _, errors = sd_perf(group)
    words = " ".join(errors.replace("│", " ").split())
    assert code == 2 and f"{{{commands}}}" in words and f"sd-perf {group} --help" in words
    code, output, _ = sd_perf(group, "--help")
    assert code == 0 and f"{{{commands.replace(', ', ',')}}}" in output


@pytest.mark.parametrize("command", WITH_SETTINGS, ids=" ".join)
def test_defaults_are_the_presets(command, preset, sd_perf):
    code, output, _ = sd_perf(*command, "--config", preset, "--help")
    words = " ".join(output.replace("│", " ").split())
    assert code == 0 and "--training.max-samples INT length of the run, samples" in words
    assert "(rounded up to whole steps) (default: 8)" in words


def test_gpus_are_those_of_the_table(preset, sd_perf, refused):
    choices = ",".join(names())
    assert f"--target {{here,{choices}}}" in sd_perf("doctor", "--help")[1]
    assert f"--gpu {{{choices}}}" in sd_perf("estimate", "--help")[1]
    for command in (["doctor"], ["train", "--config", preset, "--dry-run"]):
        sentence = refused(*command, "--target", "h101")
        matches(sentence, "--target: 'h101' is not known (did you mean", ", or here")
