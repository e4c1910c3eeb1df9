"""Parts of `gpu_acceptance` that need no GPU and go wrong as they are called; run as a script.

    python -m tests.benchmarks.stand_in_parts NAME --findings FILE ...

They write findings as `benchmarks.gpu_parts` does, and import nothing heavy.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

H100 = "NVIDIA H100 80GB HBM3"
RESTART = 75


def main() -> int:
    """Run the part of this name; returns the exit code."""
    name, path = sys.argv[1], Path(sys.argv[sys.argv.index("--findings") + 1])
    found: dict[str, Any] = json.loads(path.read_text())
    found["status"] = "running"

    def save() -> None:
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(found))
        draft.replace(path)

    if name == "environment":
        machine = {"gpu": H100, "compute_capability": "9.0"}
        found["facts"] = {"machine": machine, "versions": {"torch": "2"}}
    elif name == "raises":
        raise RuntimeError("nothing works")
    for item in ("one", "two", "three"):
        if item in found["finished"]:
            continue
        found["current"] = item
        save()
        if item == "two" and name == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        if item == "two" and name == "hangs":
            time.sleep(600)
        found["finished"].append(item)
        found["current"] = None
        if item == "two" and name == "breaks":
            found["broken"][item] = "an illegal memory access was encountered"
            save()
            return RESTART
    found["status"] = "done"
    if name == "timed":
        found["rows"] = json.loads(os.environ["STAND_IN_ROWS"])
        found["checks"] = json.loads(os.environ["STAND_IN_CHECKS"])
        found["finished"] += json.loads(os.environ["STAND_IN_GROUPS"])
    save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
