#!/usr/bin/env bash
# One timed run, as the benchmark's README starts it: caches dropped, training, scores off the clock, verdict.
# Every option is also a variable of its name in capitals (NUM_NODES, ...); an option wins. --dry-run prints the commands,
# --help explains the options. PYTHON is the interpreter: that of .venv, where there is one, else python3.
set -euo pipefail
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x "$here/.venv/bin/python" ] || PYTHON=$here/.venv/bin/python
fi

options=(--num-nodes "${NUM_NODES:-1}" --results-dir "${RESULTS_DIR:-results}" --checkpoint "${CHECKPOINT:-}")
[ -z "${GPUS_PER_NODE:-}" ] || options+=(--gpus-per-node "$GPUS_PER_NODE")
[ -z "${CONFIG:-}" ] || options+=(--config "$CONFIG")
exec "$PYTHON" -m sd_perf cluster run "${options[@]}" "$@"
