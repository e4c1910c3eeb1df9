import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    results = json.loads(output.read_text())["results"]
    assert set(results) == {"full rank", "rank-deficient"}
    for row in results.values():
        assert row["difference"] < 1e-6 and row["ratio"] == pytest.approx(
            row["sqrtm_s"] / row["eigenvalues_s"]
        )
