import subprocess
import sys
from pathlib import Path

import pytest

from sd_perf.tools.results import read

ROOT = Path(__file__).parents[2]


def test_small_run_compares_both_routes(tmp_path):
    pytest.importorskip("scipy")
    output = tmp_path / "result.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.frechet_distance",
        "--features",
        "96",
        "--repeats",
        "1",
        "--output",
        str(output),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    # Imported late: it needs scipy.
    from benchmarks.frechet_distance import DistanceRow

    rows = read(output, "frechet_distance", DistanceRow).rows
    assert [row["case"] for row in rows] == ["full rank", "rank-deficient"]
    for row in rows:
        assert row["difference"] < 1e-6 and row["ratio"] == pytest.approx(
            row["sqrtm_s"] / row["eigenvalues_s"]
        )
