#!/usr/bin/env bash
# Submits a run to Slurm, with the options of the benchmark's script, its short ones too. --help explains them, --dry-run
# submits nothing. PYTHON is the interpreter, here and on the nodes: that of .venv, where there is one, else python3.
set -euo pipefail
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x "$here/../.venv/bin/python" ] || PYTHON=$here/../.venv/bin/python
fi

words=()
for word in "$@"; do
    case $word in
        -a) word=--account ;;
        -p) word=--partition ;;
        -n) word=--num-nodes ;;
        -g) word=--gpus-per-node ;;
        -t) word=--walltime ;;
        -c) word=--config ;;
        -k) word=--checkpoint ;;
        -l) word=--log-dir ;;
        -r) word=--results-dir ;;
        -d) word=--container ;;
    esac
    words+=("$word")
done
exec "$PYTHON" -m sd_perf cluster submit --batch-script "$here/srun.sh" "${words[@]}"
