"""Processors near a GPU."""

from __future__ import annotations

import pytest

from sd_perf.cluster.bound import gpu_addresses, near_cpus, parse_cpus

ADDRESSES = ["00000000:19:00.0", "00000000:3B:00.0"]


@pytest.fixture
def pci(tmp_path):
    for address, node, cpus in (("0000:19:00.0", 0, "0-1,8"), ("0000:3b:00.0", 1, "2-3")):
        (tmp_path / address).mkdir()
        (tmp_path / address / "numa_node").write_text(f"{node}\n")
        (tmp_path / address / "local_cpulist").write_text(f"{cpus}\n")
    return tmp_path


def test_near_cpus(pci):
    assert near_cpus(0, ADDRESSES, pci) == {0, 1, 8}
    assert near_cpus(1, ADDRESSES, pci) == {2, 3}
    assert near_cpus(5, ADDRESSES[1:], pci) == {2, 3}  # the launcher shows it its own GPU alone


def test_what_tells_nothing(pci):
    assert near_cpus(0, [], pci) == near_cpus(2, ADDRESSES, pci) == set()
    assert near_cpus(0, ["00000000:FF:00.0"], pci) == set()
    (pci / "0000:19:00.0/numa_node").write_text("-1\n")
    assert near_cpus(0, ADDRESSES, pci) == set()


def test_lists_of_processors():
    assert parse_cpus("0-2,8\n") == {0, 1, 2, 8} and parse_cpus("\n") == set()


def test_gpus_that_this_process_sees(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho '0, GPU-a, 00000000:19:00.0'\necho '1, GPU-b, 00000000:3B:00.0'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_addresses() == ADDRESSES
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b,0")
    assert gpu_addresses() == ADDRESSES[::-1]
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu_addresses() == []
