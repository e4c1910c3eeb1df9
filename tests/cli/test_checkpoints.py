"""`sd-perf verify` at the command line."""

from __future__ import annotations

from tests.cli.bad_input import matches, newest, saved


def test_verify(copied_run, sd_perf, refused, tmp_path):
    before = saved(copied_run)
    code, output, _ = sd_perf("verify", copied_run)
    assert code == 0 and output.splitlines()[-1] == f"{newest(copied_run)}: good"
    assert saved(copied_run) == before
    file = newest(copied_run) / "model_00000_of_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, output, _ = sd_perf("verify", copied_run)
    assert code == 1 and output.splitlines()[0].endswith("samples_0000000004: good")
    matches(output, f"{file}: truncated")
    matches(refused("verify", tmp_path), "is no run folder")
