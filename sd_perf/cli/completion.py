"""Completion of commands and options by the shell, from what tyro knows of them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Union

import tyro

Commands = Mapping[str, Callable[..., int]]


def completion_script(commands: Commands, groups: Mapping[str, Commands], shell: str) -> str:
    """The script for a shell of tyro's: bash, zsh or fish."""
    nested = {name: _group(groups[name]) if name in groups else commands[name] for name in commands}
    # tyro prints it and leaves.
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        arguments = ["--tyro-print-completion", shell]
        tyro.extras.subcommand_cli_from_dict(nested, args=arguments, prog="sd-perf")
    return printed.getvalue()


def _group(commands: Commands) -> Callable[..., Any]:
    """A command whose only argument is one of these."""

    def chosen(command: Any) -> Any:
        return command

    one = [
        Annotated[Any, tyro.conf.subcommand(name=name, constructor=command)]
        for name, command in commands.items()
    ]
    # A union of one is no union: tyro pads it so, too.
    union = Union[(*one, Annotated[None, tyro.conf.Suppress])]  # type: ignore[valid-type]
    chosen.__annotations__ = {"command": Annotated[union, tyro.conf.arg(name="")]}
    return chosen
