"""`python -m sd_perf`, which torchrun starts as `torchrun ... -m sd_perf train ...`."""

from sd_perf.cli import main

if __name__ == "__main__":
    main()
