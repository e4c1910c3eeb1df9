"""One process of `sd-perf parity`, as `run` starts it: `python -m sd_perf.tools.parity REQUEST`."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch

from sd_kernels.errors import KernelError
from sd_perf.errors import UserError
from sd_perf.files import read_json, write_json
from sd_perf.presets import config_from_dict
from sd_perf.tools.parity.run import compare


def main(request: Path) -> int:
    """Compare what the request asks for, and write its answer; 2 and a sentence for bad input."""
    asked = read_json(request)
    config = config_from_dict(asked["config"])
    if config.training.cpu_threads is not None:
        torch.set_num_threads(config.training.cpu_threads)
    tell = functools.partial(print, file=sys.stderr, flush=True)
    try:
        part = compare(config, asked["where"], set(asked["levels"]), Path(asked["folder"]), tell)
    except (UserError, KernelError) as error:
        print(f"sd-perf: {error}", file=sys.stderr)
        return 2
    write_json(Path(asked["answer"]), part)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
