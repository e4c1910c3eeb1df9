"""The command line `sd-perf`. Every module but `dispatch`, `console` and `options` holds commands.

A command is a function. Its parameters are the options, its docstring is the help text, and its
body calls the product and prints what comes back. `dispatch` lists the commands.
"""

import sys

from sd_perf.cpu_settings import settle_cpu

settle_cpu()  # before torch is imported
try:
    from sd_perf.cli.dispatch import main
except ModuleNotFoundError as missing:
    package = (missing.name or "").partition(".")[0]
    if package not in ("rich", "tyro", "yaml"):
        raise
    sys.exit(f"sd-perf: the command line needs {package}; pip install 'sd-perf[cli]'")

__all__ = ["main"]
