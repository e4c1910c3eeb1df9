"""Whole runs as the benchmark's scripts start them: on one machine, and as jobs of Slurm.

`slurm`, `submit` and `job` run beside the scheduler and need no torch, so that where training runs
in containers the hosts need none either.
"""
