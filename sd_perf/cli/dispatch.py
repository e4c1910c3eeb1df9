"""From the arguments to a command and an exit code. The tables here list every command."""

from __future__ import annotations

import argparse
import functools
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Literal

import tyro

from sd_perf.children import end_with_torchrun
from sd_perf.cli import cluster, config, mlperf
from sd_perf.cli.checkpoints import convert_checkpoints, verify
from sd_perf.cli.completion import completion_script
from sd_perf.cli.data import bench, encode, prepare, scenes, statistics
from sd_perf.cli.data_checks import show, verify_data
from sd_perf.cli.datasets import (
    convert,
    download_images,
    fid_statistics,
    filter_metadata,
    split_coco,
)
from sd_perf.cli.evaluation import evaluate, sample, score
from sd_perf.cli.fetch import fetch
from sd_perf.cli.place import LOCAL_RANK, PLACE, RANK
from sd_perf.cli.runs import compare, watch
from sd_perf.cli.tools import doctor, estimate, parity, report, report_benchmarks
from sd_perf.cli.train import train
from sd_perf.cli.weights import export
from sd_perf.config import Config
from sd_perf.console import LossyOutput
from sd_perf.errors import ConfigError, UserError
from sd_perf.presets import load_preset
from sd_perf.stopping import STOP, Stopped
from sd_perf.visible import visible

Command = Callable[..., int]

_BUG, _BAD_INPUT = 1, 2
_FIRST_RANK_SPEAKS = 30.0
"""seconds in which a machine's first rank comes to the error that another has; less than
run.join_seconds, after which rank 0 would take the other for missing"""
_DESCRIPTION = (
    "A fast, checkable trainer of the MLPerf text-to-image benchmark (Stable Diffusion v2). "
    "Bad input is one sentence and exit code 2; --debug, with any command, adds the traceback."
)


def _group(name: str, about: str, commands: dict[str, Command]) -> Command:
    """The entry of a group in `sd-perf --help`.

    It is listed and never called: `_run` looks for the group's commands first.
    """

    def listed() -> int:
        raise AssertionError(f"sd-perf {name} is a group of commands")

    listed.__doc__ = f"{about}: `sd-perf {name} {' | '.join(commands)}`."
    return listed


def completion(shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]) -> int:
    """Print the script with which a shell completes commands and options.

    For bash: `sd-perf completion bash > ~/.local/share/bash-completion/completions/sd-perf`.

    Args:
        shell: that it is for
    """
    print(completion_script(_COMMANDS, _GROUPS, shell), end="")
    return 0


_DATA: dict[str, Command] = {
    "prepare": prepare,
    "encode": encode,
    "verify": verify_data,
    "show": show,
    "bench": bench,
    "scenes": scenes,
    "statistics": statistics,
    "filter-metadata": filter_metadata,
    "download-images": download_images,
    "convert": convert,
    "split-coco": split_coco,
    "fid-statistics": fid_statistics,
}
_MLPERF: dict[str, Command] = {
    "check": mlperf.check,
    "rcp": mlperf.rcp,
    "score": mlperf.score,
    "system": mlperf.system,
    "package": mlperf.package,
    "convergence": mlperf.convergence,
}
_CONFIG: dict[str, Command] = {"show": config.show, "diff": config.diff, "schema": config.schema}
_REPORT: dict[str, Command] = {"benchmarks": report_benchmarks}
"""kinds of reports that are asked for by name; any other word after `report` is a run folder"""
_CLUSTER: dict[str, Command] = {
    "run": cluster.run,
    "submit": cluster.submit,
    "job": cluster.job,
    "preflight": cluster.preflight,
    "prove": cluster.prove,
    "conclude": cluster.conclude,
    "conclude-job": cluster.conclude_job,
}
_GROUPS = {"data": _DATA, "mlperf": _MLPERF, "cluster": _CLUSTER, "config": _CONFIG}
_COMMANDS: dict[str, Command] = {
    "train": train,
    "evaluate": evaluate,
    "sample": sample,
    "score": score,
    "export": export,
    "data": _group("data", "Make and check shards, the tiny world, FID's statistics", _DATA),
    "fetch": fetch,
    "mlperf": _group("mlperf", "MLPerf logs and submissions", _MLPERF),
    "cluster": _group("cluster", "What run_and_time.sh and slurm/*.sh call", _CLUSTER),
    "verify": verify,
    "convert-checkpoints": convert_checkpoints,
    "watch": watch,
    "compare": compare,
    "report": report,
    "estimate": estimate,
    "parity": parity,
    "config": _group("config", "Presets as text, their differences, their schema", _CONFIG),
    "completion": completion,
    "doctor": doctor,
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit.

    Exit codes: 0 done, 1 a bug (or a check that failed, or output that could not be written), 2 bad
    input, 75 stopped by a signal (training: and saved), 76 another process of the run was lost, 130
    stopped by Ctrl-C.

    `cli.main` has taken the signals. They are handled to the end of the process; a program that
    gives `arguments` gets its own handlers and streams back.
    """
    if arguments is None:
        end_with_torchrun()
    output = LossyOutput()
    output.take()
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        try:
            code = _exit_code(words)
        finally:
            STOP.hold()
        # What training is for is in its run folder.
        if output.is_lost() and not code and words[:1] != ["train"]:
            code = _BUG
        if code:
            _let_first_rank_speak()
    finally:
        if arguments is None:
            STOP.ignore()
        else:
            output.give_back()
            STOP.give_back()
    if arguments is None and PLACE.size > 1 and not isinstance(code, str):
        # The threads of gloo's groups may abort a process that Python takes down.
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code or 0)
    sys.exit(code)


def _exit_code(arguments: list[str]) -> str | int | None:
    """Run a command; returns its exit code. Errors that a user can mend are printed."""
    debug = "--debug" in arguments
    logging.basicConfig(
        level=logging.INFO if debug else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        return _run([argument for argument in arguments if argument != "--debug"])
    except SystemExit as leaving:  # tyro has said why, or another rank will
        return leaving.code
    except _bad_input_errors() as error:
        code = getattr(error, "exit_code", _BAD_INPUT)
        if debug:
            traceback.print_exc()
        if isinstance(error, ConfigError):  # every rank read the config; the first one speaks
            _let_first_rank_speak()
            if STOP.received is not None:
                return code
        print(visible(f"sd-perf: {f'rank {RANK}: ' if RANK else ''}{error}"), file=sys.stderr)
        return code
    except Stopped as stop:
        return stop.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        # Such as a name over 255 bytes, or a folder that may not be searched, in any option.
        if debug:
            traceback.print_exc()
        sentence = f"{error.filename}: cannot be used ({error.strerror}); check the path"
        print(visible(f"sd-perf: {sentence}"), file=sys.stderr)
        return _BAD_INPUT


def _let_first_rank_speak() -> None:
    """On other ranks than a machine's first, wait long enough to be ended by the launcher.

    A launcher ends all processes of a machine as soon as one fails. Without the wait, a rank that
    fails first would end the rank that has the error to print.
    """
    if LOCAL_RANK and STOP.received is None:
        STOP.wait(_FIRST_RANK_SPEAKS)


def _bad_input_errors() -> tuple[type[Exception], ...]:
    """The errors that a user can mend, which are printed as one sentence.

    Kernels have an error of their own. Only a command that has loaded the kernels can raise it, so
    it is looked up rather than imported: their package loads torch.
    """
    kernels = sys.modules.get("sd_kernels.errors")
    return (UserError, kernels.KernelError) if kernels else (UserError,)


def _run(arguments: list[str]) -> int:
    """Run the command that the arguments name; returns its exit code."""
    commands, program = _COMMANDS, "sd-perf"
    if arguments and arguments[0] in _GROUPS:
        program = f"sd-perf {arguments[0]}"
        commands, arguments = _GROUPS[arguments[0]], arguments[1:]
    elif arguments[:1] == ["report"] and arguments[1:2] and arguments[1] in _REPORT:
        program, commands, arguments = "sd-perf report", _REPORT, arguments[1:]
    chosen = commands.get(arguments[0]) if arguments else None
    if chosen and "settings" in inspect.signature(chosen).parameters:
        # Fields of the preset become options; their defaults are the preset's values.
        with_preset = functools.partial(chosen, settings=_preset_named_by(arguments))
        commands = {**commands, arguments[0]: with_preset}
    return tyro.extras.subcommand_cli_from_dict(
        commands,
        args=arguments,
        prog=program,
        description=_DESCRIPTION,
        console_outputs=LOCAL_RANK == 0,
    )


def _preset_named_by(arguments: list[str]) -> Config:
    """The preset that --config names, or the defaults where there is no --config."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        path = parser.parse_known_args(arguments)[0].config
    except argparse.ArgumentError:
        path = None  # "--config" without a value: tyro says so
    return load_preset(path) if path else Config()
