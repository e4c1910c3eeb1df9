"""A child process of `sd-perf parity`: `python -m sd_perf.tools.parity REQUEST`.

REQUEST is a JSON file that `run_parity` writes: config, where, levels, folder, and `answer`, the
JSON file to write.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch

from sd_kernels.errors import KernelError
from sd_perf.errors import UserError
from sd_perf.files import read_json, write_json
from sd_perf.presets import config_from_dict
from sd_perf.stopping import STOP, Stopped
from sd_perf.tools.parity.compare_levels import compare_levels
from sd_perf.visible import visible


def main(request: Path) -> int:
    """Compare what the request asks for and write the answer; 2 and a sentence for bad input."""
    asked = read_json(request)
    config = config_from_dict(asked["config"])
    if config.training.cpu_threads is not None:
        torch.set_num_threads(config.training.cpu_threads)
    try:
        part = compare_levels(
            config,
            where=asked["where"],
            levels=set(asked["levels"]),
            folder=Path(asked["folder"]),
            tell=functools.partial(print, file=sys.stderr, flush=True),
        )
    except (UserError, KernelError) as error:
        print(visible(f"sd-perf: {error}"), file=sys.stderr)
        return 2
    write_json(Path(asked["answer"]), part)
    return 0


if __name__ == "__main__":
    STOP.take(speaks=False)  # sd-perf parity has said it
    try:
        sys.exit(main(Path(sys.argv[1])))
    except Stopped as stop:
        sys.exit(stop.exit_code)
