"""The exit code of several processes."""

from __future__ import annotations

import pytest

from sd_perf.cluster.torchrun import exit_code


@pytest.mark.parametrize(
    ("codes", "ended"),
    [([75, 75], 75), ([-9], 76), ([76, -9], 76), ([2, 76], 2), ([1, 76], 1), ([76, 76], 76)],
)
def test_who_ended_the_run(codes, ended):
    assert exit_code(codes) == ended
