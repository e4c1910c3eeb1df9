"""Which backend is taken: by name, by auto, strictly, for GPUs that are declared."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator

import pytest
import torch

from sd_kernels import geglu, registry, selection
from sd_kernels.errors import KernelError
from sd_kernels.reasons import Reason, refusal
from sd_kernels.selection import Choice, choose
from sd_kernels.spec import Backend, Case
from sd_kernels.targets import GPUS, Target

CPU = Target("cpu", "cpu")
H100 = GPUS["h100"].target
REFERENCE = geglu.SPEC.backends[-1]
HERE = REFERENCE.module
"""a module that can be imported"""


def no_half(case: Case, dtype: torch.dtype) -> Reason | None:
    return refusal("takes no float16") if dtype == torch.float16 else None


BACKENDS = (
    Backend("blackwell", HERE, capability=(10, 0)),
    Backend(
        "absent",
        "sd_kernels.geglu.absent",
        package="absent 1.0",
        install="pip install absent",
        capability=(8, 0),
    ),
    Backend("slow_to_compile", HERE, automatic=False),
    Backend("triton", HERE, capability=(8, 0), refuses=no_half),
    REFERENCE,
)


@pytest.fixture(autouse=True)
def one_op(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An op with a backend of every kind."""
    ops = {"geglu": dataclasses.replace(geglu.SPEC, backends=BACKENDS)}
    monkeypatch.setattr(selection, "all_ops", lambda: ops)
    return


def test_auto_takes_the_first_that_can_and_says_why_not_the_others() -> None:
    assert choose("geglu", target=H100) == Choice(
        "geglu",
        "triton",
        "auto",
        {
            "blackwell": "needs compute capability 10.0, H100 has 9.0",
            "absent": "No module named 'sd_kernels.geglu.absent'; pip install absent",
            "slow_to_compile": "only when named",
        },
    )
    assert choose("geglu", target=GPUS["b200"].target).backend == "blackwell"
    on_cpu = choose("geglu", target=CPU)
    assert on_cpu.backend == "reference"
    assert on_cpu.passed_over["triton"] == "needs a CUDA GPU, this is cpu"
    assert on_cpu.function() is geglu.SPEC.reference()


def test_a_case_that_is_refused_passes_a_backend_over() -> None:
    cases = geglu.SPEC.cases[:2]
    assert choose("geglu", target=H100, cases=cases).backend == "triton"
    choice = choose("geglu", target=H100, cases=cases, dtype=torch.float16)
    assert choice.backend == "reference"
    assert choice.passed_over["triton"] == f"{cases[0].name}: takes no float16"


def test_strict_forgives_what_is_for_newer_gpus_and_nothing_else() -> None:
    with pytest.raises(
        KernelError,
        match=r"auto would take 'triton' on H100, .*\(absent: No module.*pip install abs",
    ):
        choose("geglu", target=H100, strict=True)
    assert choose("geglu", "reference", H100, strict=True).backend == "reference"
    assert choose("geglu", "slow_to_compile", H100, strict=True).backend == "slow_to_compile"


def test_strict_where_all_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = {"geglu": dataclasses.replace(geglu.SPEC, backends=(BACKENDS[0], *BACKENDS[2:]))}
    monkeypatch.setattr(selection, "all_ops", lambda: ops)
    assert choose("geglu", target=H100, strict=True).backend == "triton"
    with pytest.raises(KernelError, match="auto would take 'reference' on cpu"):
        choose("geglu", target=CPU, strict=True)


@pytest.mark.parametrize(
    ("op", "wanted", "words"),
    [
        ("geglo", "auto", "'geglo' is not an op.*mean 'geglu'"),
        (
            "geglu",
            "tritn",
            "kernels.geglu: 'tritn' is not a backend.*mean 'triton'.*choose auto, blackwell, "
            "absent",
        ),
        (
            "geglu",
            "absent",
            "'absent' cannot be had on H100: No module.*pip install absent; or choose auto",
        ),
        (
            "geglu",
            "blackwell",
            "'blackwell' cannot be had on H100: needs compute capability 10.0, H100 has 9.0",
        ),
    ],
)
def test_what_cannot_be_had_is_one_sentence(op: str, wanted: str, words: str) -> None:
    with pytest.raises(KernelError, match=words):
        choose(op, wanted, H100)


def test_the_digest_is_of_the_sources(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = set()
    monkeypatch.setattr(registry.sd_kernels, "__path__", [str(tmp_path)])
    (tmp_path / "geglu").mkdir()
    for name, text in [("triton.py", "x = 1"), ("triton.py", "x = 2"), ("apex.py", "x = 2")]:
        (tmp_path / "geglu" / name).write_text(text)
        digests.add(registry.source_digest("geglu"))
    assert len(digests) == 3


def test_the_digest_is_of_what_the_sources_import(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {str(path).rpartition("sd_kernels/")[2] for path in registry.sources("fp8_linear")}
    assert names > {
        "launch.py",
        "column_sum.py",
        "layer_norm/triton.py",
        "geglu/reference.py",
        "fp8_linear/te.py",
    }
    assert names.isdisjoint({"spec.py", "philox.py"})
    ops = list(registry.all_ops())
    shutil.copytree(registry.sd_kernels.__path__[0], tmp_path / "copy")
    monkeypatch.setattr(registry.sd_kernels, "__path__", [str(tmp_path / "copy")])
    before = {op: registry.source_digest(op) for op in ops}
    with (tmp_path / "copy/column_sum.py").open("a") as file:
        file.write("# changed\n")
    changed = {op for op, digest in before.items() if registry.source_digest(op) != digest}
    assert changed == {"fp8_linear", "geglu", "layer_norm", "residual_add", "v_mse_loss"}
