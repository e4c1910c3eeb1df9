"""The command line `sd-perf`.

A command is a function. Its parameters are the options, its docstring is the help text, and its
body calls the product and prints what comes back. `dispatch` lists the commands; `console`,
`options` and `place` hold what they share.
"""

import sys

from sd_perf.cli.place import RANK
from sd_perf.cpu_settings import settle_cpu
from sd_perf.stopping import STOP, Stopped

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit, see `dispatch.main`.

    Signals are handled before the rest of the command line is imported, which takes half a second.
    """
    STOP.take(speaks=RANK == 0)
    try:
        settle_cpu()  # before torch is imported
        from sd_perf.cli.dispatch import main as run

        STOP.heed()
        run(arguments)
    except Stopped as stop:  # before a command had begun
        if arguments is None:
            STOP.ignore()
        else:
            STOP.give_back()
        sys.exit(stop.exit_code)
    except ModuleNotFoundError as missing:
        STOP.give_back()
        package = (missing.name or "").partition(".")[0]
        if package not in ("rich", "tyro", "yaml"):
            raise
        sys.exit(f"sd-perf: the command line needs {package}; pip install 'sd-perf[cli]'")
