"""`sd-perf config show`, `diff` and `schema`: presets as text."""

from __future__ import annotations

import json
from pathlib import Path

import tyro

from sd_perf.cli.console import print_plain, table_console
from sd_perf.cli.options import Settings
from sd_perf.files import disk_errors, write_text


def show(config: Path, settings: Settings, changed: bool = False) -> int:
    """Print a preset as it is read: every key, with meaning, unit and default as comments.

    What is printed is a preset that can be read again.

    Args:
        config: YAML preset
        settings: fields of the preset
        changed: only the keys that have not their default
    """
    from sd_perf.tools.config_text import as_yaml

    print(as_yaml(settings, changed), end="")
    return 0


def diff(first: tyro.conf.Positional[Path], second: tyro.conf.Positional[Path]) -> int:
    """Print the keys in which two presets, or the configs of two runs, differ.

    Args:
        first: YAML preset, or run folder
        second: YAML preset, or run folder
    """
    from sd_perf.tools.config_text import differences

    table_console().print(differences(first, second) or "the configs are the same")
    return 0


def schema(output: Path | None = None) -> int:
    """Print the JSON schema of presets, with which editors complete and check keys.

    Args:
        output: file to write it to
    """
    from sd_perf.tools.config_text import schema as schema_of_presets

    text = json.dumps(schema_of_presets(), indent=2) + "\n"
    if output is None:
        print(text, end="")
        return 0
    with disk_errors(output, "choose another --output"):
        write_text(output, text)
    print_plain(output)
    return 0
