"""What doctor knows and shows: within one screen, and no proof that there is not."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sd_kernels.registry import all_ops, source_digest
from sd_perf.cli import main
from sd_perf.console import TextConsole
from sd_perf.errors import UserError
from sd_perf.tools.doctor import RESULTS, examine, screen
from sd_perf.tools.results import KernelRow, Provenance, Result, write


def shown(report: dict[str, Any]) -> str:
    console = TextConsole(file=io.StringIO(), width=100)
    console.print(*screen(report), sep="\n")
    return console.file.getvalue()  # type: ignore[attr-defined]


GREEN = {"ok": True, "checked": 1, "worst": ""}
RED = {**GREEN, "ok": False}


def result(**changes: Any) -> dict[str, Any]:
    row = {
        "batch": 64,
        "dtype": "bfloat16",
        "cached": "inputs",
        "op": "geglu",
        "backend": "triton",
        "gpu": "NVIDIA H100 80GB HBM3",
        "parity": GREEN,
    }
    unread = dict.fromkeys(KernelRow.__annotations__)
    return {**unread, **row, "source": source_digest("geglu"), **changes}


def write_results(folder: Path, *rows: dict[str, Any]) -> Path:
    provenance = Provenance.of_this_run(
        "kernel_speed", {"gpu": "a GPU"}, {"torch": "2"}, git_sha="abc"
    )
    write(folder / "kernels_h100.json", Result("kernel_speed", provenance, list(rows)))
    return folder


def backend(report: dict[str, Any], op: str, name: str) -> dict[str, Any]:
    rows = next(kernel["backends"] for kernel in report["kernels"] if kernel["op"] == op)
    return next(row for row in rows if row["backend"] == name)


@pytest.mark.parametrize("target", ["here", "a100", "h100", "h200", "b200"])
def test_one_screen(target: str) -> None:
    page = shown(examine(target))
    assert "\N{HORIZONTAL ELLIPSIS}" not in page
    lines = page.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert all(any(line.startswith(op) for line in lines) for op in all_ops())


def test_kernels_of_a_declared_gpu() -> None:
    report = examine("h100")
    assert report["target"] == {"name": "H100", "declared": True}
    assert (
        next(kernel["auto"] for kernel in report["kernels"] if kernel["op"] == "geglu") == "triton"
    )
    assert backend(report, "geglu", "triton")["against"] == []
    assert "kernels on H100, as declared" in shown(report)


def test_a_reason_can_be_read() -> None:
    assert "no: needs a CUDA GPU" in shown(examine("here")) or torch.cuda.is_available()
    assert "no: needs capability 8.9" in shown(examine("a100"))


def test_the_package_of_the_log_is_listed() -> None:
    assert "mlperf-logging" in {row["package"] for row in examine("here")["packages"]}


def test_packages_of_the_sinks_are_listed_with_what_they_enable() -> None:
    rows = {row["package"]: row for row in examine("here")["packages"]}
    for package, key in {
        "tensorboard": "logging.sinks",
        "wandb": "logging.sinks",
        "prometheus-client": "logging.prometheus",
    }.items():
        assert rows[package]["needed_for"] == key and "sd-perf[" in rows[package]["install"]


def test_no_hardware_without_a_result(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        report = examine("h100", folder)
        assert not any(row["ran_on"] for kernel in report["kernels"] for row in kernel["backends"])
        assert "never" in shown(report)


def test_a_green_result_is_a_proof_until_the_source_changes(tmp_path: Path) -> None:
    folder = write_results(
        tmp_path, result(), result(gpu="NVIDIA B200", parity=RED), result(backend="apex")
    )
    report = examine("h100", folder)
    assert backend(report, "geglu", "triton")["ran_on"] == ["NVIDIA H100 80GB HBM3"]
    assert "NVIDIA H100 80GB HBM3" in shown(report) and "changed since" not in shown(report)
    report = examine("h100", write_results(tmp_path, result(source="0" * 12)))
    assert "changed since" in shown(report)


def test_a_red_result_is_no_proof(tmp_path: Path) -> None:
    report = examine("h100", write_results(tmp_path, result(parity=RED)))
    assert backend(report, "geglu", "triton")["ran_on"] == []


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{"op": "geglu"}]}', '{"rows": 3}'])
def test_a_spoilt_result_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "kernels_x.json").write_text(text)
    with pytest.raises(UserError, match=r"kernels_x\.json: is no result of kernel_speed\.py"):
        examine("here", tmp_path)


def test_committed_results_can_be_read() -> None:
    assert RESULTS.is_dir()
    examine("here", RESULTS)


def test_adapters_tell_their_version() -> None:
    report = examine("h100")
    report["kernels"][0]["backends"][0] |= {"package": "apex 24.04", "installed": None}
    assert "not there  signatures bound to apex 24.04 (" in shown(report)
    report["kernels"][0]["backends"][0] |= {"installed": "24.05"}
    assert "signature bound to apex 24.04; 24.05 is installed" in shown(report)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["doctor", "--json", "--target", "h200"])
    assert exit.value.code == 0
    assert json.loads(capsys.readouterr().out)["target"] == {"name": "H200", "declared": True}


def test_a_gpus_allocator_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    report = examine("here")
    gpu = {"device": "cuda:0", "name": "H100", "memory_bytes": 80 * 2**30, "capability": "9.0"}
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in shown({**report, "devices": [gpu]})
    if not torch.cuda.is_available():
        assert "ALLOC_CONF" not in shown(report)
