"""How img2dataset is called and what it says is read back; a stand-in plays the program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sd_perf.data.laion import download as module
from sd_perf.data.laion.download import STATUS_NAME, download, make_environment
from sd_perf.errors import DataError, UserError
from tests.data.laion.test_metadata import write_metadata

pytest.importorskip("pyarrow", reason="needs pyarrow")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")

PROGRAM = f"""#!{sys.executable}
import json, os, sys
import pyarrow, pyarrow.parquet
options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
folder = options["output_folder"]
variables = ["PYTHONPATH", "NO_ALBUMENTATIONS_UPDATE"]
heard = {{"options": options, "variables": {{name: os.environ.get(name) for name in variables}}}}
open(folder + "/heard", "w").write(json.dumps(heard))
rows = [
    ("success", None), ("failed_to_download", "HTTP Error 404: Not Found"),
    ("failed_to_download", "hostname 'a.b' is 12345"),
    ("failed_to_download", "hostname 'c.d' is 67890"),
]
table = pyarrow.table({{
    "key": [f"{{n:09}}" for n in range(4)], "url": ["u"] * 4, "SAMPLE_ID": list(range(4)),
    "status": [row[0] for row in rows], "error_message": [row[1] for row in rows],
    "LICENSE": ["cc-by"] * 4, "sha256": ["0"] * 4, "caption": ["c"] * 4,
}})
for number in (0, 1):
    pyarrow.parquet.write_table(table, f"{{folder}}/{{number:05}}.parquet")
open(folder + "/00000_stats.json", "w").write("{{}}")
sys.exit(int(os.environ.get("FAKE_EXIT", 0)))
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Stands in for img2dataset: completes one shard of four pictures, and begins another."""
    path = tmp_path / "program"
    path.write_text(PROGRAM)
    path.chmod(0o755)
    return path


def test_the_benchmarks_options_and_what_became_of_each_picture(program, tmp_path):
    write_metadata(tmp_path / "metadata" / "a.parquet", 6)
    result = download(tmp_path / "metadata", tmp_path / "out", program, processes=3, threads=5)
    assert (result.rows, result.tried) == (6, 4)
    assert result.statuses == {
        ("success", ""): 1,
        ("failed_to_download", "HTTP Error 404: Not Found"): 1,
        ("failed_to_download", "... is ..."): 2,
    }
    heard = json.loads((tmp_path / "out" / "heard").read_text())
    assert heard["variables"] == {"PYTHONPATH": None, "NO_ALBUMENTATIONS_UPDATE": "1"}
    assert heard["options"] == {
        "url_list": str(tmp_path / "metadata"),
        "input_format": "parquet",
        "url_col": "URL",
        "caption_col": "TEXT",
        "output_format": "webdataset",
        "output_folder": str(tmp_path / "out"),
        "processes_count": "3",
        "thread_count": "5",
        "incremental_mode": "incremental",
        "resize_mode": "no",
        "save_additional_columns": '["SAMPLE_ID", "LICENSE", "NSFW", "similarity", "WIDTH", '
        '"HEIGHT"]',
        "enable_wandb": "False",
    }
    table = parquet.read_table(tmp_path / "out" / STATUS_NAME).to_pylist()
    assert [row["key"] for row in table] == [f"{number:09}" for number in range(4)]
    assert table[1]["error_message"] == "HTTP Error 404: Not Found"


def test_a_program_that_fails(program, tmp_path, monkeypatch):
    write_metadata(tmp_path / "metadata" / "a.parquet", 6)
    monkeypatch.setenv("FAKE_EXIT", "3")
    with pytest.raises(UserError, match="ended with exit code 3"):
        download(tmp_path / "metadata", tmp_path / "out", program)
    assert not (tmp_path / "out" / STATUS_NAME).exists()


def test_shards_of_other_metadata(program, tmp_path):
    write_metadata(tmp_path / "metadata" / "a.parquet", 3)
    with pytest.raises(DataError, match="holds shards of 4 pictures, and the metadata has 3 rows"):
        download(tmp_path / "metadata", tmp_path / "out", program)


def test_the_environment_is_made_once(tmp_path, monkeypatch):
    """Without a network: what would run is recorded."""
    calls, said = [], []

    def run(command, **options):
        calls.append(command)
        program = tmp_path / "env" / "bin" / "img2dataset"
        program.parent.mkdir(parents=True, exist_ok=True)
        program.touch()
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(module.subprocess, "run", run)
    program = make_environment(tmp_path / "env", said.append)
    assert program == tmp_path / "env" / "bin" / "img2dataset" and len(said) == 1
    assert calls[0][1:3] == ("-m", "venv") and calls[1][-1] == f"img2dataset=={module.VERSION}"
    assert make_environment(tmp_path / "env", said.append) == program
    assert len(calls) == 2 and len(said) == 1


def test_an_environment_that_cannot_be_made(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stderr="a line\nERROR: no index\n")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"cannot be installed \(ERROR: no index\)"):
        make_environment(tmp_path / "env", lambda words: None)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(UserError, match="holds other files"):
        make_environment(tmp_path / "photos", lambda words: None)
