"""A submission: the tree that MLCommons wants, and its own checkers over it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

import sd_kernels
import sd_perf
from sd_perf.errors import DataError, UserError
from sd_perf.files import disk_errors, written_aside
from sd_perf.mlperf.compliance import check_log
from sd_perf.mlperf.log import BENCHMARK, import_mlperf
from sd_perf.mlperf.official import OfficialToolError, listen
from sd_perf.mlperf.results import RUNS, Result
from sd_perf.mlperf.score import score_runs
from sd_perf.mlperf.system import blanks, official_faults, write_system
from sd_perf.runs.folder import read_manifest
from sd_perf.visible import visible

IMPLEMENTATION = "sd-perf"
_LEFT_OUT = ("__pycache__", "*.pyc", ".*")


@dataclass(frozen=True)
class Check:
    """One official check of a package."""

    name: str
    faults: tuple[str, ...]
    """reasons, a sentence each; a check without any is green"""


def write_package(
    results: Sequence[Result], description: dict[str, str], org: str, system: str, output: Path
) -> Path:
    """Write OUTPUT/ORG: systems/, results/ and benchmarks/ of ten runs; returns its path.

    Written whole or not at all. Raises DataError where the runs are not ten or the description is
    of another submission, UserError where a name cannot be one or the folder is not empty.
    """
    for option, name in (("--org", org), ("--system", system)):
        if not name or name != name.strip() or name[0] == "." or set(name) & set(" /\\\n\0"):
            raise UserError(
                f"{option}: {name!r} cannot name a folder of a submission; take letters, digits, "
                "- and _, without spaces, and no . at its start"
            )
    if len(results) != RUNS:
        raise DataError(f"these are {len(results)} runs; a submission has exactly {RUNS}")
    for field, value in (("division", results[0].division), ("submitter", org)):
        if description[field] != value:
            raise DataError(
                f"the system description says {field} {description[field]!r}, and the submission's "
                f"is {value!r}; change one of them"
            )
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output}: exists already; move it away, or name another --output")
    with disk_errors(output, "make room there, or name another --output"):
        output.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(output) as draft:
            folder = draft / org
            logs = folder / "results" / system / BENCHMARK
            logs.mkdir(parents=True)
            for number, result in enumerate(results):
                shutil.copyfile(result.path, logs / f"result_{number}.txt")
            write_system(folder / "systems" / f"{system}.json", description)
            code = folder / "benchmarks" / BENCHMARK / "implementations" / IMPLEMENTATION
            _write_code(code, results, description)
    return output / org


def _write_code(folder: Path, results: Sequence[Result], description: dict[str, str]) -> None:
    """The packages, their licence, the config of each run whose folder is known, and a README."""
    left_out = shutil.ignore_patterns(*_LEFT_OUT)
    for package, place in ((sd_perf, "sd_perf"), (sd_kernels, "kernels/sd_kernels")):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, folder / place, ignore=left_out)
    checkout = Path(sd_perf.__file__).parents[1]
    for name in ("LICENSE", "pyproject.toml"):  # an installed package has none beside it
        if (checkout / name).is_file():
            shutil.copyfile(checkout / name, folder / name)
    (folder / "configs").mkdir()
    commands = []
    for number, result in enumerate(results):
        if (result.path.parent / "run_manifest.json").is_file():
            manifest = read_manifest(result.path.parent)
            text = yaml.safe_dump(manifest["config"], sort_keys=False)
            (folder / "configs" / f"result_{number}.yaml").write_text(text, encoding="utf-8")
            starts = [visible(start.get("command", "")) for start in manifest["starts"]]
            commands.append(f"result_{number}: " + "; then ".join(starts))
    (folder / "README.md").write_text(_readme(results, description, commands), encoding="utf-8")


def _readme(results: Sequence[Result], description: dict[str, str], commands: Sequence[str]) -> str:
    facts = {
        "benchmark": "text to image, Stable Diffusion v2 (MLPerf Training, ruleset 5.0.0)",
        "division": results[0].division,
        "system": f"{description['system_name']}, {description['number_of_nodes']} nodes of "
        f"{description['accelerators_per_node']} x {description['accelerator_model_name']}",
        "global batch": f"{results[0].batch:,}",
        "framework": f"{description['framework']}; {description['other_software_stack']}",
        "sd-perf": sd_perf.__version__,
    }
    rows = "\n".join(f"| {name} | {visible(value)} |" for name, value in facts.items())
    run = "\n".join(f"    {command}" for command in commands) or "    (only the logs are known)"
    return f"""# sd-perf, an implementation of the text-to-image benchmark

| | |
|---|---|
{rows}

`sd_perf` is the trainer and `kernels/sd_kernels` its operators;
`pip install '.[cli,images,mlperf,text]'` in this folder installs both.

## How to train

Data and checkpoints are those of MLCommons' reference. `configs/result_N.yaml` is the whole config
of a run: `sd-perf train --config configs/result_0.yaml`, then, off the clock, `sd-perf evaluate
RUN`. The file caches are dropped before each run. The commands of these runs:

{run}

## Model, optimizer, order

The UNet of 865,910,724 parameters from random weights; autoencoder and text encoder are frozen.
AdamW without clipping, linear warm-up. Every sample once per epoch in an order drawn from seed and
epoch; timestep, noise and latents are drawn during the run from seed and sample index. Seeds come
from the system's entropy and stand in the logs.

## Quality

FID at most 90 and CLIP score at least 0.15 at one checkpoint, on 30,000 prompts of COCO 2014; a
checkpoint every CEIL(512,000 / batch) steps.
"""


def check_package(folder: Path, results: Sequence[Result], ruleset: str) -> Iterator[Check]:
    """All official checks over a package, and what they pass over; on a copy, since they write."""
    with TemporaryDirectory(prefix="sd_perf_package_") as name:
        copy = Path(name) / folder.name
        shutil.copytree(folder, copy)
        systems = sorted((copy / "systems").glob("*.json"))
        described = [fault for path in systems for fault in official_faults(path, ruleset)]
        yield Check("system description", tuple(described))
        yield _compliance(results, ruleset)
        score = score_runs(results, ruleset)
        yield Check("seeds, reference convergence point, score", tuple(score.faults()))
        yield Check("package checker", tuple(_package_faults(copy, ruleset)))
        yield Check("repository checker", tuple(_repository_faults(copy)))


def unfinished(description: dict[str, str]) -> str:
    """What a person has to fill in, in a sentence; empty where there is nothing."""
    names = blanks(description)
    return f"fill in before you submit: {', '.join(names)}" if names else ""


def _compliance(results: Sequence[Result], ruleset: str) -> Check:
    """The logs that fail. One may: it is then dropped as the slowest."""
    verdicts = [check_log(result.path, None, ruleset) for result in results]
    failed = [verdict for verdict in verdicts if not verdict.passed]
    lines = [line for verdict in failed for line in str(verdict).splitlines()]
    name = f"compliance: {len(verdicts) - len(failed)} of {len(verdicts)} logs pass"
    if len(failed) == 1:
        return Check(f"{name}, and one is dropped as the slowest", ())
    return Check(name, tuple(lines))


def _package_faults(copy: Path, ruleset: str) -> list[str]:
    """The checker exits with 0 whatever it finds, so its words count."""
    module = import_mlperf("package_checker.package_checker")
    where = (str(copy), "training", ruleset)
    nothing = (False,) * 5  # neither quiet, nor warnings as errors, nor a check passed over
    try:
        ok_systems, said_systems = listen(module.check_systems, *where)
        ok_logs, said_logs = listen(module.check_training_result_files, *where, *nothing)
    except OfficialToolError as error:
        return [f"the package checker broke off with {error}"]
    said = [line.strip() for line in (*said_systems, *said_logs) if line.strip()]
    return [] if ok_systems and ok_logs else (said or ["the package checker gave no reason"])


def _repository_faults(copy: Path) -> list[str]:
    """Its functions, one by one: `run_checks` returns False either way."""
    module = import_mlperf("repo_checker.repo_checker")
    files, folders = (
        getattr(module, f"list_{kind}_recursively")(str(copy)) for kind in ("files", "dirs")
    )
    checks = (
        (module._check_bad_filenames, files, folders),
        (module._check_file_sizes, files),
        (module._check_symbolic_links, str(copy), files),
    )
    answers = [listen(*check) for check in checks]
    return [line.strip() for ok, said in answers if not ok for line in said]
