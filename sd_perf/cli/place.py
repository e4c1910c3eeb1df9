"""Which process of a run this one is, for what commands print."""

from sd_perf.distributed.launcher import Place, read_place
from sd_perf.errors import ConfigError

try:
    PLACE = read_place()
except ConfigError:  # raised again by the commands that have ranks
    PLACE = Place()
RANK, LOCAL_RANK = PLACE.rank, PLACE.local_rank
"""of this process among all that the launcher started, and among those on this machine"""
