"""What `data bench` says of a loader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sd_perf.cli import main
from sd_perf.data.prepare.scenes import write_scene_shards
from sd_perf.data.shard_writer import ShardWriter
from sd_perf.errors import DataError
from sd_perf.tools.loader_rate import LoaderRate, measure
from tests.small_run import small_config

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"


def raw_config(folder: Path, **data):
    write_scene_shards(folder / "raw", 12, seed=0)
    fields = {
        "format": "raw",
        "path": str(folder / "raw"),
        "context": "open_clip",
        "autoencoder": "unused",
        "latent_size": 8,
    }
    return small_config(folder / "run", data=fields | data, text_encoder={"weights": "random"})


def test_rate_and_stages_of_pictures(tmp_path):
    config = raw_config(tmp_path)
    found = measure(config, ranks=2, seconds=0.05)
    assert set(found.cpu_ms) == {"read", "decode", "resize"}
    assert found.samples_per_second > 0 and min(found.cpu_ms.values()) >= 0
    shard = next((tmp_path / "raw").glob("*.tar")).stat().st_size
    assert 0 < 12 * found.bytes_per_sample < shard


def test_nothing_to_measure(tmp_path):
    with pytest.raises(DataError, match="synthetic reads no files"):
        measure(small_config(tmp_path), ranks=1, seconds=0.05)


@pytest.mark.parametrize(
    ("needed", "says"),
    [
        (None, "whether a step would wait: name a GPU (--gpu) or a rate (--step-rate)"),
        (99.0, "no step would wait: h100 takes 99 samples/s of each process"),
        (
            400.0,
            "the step would wait 75% of the time: h100 takes 400 samples/s of each process; the "
            "loader's threads rest",
        ),
    ],
)
def test_words(needed, says):
    rate = LoaderRate(100.0, 2e5, {"read": 0.5, "check": 1.5}, "threads rest")
    lines = list(rate.lines(needed, "h100"))
    assert lines[0] == "100 samples/s, 20 MB/s from one process"
    assert (
        lines[1] == "CPU ms per sample: 2.000 (read 0.500, check 1.500); a core makes 500 a second"
    )
    assert lines[2] == says


def test_the_command(tmp_path, capsys):
    with ShardWriter(tmp_path / "shards") as writer:
        for number in range(40):
            context = np.zeros((24, 128), np.float16)
            writer.write(np.zeros((8, 8, 8)), f"caption {number}", context=context)
    command = ["data", "bench", "--config", str(SMOKE), "--data.path", str(tmp_path / "shards")]
    with pytest.raises(SystemExit) as end:
        main([*command, "--seconds", "0.05", "--step-rate", "1e8"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].startswith("the step would wait 100%")
    with pytest.raises(SystemExit) as end:
        main([*command, "--step-rate", "1", "--gpu", "h100"])
    assert end.value.code == 2 and "--step-rate" in capsys.readouterr().err


@pytest.mark.slow
def test_stages_of_dali(tmp_path, caplog):
    """Not more pictures are probed than the pipeline takes at once."""
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI: pip install 'sd-perf[dali]'")
    config = raw_config(tmp_path, loader="dali")
    assert config.training.global_batch_size < 12
    found = measure(config, ranks=1, seconds=0.05)
    assert set(found.cpu_ms) == {"read", "decode and resize"} and min(found.cpu_ms.values()) > 0
    assert not caplog.records
