"""System descriptions and packages: the tree, the official checkers over it, and their reasons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sd_perf.errors import DataError, UserError
from sd_perf.mlperf.package import check_package, write_package
from sd_perf.mlperf.results import one_set, read_results
from sd_perf.mlperf.system import (
    FIELDS,
    STATUS,
    blanks,
    describe_system,
    official_faults,
    read_system,
    write_system,
)
from tests.mlperf.conftest import change

pytest.importorskip("mlperf_logging")

CPUINFO = """processor\t: {number}
model name\t: Xeon 8570
physical id\t: {socket}
core id\t\t: {core}
cpu cores\t: 2
"""


def described(**named: str) -> dict[str, str]:
    given = {"submitter": "acme", "division": "closed", "system_name": "box"}
    return describe_system({**given, "status": STATUS["onprem"], "number_of_nodes": "1", **named})


@pytest.fixture
def machine(tmp_path):
    """A root with two sockets of two cores of two threads, an NVMe disk and an InfiniBand port."""
    cpus = [CPUINFO.format(number=n, socket=n // 2 % 2, core=n % 2) for n in range(8)]
    files = {
        "proc/cpuinfo": "\n".join(cpus),
        "proc/meminfo": "MemTotal:       2097152000 kB\nMemFree: 1 kB\n",
        "etc/os-release": 'NAME="X"\nPRETTY_NAME="Debian 13"\n',
        "sys/block/nvme0n1/size": "7501476528\n",
        "sys/block/loop0/size": "8\n",
        "sys/class/infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)\n",
        "sys/class/infiniband/mlx5_1/ports/1/rate": "400 Gb/sec (4X NDR)\n",
        "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "4000000\n",
        "sys/devices/system/cpu/cpu0/cache/index0/level": "1\n",
        "sys/devices/system/cpu/cpu0/cache/index0/type": "Data\n",
        "sys/devices/system/cpu/cpu0/cache/index0/size": "48K\n",
    }
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "root"


def test_what_a_machine_says(machine):
    description = describe_system({"cooling": "air"}, machine)
    assert tuple(description) == FIELDS and len(FIELDS) == 33
    assert description["host_processors_per_node"] == "2"
    assert description["host_processor_model_name"] == "Xeon 8570"
    assert description["host_processor_core_count"] == "2"
    assert description["host_processor_vcpu_count"] == "4"
    assert description["host_processor_frequency"] == "4.00 GHz (max)"
    assert description["host_processor_caches"] == "L1d 48K"
    assert description["host_memory_capacity"] == "2000 GiB"
    assert description["host_storage_type"] == "NVMe SSD"
    assert description["host_storage_capacity"] == "3.84 TB"
    assert description["host_networking"] == "2x 400 Gb/sec (4X NDR)"
    assert description["operating_system"] == "Debian 13"
    missing = blanks(description)
    assert "host_networking_topology" in missing and "cooling" not in missing
    assert "hw_notes" not in missing


def test_a_machine_that_says_nothing(tmp_path):
    description = describe_system({}, tmp_path)
    assert all(isinstance(value, str) for value in description.values())
    assert "host_memory_capacity" in blanks(description)
    with pytest.raises(UserError, match="colour: is no field of a system description"):
        describe_system({"colour": "red"})


def test_descriptions_on_the_disk(tmp_path):
    path = tmp_path / "systems" / "box.json"
    write_system(path, described())
    assert read_system(path) == described() and official_faults(path, "5.0.0") == []
    with pytest.raises(UserError, match="exists already"):
        write_system(path, described())
    for field, value, words in (
        ("cooling", 3, "cooling is 3, not text"),
        ("status", "onprem", "status is 'onprem'; it must be one of Available on-premise"),
    ):
        path.write_text(json.dumps({**described(), field: value}))
        with pytest.raises(DataError, match=words):
            read_system(path)
    path.write_text(json.dumps({"cooling": ""}))
    with pytest.raises(DataError, match="lacks 'submitter'"):
        read_system(path)
    with pytest.raises(DataError, match="sd-perf mlperf system writes one"):
        read_system(tmp_path / "absent.json")


@pytest.fixture
def results(ten_logs):
    return read_results(one_set([ten_logs()]))[0]


def red(folder: Path, results) -> dict[str, str]:
    checks = check_package(folder, results, "5.0.0")
    return {check.name: " ".join(check.faults) for check in checks if check.faults}


def test_a_package_is_green(results, tmp_path):
    folder = write_package(results, described(), "acme", "box", tmp_path / "out")
    logs = sorted((folder / "results/box/stable_diffusion").iterdir())
    assert [path.name for path in logs] == [f"result_{n}.txt" for n in range(10)]
    assert (folder / "systems/box.json").is_file()
    code = folder / "benchmarks/stable_diffusion/implementations/sd-perf"
    readme = (code / "README.md").read_text()
    assert "| global batch | 512 |" in readme and (code / "sd_perf/mlperf/package.py").is_file()
    assert (code / "kernels/sd_kernels/targets.py").is_file() and not list(
        code.rglob("__pycache__")
    )
    assert red(folder, results) == {}
    assert sorted((folder / "results/box/stable_diffusion").iterdir()) == logs  # no scaling.json


def test_reasons_of_a_package_that_is_not(ten_logs, tmp_path):
    logs = ten_logs()
    change(logs / "result_1.txt", '"value": 2, "metadata"', '"value": 1, "metadata"')
    for number in (3, 4):
        change(logs / f"result_{number}.txt", '"opt_name"', '"opt"')
    results, _ = read_results(one_set([logs]))
    folder = write_package(results, described(), "acme", "box", tmp_path / "out")
    (folder / "a name").write_text("")
    reasons = red(folder, results)
    assert "opt_name: must stand exactly once, found 0" in reasons["compliance: 8 of 10 logs pass"]
    assert "seed 1 is that of" in reasons["seeds, reference convergence point, score"]
    assert "2 files do not comply" in reasons["package checker"]
    assert "git-unfriendly name" in reasons["repository checker"]


def test_what_cannot_be_a_package(results, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="these are 9 runs; a submission has exactly 10"):
        write_package(results[:9], described(), "acme", "box", out)
    with pytest.raises(UserError, match="--system: 'a box' cannot name a folder"):
        write_package(results, described(), "acme", "a box", out)
    with pytest.raises(UserError, match=r"--org: '\.\./x' cannot name"):
        write_package(results, described(), "../x", "box", out)
    with pytest.raises(DataError, match="says division 'open', and the submission's is 'closed'"):
        write_package(results, described(division="open"), "acme", "box", out)
    with pytest.raises(DataError, match="says submitter 'acme'"):
        write_package(results, described(), "other", "box", out)
    assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(UserError, match="exists already; move it away"):
        write_package(results, described(), "acme", "box", out)


def test_the_commands(results, tmp_path, sd_perf):
    given = ("--org", "acme", "--system", "box")
    file, out = tmp_path / "box.json", tmp_path / "out"
    code, text, _ = sd_perf("mlperf", "system", *given, "--output", file, "--fields", "cooling=air")
    assert code == 0 and "fill in before you submit: " in text and "cooling" not in text
    logs = results[0].path.parent
    command = ("mlperf", "package", logs, *given, "--output", out, "--description", file)
    code, text, _ = sd_perf(*command)
    assert code == 0 and "all checks are green" in text and text.count("green  ") == 5
    code, _, errors = sd_perf(*command)
    assert code == 2 and "exists already" in errors
    code, _, errors = sd_perf("mlperf", "system", *given, "--output", file, "--fields", "cooling")
    assert code == 2 and "write name=value" in errors


def test_published_runs_make_a_package(real_data, tmp_path, sd_perf):
    logs = real_data / "mlperf_logs/v5.0/NVIDIA"
    given = ("--org", "acme", "--system", "box", "--output", tmp_path / "out")
    code, text, _ = sd_perf("mlperf", "package", logs, *given)
    assert code == 0 and "all checks are green" in text
