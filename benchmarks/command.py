"""The command lines of the benchmarks."""

from __future__ import annotations

import argparse


def command_parser(name: str, documentation: str | None) -> argparse.ArgumentParser:
    """Parser of `python -m benchmarks.NAME`, described by its documentation's first paragraph."""
    description = (documentation or "").partition("\n\n")[0]
    return argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
