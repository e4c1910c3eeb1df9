#!/usr/bin/env bash
# Submits a run to Slurm, with the options of the benchmark's script; --help explains them, --dry-run submits nothing.
# PYTHON is the interpreter, here and on the nodes: that of .venv, where there is one, else python3.
set -euo pipefail
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x "$here/../.venv/bin/python" ] || PYTHON=$here/../.venv/bin/python
fi
exec "$PYTHON" -m sd_perf cluster submit --batch-script "$here/srun.sh" "$@"
