"""`python -m sd_perf`: the command line, for `torchrun ... -m sd_perf train ...`."""

from sd_perf.cli import main

if __name__ == "__main__":
    main()
