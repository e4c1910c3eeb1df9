#!/usr/bin/env bash
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
# The batch script that sbatch.sh submits. It stays in the foreground of srun, which starts a task per GPU. The signal goes
# to the tasks, since it has no `B:`: they save and end with 75, and then the job has itself requeued.
set -euo pipefail
exec "${PYTHON:-python3}" -m sd_perf cluster "$@"
